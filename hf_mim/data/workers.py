"""Data workers leave signals to the main process, which ends them when it ends."""

import functools
import multiprocessing
import os
import signal
import threading

from torch.utils.data import DataLoader


def leave_signals_to_the_main_process(worker: int):
    """For `DataLoader.worker_init_fn`. A scheduler signals the workers too, but the main process still needs them."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def leaving_signals(loader: DataLoader) -> DataLoader:
    """The same loader. Its workers do this too, after what they do at their start anyway."""
    base = getattr(loader, "base_dataloader", loader)
    if getattr(base.worker_init_fn, "func", None) is not _start:
        base.worker_init_fn = functools.partial(_start, base.worker_init_fn)
    return loader


def _start(before, worker: int):
    if before is not None:
        before(worker)
    leave_signals_to_the_main_process(worker)


def _end_with_the_main_process():
    """End this worker when the SIGTERM comes from the main process, which ends its workers in this way."""
    main = multiprocessing.parent_process().pid  # with a fork server, os.getppid() is the server
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)

"""Steps that go wrong change nothing, and a signal ends the run at a whole checkpoint.

Both are votes of a step: is its loss or its gradient not finite, has this process been told to stop? The ranks put
their votes together on the device, where the optimizer obeys the first; the host reads them when they have arrived, a
few steps later, so that no step waits for the device, and all ranks read the same at the same step.
"""

import contextlib
import logging
import os
import signal
import threading
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_mim.files import listed
from hf_mim.pretraining.checkpoints import newest_whole

logger = logging.getLogger(__name__)

LAG = 2  # steps that the host may be ahead of what it reads of an accelerator
INTERRUPTED = 75  # EX_TEMPFAIL: the exit status of a run that a signal has ended, to be started again


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass
class Votes:
    """What a step has said: its number, the two votes on their way to the host, its images."""

    step: int
    votes: Tensor
    arrived: torch.Event | None
    finite: list[Tensor]  # [B] bools for each micro-batch
    names: list[list[str]]

    def read(self) -> tuple[bool, bool]:
        if self.arrived is not None:
            self.arrived.synchronize()
        skipped, stop = self.votes.tolist()
        return skipped > 0, stop > 0

    def images(self) -> str:
        """Those whose predictions are not finite; where there is none, all of the step."""
        names = [name for batch in self.names for name in batch]
        wrong = [name for name, finite in zip(names, torch.cat(self.finite).tolist(), strict=True) if not finite]
        if wrong:
            return f"the predictions of {listed(wrong, 20)} are not finite"
        return f"all of its images have finite predictions: {listed(names)}"


class StepGuard(TrainerCallback):
    """Skips steps whose loss or gradient is not finite, ends the run after `max_skipped` of them in a row or a signal.

    A skipped step leaves weights, optimizer state and EMA target as they are; schedules and data go on.
    `skip` says it on the device: 0-dim, 1.0 where the step of this moment is skipped. A fused AdamW reads it there; for
    any other optimizer the host has to wait for it, at each step.
    """

    def __init__(self, trainer, max_skipped: int):
        self.trainer, self.max_skipped = trainer, max_skipped
        self.skipped = self.in_a_row = 0  # steps that were skipped: by this process, and up to now without a good one
        self.signal: signal.Signals | None = None  # that has ended the run
        self._asked: signal.Signals | None = None
        self._pending: deque[Votes] = deque()
        self.skip, self.grad_norm = None, None
        self._start_step()

    def _start_step(self):
        self._losses, self._finite, self._names = [], [], []

    def watch(self, loss: Tensor, pixel_values: Tensor, predictions: Tensor, names: list[str] | None):
        """A micro-batch: its loss, and which of its images are finite from end to end."""
        sums = [tensor.detach().flatten(1).sum(1, dtype=torch.float32) for tensor in (pixel_values, predictions)]
        self._losses.append(loss.detach().float())
        self._finite.append(torch.isfinite(sums[0] + sums[1]))
        self._names.append(names or [f"image {index} of the batch" for index in range(len(pixel_values))])

    def on_step_begin(self, args, state, control, **kwargs):
        self._start_step()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        total = torch.stack(self._losses).sum() + _full_tensor(self.grad_norm)
        votes = torch.stack([(~torch.isfinite(total)).float(), total.new_full((), float(self._asked is not None))])
        if args.world_size > 1:
            votes = self.trainer.accelerator.reduce(votes, "sum")
        self.skip = votes[0].clamp(max=1)
        if self.trainer.accelerator.scaler is None:  # a loss scaler skips by itself
            if getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
                optimizer.optimizer.found_inf = self.skip
            elif self.skip.item():
                optimizer.zero_grad()  # without gradients an optimizer has nothing to do
        self._pending.append(Votes(state.global_step, *_send(votes), self._finite, self._names))

    def on_step_end(self, args, state, control, **kwargs):
        lag = 0 if args.device.type == "cpu" else LAG
        while len(self._pending) > lag:
            self._judge(self._pending.popleft(), args, control)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        while self._pending:
            self._judge(self._pending.popleft(), args)  # too late to stop
        if optimizer is not None and hasattr(optimizer.optimizer, "found_inf"):
            del optimizer.optimizer.found_inf

    def _judge(self, votes: Votes, args, control=None):
        skipped, stop = votes.read()
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.skipped += skipped
        if skipped:
            logger.warning(
                f"Step {votes.step + 1} is skipped, because its loss or its gradient is not finite; {votes.images()}"
            )
        if self.in_a_row >= self.max_skipped:
            last = newest_whole(args.output_dir)
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row, up to step {votes.step + 1}, had a loss or a gradient that is not "
                f"finite; the last good checkpoint is {last or 'none yet'}. Try a lower base_lr, longer warmup_steps, "
                f"max_grad_norm 1{', bf16 in place of fp16' if args.fp16 else ''}, and look at the images named above"
            )
        if stop and control is not None:
            self.signal = self._asked or signal.SIGTERM  # another rank's
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    @contextlib.contextmanager
    def signals(self):
        """SIGTERM and SIGINT end the run after its step, at a checkpoint; a second SIGINT ends it at once."""
        self.signal = self._asked = None
        self.skipped = self.in_a_row = 0
        self._pending.clear()
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return

        def ask(number, frame):
            if self._asked == number == signal.SIGINT:
                raise KeyboardInterrupt
            self._asked = signal.Signals(number)

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def leave_signals_to_the_main_process(worker: int):
    """For `DataLoader.worker_init_fn`. A scheduler signals workers too, which the last step still needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_main_process, daemon=True).start()


def _end_with_the_main_process():
    """The main process ends its workers by SIGTERM as well."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _full_tensor(norm) -> Tensor | float:
    """A sharded model's gradient norm is a DTensor."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _send(votes: Tensor) -> tuple[Tensor, torch.Event | None]:
    """On their way to the host, with the event of their arrival."""
    if votes.device.type == "cpu":
        return votes, None
    host = torch.empty_like(votes, device="cpu", pin_memory=True).copy_(votes, non_blocking=True)
    event = torch.Event(votes.device)
    event.record()
    return host, event

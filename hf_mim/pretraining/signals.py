"""What a scheduler or a person asks of a process by a signal, and what ends a wait for images that do not come.

SIGTERM, SIGHUP and SIGINT end a training after its step. But a step that waits for images may never end: a network
mount hangs, a worker found no room in shared memory. So a thread watches how long the process has waited, and wakes it.
"""

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

INTERRUPTED = 75  # EX_TEMPFAIL, the exit status of what a signal has ended: start it again
GRACE = 5.0  # seconds that a step may still wait for its images after a signal
LONGEST_END = 10.0  # seconds that `Ended` may take to leave `ended_at_once`
PATIENCE = 60.0  # seconds without images until a warning
SHARED_MEMORY = "/dev/shm"


class Ended(BaseException):
    """A signal ends what the process does. No library may catch it as an error of its own."""

    def __init__(self, number: signal.Signals, message: str = ""):
        super().__init__(message or number.name)
        self.signal = number


class NoImagesError(RuntimeError):
    """No images came for `data_timeout` seconds."""


class _Stalled(BaseException):
    """Raised in the main thread, out of a wait."""


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `Ended` wherever the main thread is. SIGINT raises KeyboardInterrupt as ever.

    Python drops what is raised while it forks or frees an object; then the signal is sent again. If the block is not
    left after `LONGEST_END` seconds, because a thread of a library still waits, the process ends where it is. Nothing
    is half then: files get their names when they are whole.
    """
    process, over, usual = os.getpid(), threading.Event(), sys.unraisablehook
    main = threading.main_thread().ident or 0  # it runs, so it has a number
    raised: list[tuple[signal.Signals, float]] = []  # (signal, when)
    dropped: list[tuple[signal.Signals, float]] = []

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process and not raised:  # not in a process that was forked just now, and not twice
            raised.append((signal.Signals(number), time.monotonic()))
            raise Ended(signal.Signals(number))

    def unraisable(about: Any) -> None:
        if isinstance(about.exc_value, Ended):
            dropped.extend(raised)
            raised.clear()
        elif not raised:  # what fails because the process ends is not told
            usual(about)

    def watch() -> None:
        while not over.wait(0.5):
            if dropped:
                signal.pthread_kill(main, dropped.pop()[0])
            elif raised and time.monotonic() - raised[0][1] > LONGEST_END:
                print(f"\n{raised[0][0].name} has ended the process, a thread of which still waited", file=sys.stderr)
                os._exit(INTERRUPTED)

    with _handled(end, signal.SIGTERM, signal.SIGHUP) as handled:
        if not handled:
            yield
            return
        sys.unraisablehook = unraisable
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        except Ended as error:
            traceback.clear_frames(error.__traceback__)  # what they hold, such as data workers, ends here
            raise
        finally:
            over.set()
            watcher.join()
            sys.unraisablehook = usual


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[bool]:
    """Inside, these signals call `handler`, but not those that are ignored (by nohup). False outside the main thread,
    which alone may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield True
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Listener:
    """Notes the signal that asks a training to end, and watches its waits for images.

    asked: the signal, None before it comes.
    timeout: seconds that a wait may last once images have come before. The first wait may last for ever: a stream may
        have to read long before it gives its first image.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._begin()

    def _begin(self) -> None:
        self.asked: signal.Signals | None = None
        self._asked_at = self._since = 0.0
        self._came = self._woken = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM, SIGHUP and SIGINT are only noted; a second SIGINT raises KeyboardInterrupt."""
        self._begin()

        def note(number: int, frame: FrameType | None) -> None:
            if self._woken:
                self._woken = False
                if self._since:
                    raise _Stalled
                return  # the images came just now
            if self.asked == number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked, self._asked_at = signal.Signals(number), time.monotonic()

        over = threading.Event()
        with _handled(note, signal.SIGTERM, signal.SIGHUP, signal.SIGINT) as handled:
            watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
            if handled:
                watch.start()
            try:
                yield
            finally:
                over.set()
                if handled:
                    watch.join()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the process waits for the images of its next step.

        Raises:
            Ended: a signal came, and then no images for `GRACE` seconds.
            NoImagesError: no images came for `timeout` seconds.
        """
        self._since = time.monotonic()
        try:
            yield
        except _Stalled:
            if self.asked:
                raise Ended(self.asked) from None
            raise NoImagesError(f"no images came for {self.timeout:g} s (data_timeout): {_what_stalls()}") from None
        finally:
            self._since = 0.0
        self._came = True

    def _watch(self, over: threading.Event) -> None:
        warned = 0.0  # since when it waited at the last warning
        while not over.wait(0.5):
            since, now = self._since, time.monotonic()
            if not since:
                continue
            if now - since > PATIENCE and warned != since:
                warned = since
                logger.warning(f"No images have come for {PATIENCE:g} s: {_what_stalls()}")
            asked = self.asked and now - max(since, self._asked_at) > GRACE
            if asked or (self._came and now - since > self.timeout):
                self._woken = True
                signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
                over.wait(5)


def free_shared_memory() -> int | None:
    """Bytes that are free for the batches of data workers; None where batches do not go through `SHARED_MEMORY`."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def _what_stalls() -> str:
    free = free_shared_memory()
    room = "" if free is None else f", or a worker found no room in shared memory ({SHARED_MEMORY} has {free:,} bytes)"
    return f"their source does not answer{room}"

"""Progress bars that leave no half line behind."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


@contextmanager
def progress_bar(shown: bool, desc: str, total: int, unit: str = "it", steps: Iterable | None = None) -> Iterator[tqdm]:
    """A bar that goes away at its end. If an error ends it, it stays on its own line, and the error gets the next.

    steps: what the bar iterates over, if its user does not update it.
    """
    bar = tqdm(steps, desc, total, leave=False, unit=unit, disable=not shown)
    try:
        yield bar
    except BaseException:
        bar.leave = True
        raise
    finally:
        bar.close()

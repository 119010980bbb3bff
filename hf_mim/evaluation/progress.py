"""Progress bars that leave no half line behind."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm
from transformers.utils import is_in_notebook


def watched() -> bool:
    """Whether bars are of use: this is the first process, and it runs in a terminal or in a notebook."""
    return os.environ.get("RANK", "0") == "0" and (sys.stderr.isatty() or is_in_notebook())


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


def with_bar(steps: Iterable, desc: str, total: int | None, unit: str = " images") -> Iterator:
    """The steps, with a bar if somebody watches."""
    with progress_bar(watched(), desc, total, unit, steps) as bar:
        yield from bar

"""Progress bars that leave no half line behind, and plain lines in their place where nobody watches."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from tqdm import tqdm as plain_tqdm
from tqdm.auto import tqdm
from transformers.utils import is_in_notebook

SECONDS_PER_LINE = 30  # where nobody watches


class _Lines:
    """A file for tqdm that makes a line of each state of a bar."""

    def write(self, text: str):
        if text := text.strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()


def watched() -> bool:
    """Whether somebody sees a bar: this is the first process, and it runs in a terminal or in a notebook."""
    return _is_first() and (sys.stderr.isatty() or is_in_notebook())


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress_bar(
    shown: bool, desc: str, total: int | None, unit: str = " steps", steps: Iterable | None = None
) -> Iterator[tqdm]:
    """A bar that goes away at its end. If an error ends it, it stays on its own line, and the error gets the next.

    Without a terminal or a notebook, it is a plain line every 30 seconds. Only the first process shows it.
    steps: what the bar iterates over, if its user does not update it.
    """
    about = dict(desc=desc, total=total, unit=unit, leave=False, disable=not (shown and _is_first()))
    if watched():
        bar = tqdm(steps, **about)
    else:
        times = dict(delay=SECONDS_PER_LINE, mininterval=SECONDS_PER_LINE, maxinterval=SECONDS_PER_LINE)
        ahead = "{unit}" if total is None else " of {total_fmt}{unit}, {remaining} left"
        line = "{desc}: {n_fmt}" + ahead + "{postfix}"
        bar = plain_tqdm(steps, **about, **times, file=_Lines(), bar_format=line)
    try:
        yield bar
    except BaseException:
        bar.leave = True
        raise
    finally:
        bar.close()


def with_bar(steps: Iterable, desc: str, total: int | None, unit: str = " images") -> Iterator:
    """The steps, with a bar."""
    with progress_bar(True, desc, total, unit, steps) as bar:
        yield from bar

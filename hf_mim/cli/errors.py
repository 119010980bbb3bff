"""How users learn of mistakes: one line on stderr, from the first process alone, and exit status 2."""

import errno
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from hf_mim.files import one_line


class Mistake(click.UsageError, ValueError):
    """A mistake of the user, in one line."""


@contextmanager
def told_in_one_line(interrupted: str) -> Iterator[None]:
    """Inside, errors that a user's input can cause become a `Mistake`. ^C prints `interrupted` and gives status 130.

    Any other exception is a bug of ours and keeps its traceback.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError, StrictDataclassError) as error:
        raise Mistake(one_line(error) + place_for_files(error)) from error
    except KeyboardInterrupt:
        print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        raise click.exceptions.Exit(130) from None


def place_for_files(error: BaseException | None) -> str:
    """What helps if a library could not write into the user's cache folder, as in a container without a home."""
    from huggingface_hub.constants import HF_HOME

    home, cannot = os.path.abspath(HF_HOME), (errno.EROFS, errno.EACCES, errno.ENOSPC)
    while error is not None:
        path = error.filename if isinstance(error, OSError) and error.errno in cannot else None
        if isinstance(path, str) and path and os.path.commonpath([home, os.path.abspath(path)]) in (home, path):
            return "; the variable HF_HOME names another folder for such files"
        error = error.__cause__ or error.__context__
    return ""


def run_script(main: Callable[..., object], about: str | None):
    """Call the `main` of a small script with the words of its command line.

    Another number of words than it takes ends the program with the text `about`; a mistake of the user, with one line.
    """
    words = sys.argv[1:]
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        sys.exit(about)
    try:
        main(*words)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")


def fail(message: str) -> int:
    """Print the error and return the exit status of a mistake."""
    say(f"error: {message}")
    return 2


def say(message: str):
    """Print to stderr, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)

"""How users learn of mistakes: one line on stderr, from the first process alone, and exit status 2."""

import os
import sys
from collections.abc import Iterator
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
        raise Mistake(one_line(error)) from error
    except KeyboardInterrupt:
        print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        raise click.exceptions.Exit(130) from None


def fail(message: str) -> int:
    """Print the error and return the exit status of a mistake."""
    say(f"error: {message}")
    return 2


def say(message: str):
    """Print to stderr, on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)

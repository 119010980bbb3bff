"""How mistakes are told: one line on stderr, once however many processes there are, and exit status 2."""

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
    """What a user's input makes the library raise becomes a `Mistake`; ^C ends with status 130 and says `interrupted`.

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
    """Print the error; returns the exit status of mistakes."""
    say(f"error: {message}")
    return 2


def say(message: str):
    """Print to stderr, on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)

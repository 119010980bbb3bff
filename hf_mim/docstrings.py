"""Reads the `Args:` part of docstrings, for help texts and messages."""

import inspect
import re


def argument_texts(cls: type) -> dict[str, str]:
    """Argument → text, for a class and its bases. Several arguments may share a text: `train_images, test_images:`."""
    texts = {}
    for base in reversed(cls.__mro__):
        _, _, part = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")
        for entry in re.finditer(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", part, re.MULTILINE):
            texts |= dict.fromkeys(entry[1].split(", "), " ".join(entry[2].split()))
    return texts


def description(cls: type) -> str:
    """The docstring of a class up to `Args:`."""
    return inspect.getdoc(cls).partition("\n\nArgs:\n")[0]

"""What a class says of its arguments in the `Args:` part of its docstring: for help texts and messages."""

import inspect
import re


def argument_texts(cls: type) -> dict[str, str]:
    """Argument → text, of a class and its bases. Several arguments may share one text: `train_images, test_images:`."""
    texts = {}
    for base in reversed(cls.__mro__):
        _, _, part = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")
        for entry in re.finditer(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", part, re.MULTILINE):
            texts |= dict.fromkeys(entry[1].split(", "), " ".join(entry[2].split()))
    return texts


def description(cls: type) -> str:
    """The docstring of a class without what it says of its arguments."""
    return inspect.getdoc(cls).partition("\n\nArgs:\n")[0]

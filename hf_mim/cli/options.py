"""Fields of dataclasses as options of click commands, and what all commands of hf-mim have in common.

An option may be written with dashes or underscores, and as `--name value` or `--name=value`. A switch may also be
`--name` alone. Values stay text here: `pretraining.settings.to_type` gives them their types. `--help` prints the help
even if the rest of the line has mistakes.
"""

import contextlib
import dataclasses
import gc
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from typing import Any, get_args, get_type_hints

import click

from hf_mim import __version__
from hf_mim.cli.errors import Mistake
from hf_mim.docstrings import argument_texts
from hf_mim.pretraining.settings import choices, default_of, suggestion, type_in_words

HELP = {"-h", "--help"}
CONTEXT = {
    "help_option_names": sorted(HELP),
    "max_content_width": 120,
    "token_normalize_func": lambda name: name.replace("-", "_"),
}


def versions() -> str:
    """The versions of hf_mim, torch and transformers, without importing the latter two."""
    beside = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return f"hf-mim {__version__} ({beside})"


class Setting(click.Option):
    """An option that knows its type and its default, for help and messages."""

    def __init__(self, name: str, hint: Any, default: Any = None, text: str = "", section: str = "options", **more):
        super().__init__([f"--{name}"], help=text, **more)
        self.hint, self.shown, self.section = hint, default, section

    def is_alone(self, following: str) -> bool:
        """Whether the option has no value before this word, and so means true. Raises Mistake if it is no switch."""
        if self.hint is bool:
            return following.lower() not in ("true", "false")
        if following.startswith("--") and bool not in get_args(self.hint):
            what = self.metavar or type_in_words(self.hint)
            tells = "text" not in what and len(choices(self.hint)) < 10
            raise Mistake(f"{self.name} needs a value" + (f": {what}" if tells else ""))
        return following.startswith("--")

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """(the name with its default as one would type it, the meaning with the words that are allowed)."""
        default, words = self.shown, choices(self.hint)
        default = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
        default = str(default).lower() if isinstance(default, bool) else default
        left = f"--{self.name}" if default is None else f"--{self.name} {default}"
        return left, f"{self.help} [{'|'.join(words)}]".lstrip() if words else self.help


def settings_of(
    cls: type, section: str, names: Iterable[str] | None = None, defaults: dict[str, Any] | None = None
) -> list[Setting]:
    """A `Setting` for each field of a dataclass.

    Args:
        names: only these fields, in this order.
        defaults: defaults that differ from those of the class.

    The text comes from `Args:` in the docstring, or from `metadata["help"]` of the field in transformers' classes.
    """
    texts, fields = argument_texts(cls), {field.name: field for field in dataclasses.fields(cls)}
    chosen = list(fields.values()) if names is None else [fields[name] for name in names]
    hints = get_type_hints(cls) if any(isinstance(field.type, str) for field in chosen) else {}
    settings = []
    for field in chosen:
        default = (defaults or {}).get(field.name, default_of(field))
        text = texts.get(field.name) or field.metadata.get("help", "")
        settings.append(Setting(field.name, hints.get(field.name, field.type), default, text, section))
    return settings


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no garbage. Imports make objects that stay, and looking through them costs a seventh."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Command(click.Command):
    """`NAME WORD ... --option value ...`: calls `run(*words, **values)` with the given values, as text.

    Args:
        words: the arguments that are no options, such as ("SOURCE", "DEST").
        settings: makes the options. It is called only when they are needed, because its imports are slow.
    """

    complaint = "{command} has no option {name}"

    def __init__(self, name: str, run: Callable, words: tuple[str, ...], settings: Callable, text: str, **more):
        given = click.Argument(["words"], nargs=-1, metavar=" ".join(words))
        super().__init__(name, CONTEXT, run, [given], help=text, options_metavar="[--option value ...]", **more)
        self.words, self._make_settings = words, settings

    @cached_property
    def settings(self) -> list[Setting]:
        """All options, as the help shows them: an argument of several methods is there once for each default."""
        with uncollected():
            return self._make_settings()

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), *{setting.name: setting for setting in self.settings}.values()]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter):
        self.format_settings(ctx, formatter, self.settings)

    def format_settings(self, ctx: click.Context, formatter: click.HelpFormatter, shown: list[Setting]):
        for title, settings in groupby(shown, key=lambda setting: setting.section):
            with formatter.section(title):
                formatter.write_dl([setting.get_help_record(ctx) for setting in settings], col_max=38)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        vars(self).pop("settings", None)  # a method may have been registered since the last call
        if HELP & set(args) or (self.no_args_is_help and not args):
            click.echo(self.get_help(ctx))
            ctx.exit()
        try:
            super().parse_args(ctx, list(self._spelled_out(args)))
        except click.NoSuchOption as error:
            raise Mistake(self.unknown(error.option_name, args)) from None
        ctx.args = list(map(os.path.expanduser, ctx.params.pop("words")))
        self.check_words(ctx.command_path.removeprefix("hf-mim "), ctx.args)
        # A shell expands ~ in `--name ~/x`, but not in `--name=~/x`.
        ctx.params = {
            name: os.path.expanduser(value) if isinstance(value, str) else value
            for name, value in ctx.params.items()
            if value is not None
        }
        return ctx.args

    def _spelled_out(self, args: list[str]) -> Iterator[str]:
        """A switch without a value gets `=true`, because click would take the next word for its value."""
        settings = {setting.name: setting for setting in self.settings}
        for word, following in zip(args, [*args[1:], "--"], strict=False):
            setting = settings.get(word[2:].replace("-", "_")) if word.startswith("--") else None
            is_alone = setting is not None and setting.is_alone(following)
            if is_alone and not following.startswith("-") and not self.may_be_word(following):
                raise Mistake(f"{setting.name} must be true or false, not {following!r}")
            yield f"{word}=true" if is_alone else word

    def may_be_word(self, word: str) -> bool:
        """Whether a word after a switch can be one of `words`, and no wrong value of the switch."""
        return True

    def check_words(self, path: str, words: list[str]):
        """Raise Mistake if there are more or fewer words than the command needs."""
        if len(words) != len(self.words):
            needed = " and ".join(self.words) if len(self.words) > 1 else f"one {self.words[0]}"
            raise Mistake(f"{path} needs {needed}, not {' and '.join(words) or 'none'}")

    def unknown(self, option: str, args: list[str]) -> str:
        """The message about an unknown option."""
        if not option.startswith("--"):  # click gives only its first letter
            option = next((word for word in args if word.startswith(option)), option)
        name, known = option.lstrip("-") or option, [setting.name for setting in self.settings if not setting.hidden]
        hint = suggestion(name, known)
        if not hint and len(known) < 5:
            hint = f"; there is {' and '.join(known) or 'none'}"
        return self.complaint.format(command=self.name, name=name) + hint

    def read(self, arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
        """The words and the values of a command line. Raises `Mistake`, which is a ValueError."""
        ctx = self.make_context(self.name, list(arguments))
        return ctx.args, ctx.params

    def invoke(self, ctx: click.Context) -> Any:
        return self.callback(*ctx.args, **ctx.params)


class Menu(click.Group):
    """A choice of commands. `refuse(word)` is the message about a word that is none of them."""

    def __init__(self, name: str, refuse: Callable[[str], str], text: str, **more):
        super().__init__(name, context_settings=CONTEXT, help=inspect.cleandoc(text), options_metavar="", **more)
        self.refuse = refuse

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            args = ["--help"]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise Mistake(self.refuse(error.option_name)) from None

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0].replace("-", "_")
        command = self.get_command(ctx, name)
        if command is None:
            raise Mistake(self.refuse(args[0]))
        return name, command, args[1:]

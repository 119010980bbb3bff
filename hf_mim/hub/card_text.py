"""How a model card shows values from files: without paths of the machine, and without breaking the Markdown."""

import re

from hf_mim.evaluation.result import format_number

# Matches addresses, and the folders of paths that begin at a root, a home or the working directory. A folder's name may
# have spaces.
LOCATION = re.compile(
    r"""(?P<address>\w+://\S*[^\s,.;:)'"])"""
    r"""|(?<![\w.~/\\)\]])(?:~\w*/|\.{1,2}/|/|[A-Za-z]:[/\\]|\\\\)"""
    r"""(?:(?:\S|\ (?=[^\s/\\]+[/\\]))*[/\\])?(?=[^\s/\\])"""
)


def shown(value) -> str:
    """A value as text that can stand anywhere in the card: scrubbed, on one line, its Markdown escaped."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{shown(name)} {shown(x)}" for name, x in value.items())
    text = f"{value:.6g}" if isinstance(value, float) else "none" if value is None else scrubbed(value)
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def shown_number(value) -> str:
    """`shown`, after `format_number`."""
    return shown(format_number(value))


def scrubbed(value) -> str:
    """A text as readers may see it: paths on this machine without their folders, addresses without query and user.

    A name like `owner/name` stays, because results have only the last part of local paths.
    """

    def clean(match: re.Match) -> str:
        address = match["address"]
        if address is None:
            return ""
        if address.startswith("file:"):
            return last_name(address)
        return re.sub(r"[?#].*", "", re.sub(r"//[^/]*@", "//", address))

    return LOCATION.sub(clean, str(value))


def scrubbed_all(value):
    """The value with all texts `scrubbed`, also those in lists and mappings."""
    if isinstance(value, dict):
        return {name: scrubbed_all(x) for name, x in value.items()}
    if isinstance(value, list):
        return [scrubbed_all(x) for x in value]
    return scrubbed(value) if isinstance(value, str) else value


def last_name(path) -> str:
    """The last part of a path, with slashes or backslashes."""
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1]


def is_hub_name(source: str) -> bool:
    """Whether it has the form `owner/name` or `owner/name:config`. A path may have this form too."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", str(source)))


def markdown_table(rows: list[dict[str, str]]) -> str:
    """A table of cells that went through `shown`; "" for no rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if columns else ""

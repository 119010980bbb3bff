"""How values of files are shown in a model card: with nothing of the machine and nothing that breaks its Markdown."""

import re

from hf_mim.evaluation.result import format_number

# Addresses, and the folders of paths that begin at a root, a home or the working directory; spaces are in names only.
LOCATION = re.compile(
    r"""(?P<address>\w+://\S*[^\s,.;:)'"])"""
    r"""|(?<![\w.~/\\)\]])(?:~\w*/|\.{1,2}/|/|[A-Za-z]:[/\\]|\\\\)"""
    r"""(?:(?:\S|\ (?=[^\s/\\]+[/\\]))*[/\\])?(?=[^\s/\\])"""
)


def shown(value) -> str:
    """A value as text of the card that can stand anywhere in it: scrubbed, on one line, without marks of its own."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{shown(name)} {shown(x)}" for name, x in value.items())
    text = f"{value:.6g}" if isinstance(value, float) else "none" if value is None else scrubbed(value)
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def shown_number(value) -> str:
    """As `format_number`, and as `shown`."""
    return shown(format_number(value))


def scrubbed(value) -> str:
    """A text as its readers may see it: of paths on this machine the last part, of addresses no query and no user.

    A name like `owner/name` stays: results name what is local by the last part of its path.
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
    """`scrubbed`, of all texts in lists and mappings."""
    if isinstance(value, dict):
        return {name: scrubbed_all(x) for name, x in value.items()}
    if isinstance(value, list):
        return [scrubbed_all(x) for x in value]
    return scrubbed(value) if isinstance(value, str) else value


def last_name(path) -> str:
    """Of a path, with either slash."""
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1]


def is_hub_name(source: str) -> bool:
    """Whether it has the form `owner/name`, perhaps with `:config`; a path may have it too."""
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(:[\w.-]+)?", str(source)))


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Of cells that are `shown`; empty for none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if columns else ""

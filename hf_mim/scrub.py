"""What may leave this machine: texts without folders, addresses without queries, no tokens.

Every file that is written for others goes through `scrubbed` or `scrubbed_all`: results, recipes, cards, records of
conversions, pickled arguments. A file that needs an absolute path has a name with a leading _ and is never uploaded.
"""

import os
import re
from pathlib import Path
from typing import Any

# Matches addresses, and the folders of paths that begin at a root, a home or the working directory. A folder's name may
# have spaces.
LOCATION = re.compile(
    r"""(?P<address>\w+://\S*[^\s,.;:)'"])"""
    r"""|(?<![\w.~/\\)\]])(?:~\w*/|\.{1,2}/|/|[A-Za-z]:[/\\]|\\\\)"""
    r"""(?:(?:\S|\ (?=[^\s/\\]+[/\\]))*[/\\])?(?=[^\s/\\])"""
)
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{10,}")  # of the Hub
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY")
SHORTEST_SECRET = 8  # a shorter value of such a variable may be an ordinary word
HIDDEN = "***"


def scrubbed(value) -> str:
    """A text as readers may see it: paths on this machine without their folders, addresses without query and user,
    *** for tokens.

    A name like `owner/name` stays, because results have only the last part of local paths.
    """

    def clean(match: re.Match) -> str:
        address = match["address"]
        if address is None:
            return ""
        if address.startswith("file:"):
            return last_name(address)
        return re.sub(r"[?#].*", "", re.sub(r"//[^/]*@", "//", address))

    text = TOKEN.sub(HIDDEN, str(value))
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    return LOCATION.sub(clean, text)


def scrubbed_all(value: Any) -> Any:
    """The value with all texts `scrubbed`, also those in lists, tuples and mappings, and names of mappings."""
    if isinstance(value, dict):
        return {scrubbed(name) if isinstance(name, str) else name: scrubbed_all(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(scrubbed_all, value)) if type(value) in (list, tuple) else value
    return scrubbed(value) if isinstance(value, str | Path) else value


def last_name(path) -> str:
    """The last part of a path, with slashes or backslashes."""
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1]


def public_source(source: str) -> str:
    """A local source as a recipe may name it: as given, or only its last name if that tells of this machine's folders
    or of its user."""
    told = scrubbed(source)
    home = Path(os.environ.get("HOME") or "/").name
    user = {name for name in (home, os.environ.get("USER"), os.environ.get("LOGNAME")) if name}
    return last_name(source) if told != source or user & set(Path(source).parts[:-1]) else source


def _secrets() -> list[str]:
    """The values of variables of the environment that hold tokens or passwords."""
    found = (value for name, value in os.environ.items() if SECRET_VARIABLE.search(name.upper()))
    return [value for value in found if len(value) >= SHORTEST_SECRET]

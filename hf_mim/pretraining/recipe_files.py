"""The recipes that come with hf_mim: they are called by their names, wherever it is installed."""

import os
from dataclasses import dataclass
from pathlib import Path

from hf_mim.methods import RECIPES
from hf_mim.pretraining.settings import suggestion


@dataclass
class RecipeFile:
    """A recipe of the package: its name, its first sentence, and what was measured with it; None if nothing was."""

    name: str
    about: str
    measured: str | None


def recipe_names() -> list[str]:
    """The names of the recipes that come with hf_mim."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_path(given: str | os.PathLike) -> Path:
    """A recipe file: that of a path, or that of the package with this name. A folder hides no recipe: runs are often
    called as their recipes.

    Raises ValueError if there is neither.
    """
    path, names = Path(given).expanduser(), recipe_names()
    is_named = str(given) in names and not path.is_file()
    if not is_named and (path.exists() or path.suffix.lower() in (".yaml", ".yml") or path.name != str(given)):
        return path
    if str(given) not in names:
        hint = suggestion(str(given), names) or "; hf-mim recipes lists the names"
        raise ValueError(f"recipe must be a YAML file, or the name of a recipe of hf_mim, not {given!r}{hint}")
    return RECIPES / f"{given}.yaml"


def recipe_files() -> list[RecipeFile]:
    """All recipes of the package, by name. What is told of them stands in the comment at the top of each file."""
    return [_read(RECIPES / f"{name}.yaml") for name in recipe_names()]


def _read(path: Path) -> RecipeFile:
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    paragraphs = [""]
    for line in (line.removeprefix("#").strip() for line in lines[:end]):
        if not line or line.startswith(("Measured", "Published")):
            paragraphs.append("")
        paragraphs[-1] = f"{paragraphs[-1]} {line}".strip()
    measured = next((text for text in paragraphs if text.startswith("Measured")), None)
    return RecipeFile(path.stem, paragraphs[0], measured)

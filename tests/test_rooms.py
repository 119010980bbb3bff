"""Who may import whom, and who knows the names of a run folder's files."""

import ast
from pathlib import Path

import pytest

from hf_mim import run_folder

PACKAGE = Path(run_folder.__file__).parent
# Each room imports from its own floor and from those below.
FLOORS = {
    "models": 0,
    **dict.fromkeys(("methods", "data", "files", "scrub", "checks", "lock", "progress", "memory", "trainer_utils"), 1),
    "evaluation": 2,
    **dict.fromkeys(("run_folder", "visualize", "hub", "comparison", "embeddings"), 3),
    **dict.fromkeys(("runs", "companions", "classification"), 3),
    **dict.fromkeys(("pretraining", "planning", "benchmark", "front_door", "demo", "report"), 4),
    "cli": 5,
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """The rooms of hf_mim that a file imports, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            rooms |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            rooms |= {f"{node.module}.{name.name}" for name in node.names}
    return {name.split(".")[1] for name in rooms if name.startswith("hf_mim.")}


@pytest.mark.parametrize("room", FLOORS)
def test_no_room_imports_from_a_floor_above(room):
    files = [path for path in PACKAGE.rglob("*.py") if room_of(path) == room]
    for path in files:
        above = {other for other in imported(path) if FLOORS.get(other, 0) > FLOORS[room]}
        assert not above, f"{path.relative_to(PACKAGE)} imports {above}"


def test_models_import_nothing_of_the_package_but_each_other():
    for path in (PACKAGE / "models").glob("*.py"):
        assert not imported(path), path.name


def test_only_run_folder_knows_the_names_of_its_files():
    names = [value for name, value in vars(run_folder).items() if name.isupper() and isinstance(value, str)]
    names = [name for name in names if "." in name]
    assert {"recipe.yaml", "loss.png", "metrics.jsonl", "manifest.json"} <= set(names)
    # A checkpoint's config and a card are files of the Hub, and Trainer's state of transformers, wherever they are.
    names = sorted(set(names) - {"config.json", "README.md", "trainer_state.json"})
    for path in PACKAGE.rglob("*.py"):
        constants = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        if path.name != "run_folder.py":
            assert not constants & set(names), path

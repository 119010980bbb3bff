"""`hf_mim/models` can be copied into a checkpoint, and each paper can be read by itself."""

import ast
import sys
from pathlib import Path

import pytest

import hf_mim.models

FILES = sorted(Path(hf_mim.models.__file__).parent.glob("*.py"))
PREFIXES = ("configuration_", "modeling_")


def imports(path: Path) -> list[tuple[int, str]]:
    """Level and module of each import: 0 is absolute, 1 from the same folder."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
    return found


def paper(name: str) -> str | None:
    """The paper that a file of this name implements; None for a file that the papers share."""
    method = next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), "vit")
    return None if method == "vit" else method


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_shared_files_and_those_of_its_own_paper(path):
    others = {paper(module) for level, module in imports(path) if level} - {None}
    assert others <= {paper(path.stem)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_only_what_remote_code_can_have(path):
    allowed = {"torch", "transformers", "huggingface_hub", "numpy", "PIL"} | sys.stdlib_module_names
    for level, module in imports(path):
        assert level == 1 and module and "." not in module or level == 0 and module.split(".")[0] in allowed, module

"""Type checkers know what users import."""

import ast
import fnmatch
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import hf_mim

REPOSITORY = Path(__file__).parents[1]
SNIPPET = """
import hf_mim

reveal_type(hf_mim.pretrain("digits"))
reveal_type(hf_mim.MAEModel(hf_mim.MAEConfig()).config)
hf_mim.evaluate(1, "runs/mine")
hf_mim.pretrian("digits")
"""


def test_type_checkers_see_the_names_that_are_loaded_when_they_are_used():
    (block,) = (
        node
        for node in ast.parse(Path(hf_mim.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == hf_mim._MODULES


def test_every_module_that_users_import_is_checked_in_full():
    public, _ = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    assert public["disallow_untyped_defs"]
    imported = {getattr(hf_mim, name).__module__ for name in hf_mim.__all__}
    for page in ("python", "new_method"):
        text = (REPOSITORY / "docs" / f"{page}.md").read_text()
        imported |= set(re.findall(r"^from (hf_mim[\w.]*) import", text, re.M))
    for module in imported:
        assert any(fnmatch.fnmatch(module, pattern) for pattern in public["module"]), module


@pytest.mark.slow
def test_a_program_that_uses_an_installed_hf_mim_is_checked_against_its_types(tmp_path):
    """`py.typed` is what makes mypy read an installed package."""
    venv.create(tmp_path / "venv", symlinks=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    (packages / "hf_mim").symlink_to(Path(hf_mim.__file__).parent)
    (tmp_path / "program.py").write_text(SNIPPET)
    python = tmp_path / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "program.py"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert 'program.py:4: note: Revealed type is "hf_mim.runs.Run"' in told
    assert 'program.py:5: note: Revealed type is "hf_mim.models.configuration_vit.MIMConfig"' in told
    assert 'program.py:6: error: Argument 1 to "evaluate" has incompatible type "int"; expected "str"' in told
    assert 'program.py:7: error: Module has no attribute "pretrian"' in told
    assert told.endswith("Found 2 errors in 1 file (checked 1 source file)\n")

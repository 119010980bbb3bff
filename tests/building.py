"""Builds the sdist and the wheel as `python -m build` does, but without a network."""

import subprocess
import sys
import tarfile
from pathlib import Path
from shutil import copy2

import pytest

REPOSITORY = Path(__file__).parents[1]
BACKEND = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


def repository_files() -> set[str]:
    """The paths of all files of the repository, also of those that are not committed yet."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("needs the git repository, which knows its files")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if (REPOSITORY / name).is_file()}


def build(folder: Path):
    """Fill a folder with the sdist, made of a copy of the repository, and with the wheel, made of the sdist.

    The sdist is also there unpacked, as `unpacked/hf_mim-VERSION`.
    """
    for name in repository_files():
        copy = folder / "repository" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy2(REPOSITORY / name, copy, follow_symlinks=False)
    _run_backend("build_sdist", folder / "repository", folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    _run_backend("build_wheel", unpacked, folder)


def _run_backend(what: str, source: Path, folder: Path):
    done = subprocess.run([sys.executable, "-c", BACKEND, what, folder], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def path_to_this_environment() -> str:
    """The content of a .pth file through which another environment imports what is installed in this one.

    It does not run the .pth files here, so an editable installation of hf_mim stays unseen.
    """
    return "\n".join(path for path in sys.path if path.endswith("site-packages"))

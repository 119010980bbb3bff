"""What the tests of embeddings share."""

from pathlib import Path

import pytest
from pictures import scenes, tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("embedded") / "mae")


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A folder `photos` of 40 pictures in the current folder, in two class folders."""
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return scenes(tmp_path / "photos", 40)

"""What the tests of the Hub share."""

import shutil

import pytest
from minihub import MiniHub


@pytest.fixture(scope="module")
def hub():
    hub = MiniHub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def models():
    from exported import CASES, filled

    return {name: filled(make()) for name, (make, _) in CASES.items()}


@pytest.fixture(scope="module")
def root(models, once):
    """Every case as a checkpoint `NAME/ours`, and its exports `NAME/FORM`."""
    from exported import write_exports

    return once("exports", lambda root: write_exports(models, root))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    from card_folders import make_folder

    return make_folder(tmp_path_factory.mktemp("cards") / "photos_mae")


@pytest.fixture
def folder(original, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(original, tmp_path / original.name)

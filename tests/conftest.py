"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from two_ranks import launch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count()))  # the tensors here are small: more threads only wait for each other

SHARED_DATA = Path(os.environ.get("HF_MIM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images; tests that need it are skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real images in {SHARED_DATA}; set HF_MIM_TEST_DATA")
    return SHARED_DATA


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory) -> Path:
    """The folder where two ranks have left what the tests compare. All workers of pytest-xdist share one launch."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "two_ranks"
    with FileLock(base / "two_ranks.lock"):
        if not folder.is_dir():
            (begun := base / "two_ranks_begun").mkdir()
            launch(begun, "test_distributed", "test_sharded")
            begun.rename(folder)
    return folder

"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count()))  # the tensors here are small: more threads only wait for each other

SHARED_DATA = Path(os.environ.get("HF_MIM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images; tests that need it are skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real images in {SHARED_DATA}; set HF_MIM_TEST_DATA")
    return SHARED_DATA

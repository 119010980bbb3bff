"""What all tests share."""

import gc
import importlib
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from two_ranks import launch

if "OMP_NUM_THREADS" not in os.environ:  # as in the Makefile: here and in the processes that tests start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background, where Ctrl+C is for others
    signal.signal(signal.SIGINT, signal.default_int_handler)

drawing = SimpleNamespace(allowed=False)
SHARED_DATA = Path(os.environ.get("HF_MIM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_finish():
    """Keep the garbage collector off the libraries. Each start of a Trainer runs it over everything: half a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Runs draw their pictures, which take longer than the training of a test, only where a test is marked so."""
    drawing.allowed = item.get_closest_marker("pictures") is not None


@pytest.fixture(scope="session", autouse=True)
def drawing_where_marked():
    from hf_mim.pretraining.pictures import RunPictures

    draw = RunPictures.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunPictures, "draw", lambda *words: draw(*words) if drawing.allowed else None)
        yield


@pytest.fixture(scope="session", autouse=True)
def short_runs():
    """Runs in this process start no worker processes by themselves and measure the health of few images: both take
    longer than the few steps of a test."""
    from hf_mim.pretraining import final_results, recipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipe.DEFAULTS, "dataloader_num_workers", 0)
        patch.setattr(final_results, "HEALTH_IMAGES", 64)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real images; tests that need it are skipped where it is missing."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the real images in {SHARED_DATA}; set HF_MIM_TEST_DATA")
    return SHARED_DATA


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, fill) -> a folder that `fill(folder)` has filled, in whichever worker of pytest-xdist came first."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make(name, fill) -> Path:
        folder = base / name
        with FileLock(base / f"{name}.lock"):
            if not folder.is_dir():
                begun = tmp_path_factory.mktemp(name)
                fill(begun)
                begun.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def two_ranks(once) -> Path:
    """The folder where two ranks have left what the tests compare."""
    return once("two_ranks", lambda folder: launch(folder, "test_distributed", "test_sharded"))


@pytest.fixture(scope="session")
def scripts():
    """The modules of training/compare.py, by the ends of their names."""
    sys.path.insert(0, training := str(Path(__file__).parents[1] / "training"))
    names = "compare", "compare_plan", "compare_jobs", "compare_report", "compare_run"
    yield SimpleNamespace(**{name.rpartition("_")[2]: importlib.import_module(name) for name in names})
    sys.path.remove(training)

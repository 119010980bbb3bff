import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What datasets prepares goes to a folder of this run; nothing asks the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture
def picture():
    """picture(width, height, seed) -> a smooth RGB image without symmetry, so that a wrong flip or shift shows."""

    def make(width=64, height=48, seed=0):
        noise = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)

    return make

"""A comparison of a few steps, for the tests of `training/compare.py`."""

import copy
from pathlib import Path

import yaml

TRAINING = Path(__file__).parents[1] / "training"
FEW = {"train_images": 100, "test_images": 50}
TINY = {
    "dataset": "digits",
    "images": 100,
    "points": 2,
    "settings": {
        **{"image_size": 32, "patch_size": 8, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "crop_scale": [0.3, 1.0], "flip_probability": 0.0, "knn": False},
        **{"per_device_train_batch_size": 16, "dataloader_num_workers": 0, "use_cpu": True, "probe_images": 40},
        **{"image_mean": [0.3], "image_std": [0.3]},
    },
    "runs": {"MAE": {"method": "mae"}},
    "evaluate": {"20-NN": {"protocol": "knn", **FEW}},
    "supervised": {"batch_size": 32, **FEW},
}


def changed(**changes) -> dict:
    """TINY with changes; those of a mapping are made inside it, and None takes a name out of it."""
    found = copy.deepcopy(TINY)
    for name, value in changes.items():
        found[name] = found.get(name, {}) | value if isinstance(value, dict) else value
        if isinstance(value, dict):
            found[name] = {key: own for key, own in found[name].items() if own is not None}
    return found


def write(folder, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(changed(**changes), sort_keys=False))
    return path


def read(scripts, folder, **changes):
    return scripts.plan.Comparison.read(write(folder, **changes), {})

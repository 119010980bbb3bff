"""The first losses of a tiny fixed-seed run of each method, written to and read from `losses.json`.

    python tests/golden/losses.py    # writes them anew

A change that only moves code or only makes it faster leaves them as they are. Write them anew only when the numbers of
a run are meant to change, and say why in the commit.
"""

import json
import tempfile
from pathlib import Path

from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.run import Pretraining

FILE = Path(__file__).with_name("losses.json")
STEPS = 30
SMALL = {
    "dataset": "digits",
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "per_device_train_batch_size": 16,
    "max_steps": STEPS,
    "base_lr": 1.6e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "flip_probability": 0.5,
    "use_cpu": True,
    "disable_tqdm": True,
    "knn": False,
    "seed": 3,
}
RUNS = {
    "mae": {"method": "mae", "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2},
    "latent_mim": {"method": "latent_mim", "patch_gap": 1, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2},
    "stop_jepa": {"method": "stop_jepa", "predictor_hidden_size": 48, "predictor_num_hidden_layers": 2},
    "ijepa": {
        "method": "stop_jepa",
        "position_noise_std": 0.0,
        "predictor_hidden_size": 48,
        "predictor_num_hidden_layers": 2,
    },
    "sym_mim": {"method": "sym_mim", "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2},
    "interactive_mim": {"method": "interactive_mim", "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1},
}


def losses(name: str) -> list[float]:
    """One loss for each of the first `STEPS` steps of `RUNS[name]`: data, crops, masks, optimizer, schedule, target."""
    with tempfile.TemporaryDirectory() as folder:
        run = Pretraining(Recipe.resolve(SMALL | RUNS[name] | {"output_dir": folder}))
        run.trainer.train()
        return [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: losses(name) for name in RUNS}, indent=1) + "\n")

"""Runs of a few seconds."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_mim.cli import main, pretrain
from hf_mim.pretraining.recipe import Recipe

SMALL = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --per_device_train_batch_size 32 --use_cpu".split()
)
TINY_RUN = [*SMALL, "--max_steps", "4", "--knn_train_images", "200", "--knn_test_images", "100"]
REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


def run(*arguments):
    assert main(["pretrain", *map(str, arguments)]) == 0


def same_weights(a, b):
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_recipe(arguments) -> Recipe:
    """The recipe that a command line asks for."""
    words, values = pretrain.command.read(arguments)
    return Recipe.read(words[0] if words else None, values)


def photos(folder, seed=0, count=24):
    random = np.random.default_rng(seed)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


def evaluate(protocol, run, *words) -> int:
    """Without the measurements beside, which would take three times as long."""
    beside = ["--beside", "false"] if protocol in ("knn", "leave_one_out", "linear", "attentive", "lowshot") else []
    return main(["evaluate", protocol, str(run), *map(str, words), *beside])

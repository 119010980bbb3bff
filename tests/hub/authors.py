"""The parity fixtures as the files that the authors save."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

FIXTURES = Path(__file__).parents[1] / "fixtures"


def read(name):
    """(configuration, tensors, weights under the authors' names) of a fixture."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads(file.metadata()["config"])
    return config, tensors, {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}


def with_module(state):
    return {f"module.{key}": value for key, value in state.items()}


def optimizer_state(state):
    """What AdamW saves: tensors, and lists of numbers."""
    moments = {i: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(x)} for i, x in enumerate(state.values())}
    return {"state": moments, "param_groups": [{"lr": np.float64(1e-3), "betas": (0.9, 0.95), "params": [0, 1]}]}


def save_mae(path, state, **arguments):
    """`{"model", "optimizer", "epoch", "scaler", "args"}`."""
    args = argparse.Namespace(model="mae_vit_base_patch16", lr=1e-3, output_dir="./out", device="cuda", **arguments)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
    held = {"model": state, "optimizer": optimizer_state(state), "epoch": 399, "scaler": scaler, "args": args}
    torch.save(held, path)
    return path


def save_jepa(path, state, prefix=True):
    """`{"encoder", "predictor", "target_encoder", "opt", …}`, with or without DistributedDataParallel's prefix."""
    networks = {}
    for key, value in state.items():
        network, _, name = key.partition(".")
        networks.setdefault(network, {})[f"module.{name}" if prefix else name] = value
    held = {"opt": optimizer_state(state), "scaler": None, "epoch": 300, "loss": 0.21, "batch_size": 128}
    torch.save(networks | held | {"world_size": 16, "lr": 1e-3}, path)
    return path


def save_latent_mim(path, state):
    """`{"state_dict", "optimizer", "loss_scaler", "epoch"}`."""
    held = {"state_dict": with_module(state), "optimizer": optimizer_state(state), "loss_scaler": {"scale": 1.0}}
    torch.save(held | {"epoch": 800}, path)
    return path


def classifier_state(kind):
    """One of the three classifiers that MAE publishes: "mean", "cls", "linear_probe"."""
    _, _, state = read("mae_classifiers")
    others = {"mean": ("norm.", "head.0"), "cls": ("fc_norm.", "head.0"), "linear_probe": ("fc_norm.",)}[kind]
    state = {key: value for key, value in state.items() if not key.startswith(others)}
    if kind == "linear_probe":
        state = {key.replace("head.w", "head.1.w").replace("head.b", "head.1.b"): x for key, x in state.items()}
    return state

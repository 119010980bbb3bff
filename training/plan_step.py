"""What a training step of a model holds and computes, found by running it on tensors without memory.

Nothing here is a formula that could fall behind the models: parameters are those of the model, activations are what
autograd saves in its forward pass, FLOPs are counted. `plan.py` makes memory, traffic and time of them.
"""

import copy
import dataclasses
import math

import torch
from benchmark_step import flops_per_image
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForPreTraining
from transformers.modeling_layers import GradientCheckpointingLayer

import hf_mim  # noqa: F401 (registers the models)
from hf_mim.models.masking import sample_multi_block

MASK_DRAWS = 300


@dataclasses.dataclass
class Parameters:
    """Numbers of parameters; `...layers` are those in transformer layers, which FSDP2 gathers one layer at a time."""

    trained: int
    target: int
    buffers: int
    trained_layers: int
    target_layers: int
    largest_layer: int

    @classmethod
    def count(cls, model) -> "Parameters":
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        trains = [next(layer.parameters()).requires_grad for layer in layers]
        return cls(
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            target=sum(p.numel() for p in model.parameters() if not p.requires_grad),
            buffers=sum(b.numel() for b in model.buffers()),
            trained_layers=sum(size for size, does in zip(sizes, trains, strict=True) if does),
            target_layers=sum(size for size, does in zip(sizes, trains, strict=True) if not does),
            largest_layer=max(sizes),
        )


def shard_numel(parameters, devices: int) -> int:
    """How many numbers the first of `devices` holds when FSDP2 has divided each tensor by its first dimension."""
    return sum(math.ceil(p.shape[0] / devices) * (p.numel() // p.shape[0]) for p in parameters)


@dataclasses.dataclass
class Activations:
    """Bytes that autograd holds between forward and backward, beside the parameters."""

    per_image: float
    fixed: int  # whatever the batch: above all the bfloat16 copies of the weights, which autocast keeps to its end
    recomputed_per_image: float  # of the largest layer: with activation checkpointing, held while it is run again
    per_token_and_layer: float  # of the second encoder layer


@dataclasses.dataclass
class Step:
    """All that `plan.py` has to know of a model."""

    parameters: Parameters
    shards: dict[str, int]  # numbers on one device under FSDP2: trained, target
    ddp: Activations
    fsdp: Activations
    forward_flops: float
    backward_flops: float
    encoder_tokens: int  # of one image in the trained encoder


def examine(config, batch_size: int, devices: int, bf16: bool = True, checkpointing: bool = False) -> Step:
    """Run a forward and backward pass of the pretraining model of `config` on fake tensors.

    `batch_size`, that of one device, decides how large StoP's contexts are: memory is that of the largest of 300 drawn
    masks, FLOPs those of the mean. A recomputed forward counts with the backward.
    """
    config = copy.deepcopy(config)  # counting FLOPs changes it
    mean_ids, largest_ids = mask_lengths(config, batch_size)
    with torch.device("meta"):
        model = AutoModelForPreTraining.from_config(config)
    for target, _ in model.target_pairs() if hasattr(model, "target_pairs") else ():
        target.requires_grad_(False)  # as initialisation does, which the meta device skips
    model.train()
    groups = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.requires_grad].append(parameter)
    shards = {"trained": shard_numel(groups[True], devices), "target": shard_numel(groups[False], devices)}
    parameters = Parameters.count(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        ddp = activations(model, largest_ids, bf16, checkpointing)
        if bf16:  # FSDP2 gathers weights in bfloat16, so the residual stream is bfloat16 too
            half = {p: torch.nn.Parameter(p.detach().bfloat16(), p.requires_grad) for p in model.parameters()}
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, half[parameter])
        fsdp = activations(model, largest_ids, bf16, checkpointing)
        forward, backward = flops_per_image(model, *batch(config, 2, mean_ids))
    visible = mean_ids[0] if mean_ids else config.num_visible(config.grid_size)
    backward += backward / 2 if checkpointing else 0
    tokens = visible + config.num_prefix_tokens
    return Step(parameters, shards, ddp, fsdp, forward, backward, tokens)


def mask_lengths(config, batch_size: int) -> tuple[tuple[int, int], tuple[int, int]] | tuple[None, None]:
    """StoP's patches in the context and in one target block: on average, and where they are most together."""
    if config.model_type != "stop_jepa":
        return None, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = [sample_multi_block(batch_size, config.grid_size, **config.masking) for _ in range(MASK_DRAWS)]
    lengths = [(context.shape[1], targets.shape[2]) for context, targets in draws]
    mean = tuple(round(sum(column) / len(draws)) for column in zip(*lengths, strict=True))
    return mean, max(lengths, key=lambda pair: pair[0] + pair[1] * config.num_targets)


def batch(config, size: int, ids: tuple[int, int] | None) -> list[torch.Tensor]:
    """The arguments of a forward pass."""
    tensors = [torch.empty(size, config.num_channels, *config.training_size)]
    if ids is not None:
        context, target = ids
        tensors.append(torch.zeros(size, context, dtype=torch.int64))
        tensors.append(torch.zeros(size, config.num_targets, target, dtype=torch.int64))
    return tensors


def activations(model, ids, bf16: bool, checkpointing: bool) -> Activations:
    """From two batch sizes to bytes per image and bytes whatever the batch."""
    (total, layers), (larger, larger_layers) = (
        saved_bytes(model, batch(model.config, size, ids), bf16) for size in (2, 4)
    )
    per_image = (larger - total) / 2
    fixed = round(total - 2 * per_image)
    layers = {name: (larger_layers[name] - size) / 2 for name, size in layers.items()}
    recomputed = 0.0
    if checkpointing:
        model.activation_checkpointing_enable()
        (total, _), (larger, _) = (saved_bytes(model, batch(model.config, size, ids), bf16) for size in (2, 4))
        model.activation_checkpointing_disable()
        per_image, recomputed = (larger - total) / 2, max(layers.values())
    tokens = model.config.num_prefix_tokens + (ids[0] if ids else model.config.num_visible(model.config.grid_size))
    second = [size for name, size in layers.items() if name.startswith("encoder.layers.")][:2][-1]
    return Activations(per_image, fixed, recomputed, second / tokens)


def saved_bytes(model, arguments, bf16: bool) -> tuple[int, dict[str, int]]:
    """Bytes that the forward pass saves for backward, each storage once and parameters left out: in all, by layer."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages, by_layer, handles = {}, {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    def total():
        return sum(storage.nbytes() for storage in storages.values())

    for name, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer) and next(layer.parameters()).requires_grad:
            handles.append(layer.register_forward_pre_hook(lambda *_, name=name: by_layer.update({name: -total()})))
            handles.append(
                layer.register_forward_hook(lambda *_, name=name: by_layer.update({name: by_layer[name] + total()}))
            )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            model(*arguments)
    for handle in handles:
        handle.remove()
    return total(), by_layer

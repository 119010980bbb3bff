"""Memory and FLOPs of a model's training step, found by running the step on tensors without memory.

There are no formulas that could become wrong when the models change. Parameters are those of the model, activations
are what autograd saves in the forward pass, and FLOPs are counted. `plan.py` computes memory, traffic and time of them.
"""

import copy
import dataclasses
import math

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForPreTraining
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_mim.testing import counted_flops

MASK_DRAWS = 300
# A plan is for GPUs. Under the name `sdpa`, the blocks would compute attention in float32, because the fake tensors are
# on the CPU.
ANY_DEVICE = "sdpa_of_any_device"
ALL_ATTENTION_FUNCTIONS.register(ANY_DEVICE, ALL_ATTENTION_FUNCTIONS["sdpa"])


@dataclasses.dataclass
class Parameters:
    """Numbers of parameters. `..._layers` count those in transformer layers, which FSDP2 gathers one at a time."""

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
    """How many numbers the first of `devices` holds under FSDP2, which divides each tensor by its first dimension."""
    return sum(math.ceil(p.shape[0] / devices) * (p.numel() // p.shape[0]) for p in parameters)


@dataclasses.dataclass
class Activations:
    """Bytes that autograd holds between forward and backward, without the parameters."""

    per_image: float
    fixed: int  # for any batch: mostly the bfloat16 copies of the weights, which autocast keeps to its end
    recomputed_per_image: float  # with activation checkpointing: the largest layer, held while it runs again
    per_token_and_layer: float  # measured on the second encoder layer


@dataclasses.dataclass
class Step:
    """All that `plan.py` needs to know about a model."""

    parameters: Parameters
    shards: dict[str, int]  # numbers on one device under FSDP2: trained, target
    ddp: Activations
    fsdp: Activations
    forward_flops: float
    backward_flops: float
    encoder_tokens: int  # tokens of one image in the trained encoder


def examine(config, batch_size: int, devices: int, bf16: bool = True, checkpointing: bool = False) -> Step:
    """Run a forward and backward pass of the pretraining model of `config` on fake tensors.

    `batch_size` is that of one device; the size of StoP's contexts depends on it. Memory is planned for the largest of
    300 random masks, FLOPs for the mean. A forward pass that is computed again counts with the backward pass.
    """
    config = copy.deepcopy(config)  # counting FLOPs changes it
    with torch.device("meta"):
        model = AutoModelForPreTraining.from_config(config, attn_implementation=ANY_DEVICE)
    mean_shapes, largest_shapes = mask_shapes(model, batch_size)
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
        ddp = activations(model, largest_shapes, bf16, checkpointing)
        if bf16:  # FSDP2 gathers weights in bfloat16, so the residual stream is bfloat16 too
            half = {p: torch.nn.Parameter(p.detach().bfloat16(), p.requires_grad) for p in model.parameters()}
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, half[parameter])
        fsdp = activations(model, largest_shapes, bf16, checkpointing)
        forward, backward = (flops / 2 for flops in counted_flops(model, *batch(config, 2, mean_shapes)))
    backward += backward / 2 if checkpointing else 0
    tokens = mean_shapes[0][0] * (mean_shapes[0][1] + config.num_prefix_tokens)
    return Step(parameters, shards, ddp, fsdp, forward, backward, tokens)


def mask_shapes(model, batch_size: int) -> tuple[tuple, tuple]:
    """The shapes of one image's context_ids and target_ids: the mean over many draws, and those with the most ids.

    The first number is that of an image's masks, which share one pass of the target encoder.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        asked = batch_size, model.config.grid_size, "meta"
        draws = [model.draw_masks(*asked, **model.training_masks()) for _ in range(MASK_DRAWS)]
    shapes = [
        tuple((len(draw[name]) // batch_size, *draw[name].shape[1:]) for name in ("context_ids", "target_ids"))
        for draw in draws
    ]
    mean = tuple(
        tuple(round(sum(lengths) / len(draws)) for lengths in zip(*shape, strict=True))
        for shape in zip(*shapes, strict=True)
    )
    return mean, max(shapes, key=lambda pair: sum(math.prod(shape) for shape in pair))


def batch(config, size: int, shapes) -> list[torch.Tensor]:
    """The arguments of a forward pass: images, context_ids, target_ids."""
    images = torch.empty(size, config.num_channels, *config.training_size)
    return [images, *(torch.zeros(size * masks, *rest, dtype=torch.int64) for masks, *rest in shapes)]


def activations(model, shapes, bf16: bool, checkpointing: bool) -> Activations:
    """Find the bytes per image, and those that do not depend on the batch, from two batch sizes."""
    (total, layers), (larger, larger_layers) = (
        saved_bytes(model, batch(model.config, size, shapes), bf16) for size in (2, 4)
    )
    per_image = (larger - total) / 2
    fixed = round(total - 2 * per_image)
    layers = {name: (larger_layers[name] - size) / 2 for name, size in layers.items()}
    recomputed = 0.0
    if checkpointing:
        model.activation_checkpointing_enable()
        (total, _), (larger, _) = (saved_bytes(model, batch(model.config, size, shapes), bf16) for size in (2, 4))
        model.activation_checkpointing_disable()
        per_image, recomputed = (larger - total) / 2, max(layers.values())
    tokens = shapes[0][0] * (model.config.num_prefix_tokens + shapes[0][1])
    second = [size for name, size in layers.items() if name.startswith("encoder.layers.")][:2][-1]
    return Activations(per_image, fixed, recomputed, second / tokens)


def saved_bytes(model, arguments, bf16: bool) -> tuple[int, dict[str, int]]:
    """Bytes that the forward pass saves for backward, in all and by layer. A storage counts once, parameters do not."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages, by_layer, handles = {}, {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage  # kept alive, so that no other storage gets its address
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

"""A recipe on many devices: memory, traffic, time and loading, computed from its model without a GPU."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from hf_mim import methods
from hf_mim.models.configuration_vit import SIZES
from hf_mim.planning.step import examine
from hf_mim.pretraining.recipe import Recipe, RunArguments, model_fields
from hf_mim.pretraining.recipe_files import recipe_path
from hf_mim.pretraining.settings import read_yaml
from hf_mim.pretraining.trainer import MIMTrainingArguments

IMAGENET, IMAGENET_IMAGES = "ILSVRC/imagenet-1k", 1_281_167


@dataclass
class Cluster:
    """The devices that the plan is made for, and what it assumes about them.

    Args:
        devices: number of devices, with one process each
        images_per_step: images of an optimizer step; batch per device and accumulation follow from it
        images: images in the dataset; known for ImageNet-1k
        tflops: peak of a device in the recipe's precision; default: H100 SXM, bfloat16, dense
        mfu: share of that peak that a step reaches; the default was not measured
        memory_gib: memory of a device
        devices_per_node: devices of a node
        link_gbps: Gbit/s in one direction, of a device inside its node and between two nodes; default: NVLink 4, and
            one 400 Gbit/s port
        loader_images_per_second: images that one core loads; default: 224-pixel crops of full-size JPEGs on an AMD EPYC
    """

    devices: int = 1
    images_per_step: int | None = None
    images: int | None = None
    tflops: float = 989.0
    mfu: float = 0.35
    memory_gib: float = 80.0
    devices_per_node: int = 8
    link_gbps: tuple[float, float] = (3600.0, 400.0)
    loader_images_per_second: float = 532.9  # docs/benchmarks/data_cpu.json; a test compares the two

    def __post_init__(self):
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not number > 0:
                    raise ValueError(f"{name} must be above 0, not {number:g}")
        if self.mfu > 1:
            raise ValueError(f"mfu is a share of the peak and must be at most 1, not {self.mfu:g}")

    def seconds(self, sent: float) -> float:
        """How long it takes if each device sends these bytes around a ring. The slowest link sets the pace."""
        inside, between = (gbps * 1e9 / 8 for gbps in self.link_gbps)
        return sent / inside if self.devices <= self.devices_per_node else sent / min(inside, between)


def read_model(model: str, settings: dict[str, Any]) -> Recipe:
    """The recipe to plan, with `settings` in place of its own.

    Args:
        model: a recipe file, the name of a recipe of the package, or a size. A size means the ImageNet recipe of the
            method, with the decoder, projector or predictor of that size.

    Raises ValueError for an argument that does not exist, or whose value does not fit.
    """
    if model not in SIZES:
        try:
            path = recipe_path(model)
        except ValueError as error:
            raise ValueError(f"{error}; the sizes are {', '.join(SIZES)}") from None
        return Recipe.resolve(read_yaml(path), settings)
    method = methods.get(settings.get("method", RunArguments.method))
    found = read_yaml(recipe_path(f"imagenet_{method.variant_of or method.name}"))
    sizes = model_fields(method.name).keys() - {"image_size", "patch_size"}
    return Recipe.resolve(
        {name: value for name, value in found.items() if name not in sizes} | {"size": model}, settings
    )


def batches(recipe: Recipe, cluster: Cluster) -> tuple[int, int]:
    """Images per device and pass, and passes per optimizer step."""
    batch = training(recipe, "per_device_train_batch_size")
    if cluster.images_per_step is None:
        return batch, training(recipe, "gradient_accumulation_steps")
    batch = min(batch, cluster.images_per_step // cluster.devices)
    if batch == 0 or cluster.images_per_step % (batch * cluster.devices):
        raise ValueError(
            f"images_per_step {cluster.images_per_step} is no multiple of {batch or 1} images on {cluster.devices} "
            "devices; give another per_device_train_batch_size"
        )
    return batch, cluster.images_per_step // (batch * cluster.devices)


def training(recipe: Recipe, name: str):
    """The value of a training argument: the recipe's, or else its default."""
    return recipe.training.get(name, getattr(MIMTrainingArguments, name))


def steps_of(recipe: Recipe, cluster: Cluster, batch: int, accumulation: int) -> int:
    """Optimizer steps of the run, as Trainer counts them."""
    if (steps := training(recipe, "max_steps")) > 0:
        return steps
    images = cluster.images or (IMAGENET_IMAGES if recipe.run.dataset == IMAGENET else None)
    if images is None:
        raise ValueError(
            f"images must be given: the recipe counts epochs, and the size of {recipe.run.dataset} is not known"
        )
    per_epoch = math.ceil(images // (batch * cluster.devices) / accumulation)
    return math.ceil(training(recipe, "num_train_epochs") * max(1, per_epoch))


def memory(step, batch: int, accumulation: int, devices: int, bf16: bool) -> dict[str, dict[str, float]]:
    """Bytes on one device by kind, without temporaries. Under FSDP2: the first, whose shards are largest."""
    p, half = step.parameters, 2 if bf16 else 4

    def held(activations):
        return activations.fixed + batch * (activations.per_image + activations.recomputed_per_image)

    outside = p.trained + p.target - p.trained_layers - p.target_layers
    ddp = {
        "weights": 4 * (p.trained + p.buffers),
        "target": 4 * p.target,
        "gradients": 4 * p.trained,
        "gradient buckets": 4 * p.trained if devices > 1 else 0,  # DDP copies them into buckets to send
        "AdamW": 8 * p.trained,
        "activations": held(step.ddp),
    }
    fsdp = {
        "weights": 4 * (step.shards["trained"] + p.buffers),
        "target": 4 * step.shards["target"],
        "gradients": 4 * step.shards["trained"],
        # Gathered at one time: two layers (one ahead), all that is outside of layers, and the gradients of a layer and
        # of the rest.
        "gathered": half * (3 * p.largest_layer + outside + p.trained - p.trained_layers),
        "AdamW": 8 * step.shards["trained"],
        "activations": held(step.fsdp),
    }
    if accumulation > 1:  # gradients are reduced in the last pass, and held in full until then
        fsdp["gathered"] += half * p.trained_layers
    return {name: parts | {"total": sum(parts.values())} for name, parts in (("ddp", ddp), ("fsdp2", fsdp))}


def traffic(step, accumulation: int, devices: int, bf16: bool) -> dict[str, dict[str, float]]:
    """Bytes that each device sends in an optimizer step, in the forward passes and in the backward passes.

    In a ring of N devices, gather and reduce-scatter send (N - 1)/N of the bytes, all-reduce sends twice that.
    """
    p, half, share = step.parameters, 2 if bf16 else 4, (devices - 1) / devices
    return {
        "ddp": {"forward": 0.0, "backward": 2 * share * 4 * p.trained},  # float32, in the last pass
        "fsdp2": {
            "forward": share * half * (p.trained + p.target) * accumulation,
            "backward": share * half * (p.trained_layers * accumulation + p.trained),
        },
    }


def times(step, sent: dict, cluster: Cluster, batch: int, accumulation: int) -> dict[str, dict[str, float]]:
    """Seconds of an optimizer step: computing, sending, and the part of sending that computing cannot hide at best.

    DDP sends while the last backward pass computes, FSDP2 in every pass.
    """
    rate = cluster.tflops * 1e12 * cluster.mfu
    forward, backward = (flops * batch / rate for flops in (step.forward_flops, step.backward_flops))
    computing = (forward + backward) * accumulation
    result = {}
    for name, parts in sent.items():
        passes = 1 if name == "ddp" else accumulation
        seconds = {phase: cluster.seconds(amount) for phase, amount in parts.items()}
        shown = max(0.0, seconds["forward"] - passes * forward) + max(0.0, seconds["backward"] - passes * backward)
        result[name] = {
            "computing": computing,
            "sending": sum(seconds.values()),
            "not_hidden": shown,
            "step": computing + shown,
            "images_per_second": batch * accumulation * cluster.devices / (computing + shown),
        }
    return result


def plan(recipe: Recipe, cluster: Cluster) -> dict:
    """All numbers of a recipe on these devices, in bytes, seconds and FLOPs: what `hf-mim plan --json` writes."""
    config, bf16 = recipe.config(), bool(training(recipe, "bf16"))
    batch, accumulation = batches(recipe, cluster)
    steps, per_step = steps_of(recipe, cluster, batch, accumulation), batch * accumulation * cluster.devices
    step = examine(config, batch, cluster.devices, bf16, bool(training(recipe, "activation_checkpointing")))
    sent = traffic(step, accumulation, cluster.devices, bf16)
    time = times(step, sent, cluster, batch, accumulation)
    rate = training(recipe, "learning_rate") or training(recipe, "base_lr") * per_step / 256
    hours = {way: steps * seconds["step"] / 3600 for way, seconds in time.items()}
    loading = max(t["images_per_second"] for t in time.values()) / cluster.devices
    return {
        "method": recipe.run.method,
        "width": config.hidden_size,
        "depth": config.num_hidden_layers,
        "bf16": bf16,
        "cluster": asdict(cluster),
        "step": asdict(step),
        "batch": {"per_device": batch, "accumulation": accumulation, "images": per_step, "learning_rate": rate},
        "memory": memory(step, batch, accumulation, cluster.devices, bf16),
        "traffic": sent,
        "time": time,
        "run": {"steps": steps, "images": steps * per_step, "hours": hours},
        "loading": {"images_per_second": loading, "workers": math.ceil(loading / cluster.loader_images_per_second)},
    }

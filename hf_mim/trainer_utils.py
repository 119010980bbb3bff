"""What pretraining and fine-tuning share of a run by transformers' Trainer: schedules, arguments, seeds, callbacks.

A schedule is a pure function of `progress`, the share of the run that is done, in [0, 1]. It has nothing to save: after
a resume it goes on from the step number alone.
"""

import contextlib
import random
import re

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from hf_mim.data.dataset import MAX_BROKEN, BrokenImagesError, ImageStream, check_broken
from hf_mim.models.target_encoder import cosine, linear


def learning_rate(progress: float, peak: float, start: float = 0.0, final: float = 0.0, warmup: float = 0.0) -> float:
    """Linear from `start` to `peak` over the first `warmup` share of the run, then a half cosine down to `final`.

    All rates in the same unit. MAE: 0 → peak → 0; Latent MIM: peak/4 → peak → peak/4; I-JEPA: 2e-4 → 1e-3 → 1e-6.
    """
    if progress < warmup:
        return linear(start, peak, progress / warmup)
    return cosine(peak, final, (progress - warmup) / (1 - warmup)) if warmup < 1 else peak


def weight_decay(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`, as I-JEPA (arXiv 2301.08243, appendix A: .04 → .4)."""
    return cosine(start, end, progress)


class ProcessArguments(TrainingArguments):
    """What pretraining and fine-tuning take alike: one process for each GPU, and loaders that suit them."""

    @property
    def visible_gpus(self) -> int:
        """Those that this process could use."""
        return super().n_gpu

    @property
    def n_gpu(self) -> int:
        """At most 1: DataParallel passes no masks of unequal length, and would lose which images were mixed."""
        return min(self.visible_gpus, 1)

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step: per-device batch × accumulation × processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def settle_loaders(self):
        """After `__post_init__`: no option that torch refuses or warns of."""
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # torch refuses it
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns that there is nothing to pin for


# Learned tokens and position tables: a decay would pull them to zero, which says nothing about what they fit.
UNDECAYED_NAMES = re.compile(r"(^|\.)(\w+_tokens?|position_embeddings?)(\.|$)")


def decayed_parameters(model: nn.Module) -> list[str]:
    """The names of all matrices but tokens, tables, embeddings; so of neither biases nor norms, which are vectors."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in embeddings and not UNDECAYED_NAMES.search(name)
    ]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """Random numbers from `seed` inside, on the CPU and `device`; outside they go on as if nothing had been drawn."""
    generators = [torch.random] if device.type == "cpu" else [torch.random, torch.get_device_module(device)]
    states = [generator.get_rng_state() for generator in generators]
    torch.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_rng_state(state)


class StepSeeds(TrainerCallback):
    """Random numbers (masks, noise, drop path) from seed, step and rank alone, never from the draws so far.

    So a run that is resumed draws what it would have drawn, and no two ranks draw the same masks.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        key = random.Random(f"{args.seed}/{state.global_step}/{args.process_index}")
        torch.manual_seed(key.getrandbits(63))


class DatasetEpoch(TrainerCallback):
    """Tells the training data which epoch begins, so that its crops can depend on (seed, epoch, index) alone.

    Accelerate does this for streams, but for map-style data only in a single process and until a resume skips batches.
    """

    def __init__(self, train_dataset):
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if has_length(self.train_dataset) and hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(int(state.epoch))

    def on_step_end(self, args, state, control, **kwargs):
        if isinstance(self.train_dataset, ImageStream):  # its passes end at other steps for each worker
            state.epoch = state.global_step / state.max_steps


class BrokenImages(TrainerCallback):
    """Stops the run, at the next log, when more than 1 % of the images cannot be decoded.

    The workers skip them and name each one. Of map-style data each process reads only its share, so they put their
    lists together; of a stream each process judges its own part.
    """

    def __init__(self, train_dataset):
        self.train_dataset = train_dataset

    def on_log(self, args, state, control, **kwargs):
        data = self.train_dataset
        if not hasattr(data, "num_broken"):
            return
        if args.world_size == 1 or not has_length(data):
            return check_broken(data)
        names = sorted(set(gather_object(data.broken())))
        if len(names) > MAX_BROKEN * len(data):
            raise BrokenImagesError(
                f"{len(names)} of {len(data)} images cannot be decoded; repair or remove them: {', '.join(names[:20])}"
            )

"""What pretraining and fine-tuning with transformers' Trainer share: schedules, arguments, seeds, callbacks.

A schedule is a pure function of `progress`, the share of the run that is done, in [0, 1]. A checkpoint has to hold
nothing for it, because progress follows from the step number.
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
from hf_mim.data.workers import leaving_signals
from hf_mim.memory import freed_memory_kept
from hf_mim.models.target_encoder import cosine, linear
from hf_mim.scrub import scrubbed_all


def learning_rate(progress: float, peak: float, start: float = 0.0, final: float = 0.0, warmup: float = 0.0) -> float:
    """Linear from `start` to `peak` over the first `warmup` share of the run, then a half cosine down to `final`.

    All rates have the same unit. MAE: 0 → peak → 0; Latent MIM: peak/4 → peak → peak/4; I-JEPA: 2e-4 → 1e-3 → 1e-6.
    """
    if progress < warmup:
        return linear(start, peak, progress / warmup)
    return cosine(peak, final, (progress - warmup) / (1 - warmup)) if warmup < 1 else peak


def gpu_has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16. Older ones only emulate it, which is slower than float32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16. Where torch does not say, the answer is yes."""
    known = torch.cpu.get_capabilities()
    told = [known[name] for name in ("avx512_bf16", "amx_bf16", "bf16") if name in known]
    return any(told) or not told


class ProcessArguments(TrainingArguments):
    """What the arguments of pretraining and of fine-tuning share: one GPU per process, and options for loaders."""

    @property
    def visible_gpus(self) -> int:
        """GPUs that this process could use."""
        return super().n_gpu

    @property
    def n_gpu(self) -> int:
        """At most 1: DataParallel passes no masks of unequal length, and would lose which images were mixed."""
        return min(self.visible_gpus, 1)

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step: per-device batch × accumulation × processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def __getstate__(self) -> dict:
        """Without tokens and folders of this machine: `training_args.bin` is a pickle of this, and may be uploaded."""
        return {name: None if name.endswith("token") else scrubbed_all(value) for name, value in vars(self).items()}

    def settle_loaders(self):
        """Switch off options of loaders that torch would refuse or warn of. Call it after `__post_init__`."""
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # torch refuses it
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns that there is nothing to pin for


class ProcessTrainer:
    """A mixin before `transformers.Trainer`: its data workers leave signals to the main process.

    On the CPU a step takes the memory that the step before has freed (`freed_memory_kept`).
    """

    def train(self, *args, **kwargs):
        with freed_memory_kept(self.args.device.type == "cpu"):
            return super().train(*args, **kwargs)

    def get_train_dataloader(self):
        return leaving_signals(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return leaving_signals(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset):
        return leaving_signals(super().get_test_dataloader(test_dataset))


# Learned tokens and position tables. Zero means nothing special for them, so a decay should not pull them there.
UNDECAYED_NAMES = re.compile(r"(^|\.)(\w+_tokens?|position_embeddings?)(\.|$)")


def decayed_parameters(model: nn.Module) -> list[str]:
    """The names of all matrices but tokens, tables and embeddings. Biases and norms are vectors, so they are not in."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in embeddings and not UNDECAYED_NAMES.search(name)
    ]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device):
    """Inside, random numbers on the CPU and `device` follow `seed`. Outside, they go on as if none had been drawn."""
    generators = [torch.random] if device.type == "cpu" else [torch.random, torch.get_device_module(device)]
    states = [generator.get_rng_state() for generator in generators]
    torch.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_rng_state(state)


class StepSeeds(TrainerCallback):
    """Seeds the random numbers of a step (masks, noise, drop path) by seed, step and rank, whatever was drawn before.

    So a resumed run draws what it would have drawn, and no two ranks draw the same masks.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        key = random.Random(f"{args.seed}/{state.global_step}/{args.process_index}")
        torch.manual_seed(key.getrandbits(63))


class DatasetEpoch(TrainerCallback):
    """Tells the training data which epoch begins, so that its crops depend on (seed, epoch, index) alone.

    Accelerate does this for streams. For map-style data it does it only in a single process, and not once a resume has
    skipped batches.
    """

    def __init__(self, train_dataset):
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if has_length(self.train_dataset) and hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(int(state.epoch))

    def on_step_end(self, args, state, control, **kwargs):
        if isinstance(self.train_dataset, ImageStream):  # each worker ends its pass at another step
            state.epoch = state.global_step / state.max_steps


class BrokenImages(TrainerCallback):
    """Stops the run, at the next log, when more than 1 % of the images cannot be decoded.

    The workers skip them and name each one. With map-style data each process reads only a share, so the processes put
    their lists together. With a stream each process judges its own part.
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

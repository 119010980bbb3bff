"""MIMTrainingArguments: transformers' TrainingArguments with the papers' schedules and what a long run needs."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate.utils import get_cpu_distributed_information
from transformers.utils import logging

from hf_mim import trainer_utils
from hf_mim.checks import least, one_of, positive, share
from hf_mim.models.target_encoder import linear
from hf_mim.pretraining.settings import to_type
from hf_mim.pretraining.trainer_options import check_accelerator, check_arguments
from hf_mim.trainer_utils import ProcessArguments

logger = logging.get_logger(__name__)

COSINE, STABLE, CONSTANT = "cosine", "warmup_stable_decay", "constant"
DECAY = 0.1  # the share of a run that decays by default


@dataclass
class MIMTrainingArguments(ProcessArguments):
    """TrainingArguments with the papers' schedules, a guard of the steps, and other defaults than transformers.

    The learning rate rises from `start_lr_ratio` × peak to the peak over `warmup_steps` (a number of optimizer steps,
    or below 1 a share of the run). What follows is `lr_scheduler_type`:

    - cosine: it falls on a half cosine to `final_lr_ratio` × peak at the end of the run.
    - warmup_stable_decay: it stays at the peak, and falls on a straight line to `final_lr_ratio` × peak over the last
      `decay_steps`. Such a run can be made longer: until the decay nothing depends on its length. So momentum, weight
      decay and similarity too keep their first value until the decay, and go to their last one within it.
    - constant: it stays at the peak, and all of these at their first value.

    The peak is `learning_rate` if that is given, or else `base_lr` × images per optimizer step / 256.

    Args:
        base_lr: Peak learning rate for 256 images per optimizer step.
        learning_rate: Peak learning rate; overrides base_lr × images per optimizer step / 256.
        start_lr_ratio: Learning rate at the first step, divided by the peak.
        final_lr_ratio: Learning rate at the end of the run, divided by the peak.
        encoder_layer_decay: Each block's learning rate in the online encoder, divided by that of the next block, for a
            run that starts from weights; 1: all have the same.
        lr_scheduler_type: How the learning rate goes after the warm-up; all recipes have cosine.
        decay_steps: Optimizer steps of the decay at the end of warmup_stable_decay, or below 1 a share of the run;
            default: 0.1.
        weight_decay: Weight decay, at the start of the run.
        weight_decay_end: Weight decay at the end of the run, reached on a half cosine; default: weight_decay.
        adam_beta2: AdamW's second beta; I-JEPA and StoP use 0.999.
        max_grad_norm: Gradient norm to clip to; 0: no clipping.
        bf16: Mixed precision in bfloat16; default: if the GPU has it, unless fp16 is given.
        max_skipped_steps: Steps in a row without a finite loss and gradient after which the run stops.
        data_timeout: Seconds without images, after the first ones, until the run ends.
        stop_on_collapse: End the run when its features collapse, instead of only a warning.
        logging_steps: Steps from one log to the next (below 1: as a share of the run).
        logging_first_step: Log the first step too.
        logging_nan_inf_filter: Leave NaN losses out of the log.
        remove_unused_columns: Drop columns that the model does not take.
        label_names: Inputs that eval_loss needs.
        prediction_loss_only: Evaluate only the loss, and collect no predictions.
        dataloader_drop_last: Drop the last, smaller training batch.
        dataloader_persistent_workers: Keep workers between epochs.
        ddp_find_unused_parameters: Search for parameters without a gradient; no model here has any.
        ddp_broadcast_buffers: Send buffers from rank 0 to the others at each step.
        fsdp: Divide the model among the GPUs by FSDP2 (docs/scaling.md).

    Raises:
        ValueError: a value outside its range, in one line that names the argument.
    """

    base_lr: float = 1.5e-4
    learning_rate: float | None = None
    start_lr_ratio: float = 0.0
    final_lr_ratio: float = 0.0
    encoder_layer_decay: float = 1.0
    lr_scheduler_type: Literal["cosine", "warmup_stable_decay", "constant"] = "cosine"
    decay_steps: float | None = None
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    adam_beta2: float = 0.95
    max_grad_norm: float = 0.0
    bf16: bool | None = None
    max_skipped_steps: int = 10
    data_timeout: float = 1800
    stop_on_collapse: bool = False

    logging_steps: float = 50
    logging_first_step: bool = True
    # Trainer's filter waits for the device at every step, and it would hide a NaN.
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["pixel_values"])
    prediction_loss_only: bool = True
    dataloader_drop_last: bool = True
    dataloader_persistent_workers: bool = True
    ddp_find_unused_parameters: bool | None = False
    # The buffers are tables that never change, and a similarity target that is the same on each rank.
    ddp_broadcast_buffers: bool | None = False
    fsdp: bool | str | None = None  # type: ignore[assignment]  # true and false are for FSDP2

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_schedule()
        check_arguments(self)
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and trainer_utils.gpu_has_bfloat16()
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # without it, transformers refuses bfloat16 on a CPU
        default_accelerator = self.accelerator_config is None
        if isinstance(self.report_to, str):
            self.report_to = self.report_to.replace(" ", "").split(",")
        if get_cpu_distributed_information().world_size == 1:
            self.ddp_backend = None  # one process needs none, and accelerate fails with one
        super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise ValueError("fp16 needs a GPU: on a CPU it would do nothing; bf16 works on both")
        if self.bf16 and self.device.type == "cpu" and not trainer_utils.cpu_has_bfloat16():
            logger.warning(
                "This CPU only emulates bfloat16, so bf16 is many times slower than float32; leave bf16 out."
            )
        if self.learning_rate is None:
            self.learning_rate = self.base_lr * self.images_per_step / 256
        if (gpus := self.visible_gpus) > 1:
            logger.warning(f"Using one of {gpus} GPUs; `torchrun --nproc_per_node={gpus}` uses all.")
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the data must not depend on the ranks' own RNG
        self.settle_loaders()
        config: Any = self.accelerator_config  # Trainer has made an object of it
        if default_accelerator:
            config.non_blocking = self.dataloader_pin_memory
        check_accelerator(config)
        config.dispatch_batches = False  # each rank reads its own part of a stream

    def _check_numbers(self) -> None:
        """Turn numbers that are text into numbers (PyYAML reads `1e-4` as text), and check the range of each."""
        above_zero = ("base_lr", "learning_rate")
        not_negative = ("start_lr_ratio", "final_lr_ratio", "weight_decay", "weight_decay_end", "warmup_steps")
        for name in (*above_zero, *not_negative):
            value = getattr(self, name)
            if value is None and name in ("learning_rate", "weight_decay_end"):
                continue
            number = to_type(name, value, float)
            positive(**{name: number}) if name in above_zero else least(0, **{name: number})
            setattr(self, name, number)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            least(1, **{name: getattr(self, name)})
        least(1, max_skipped_steps=self.max_skipped_steps)
        positive(data_timeout=self.data_timeout)
        least(0, dataloader_num_workers=self.dataloader_num_workers)
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {self.max_steps}")
        share("[0, 1)", adam_beta1=self.adam_beta1, adam_beta2=self.adam_beta2)
        share("(0, 1]", encoder_layer_decay=self.encoder_layer_decay)

    def _check_schedule(self) -> None:
        self.lr_scheduler_type = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)  # a copy has an enum
        one_of((COSINE, STABLE, CONSTANT), lr_scheduler_type=self.lr_scheduler_type)
        if self.lr_scheduler_type != STABLE and self.decay_steps is not None:
            raise ValueError(f"decay_steps is for lr_scheduler_type {STABLE}, not for {self.lr_scheduler_type}")
        if self.decay_steps is not None:
            self.decay_steps = to_type("decay_steps", self.decay_steps, float)
            positive(decay_steps=self.decay_steps)

    def decay_start(self, steps: int) -> int | None:
        """After how many of `steps` the decay of warmup_stable_decay begins; None for other schedules."""
        return decay_start(self.decay_steps, steps) if self.lr_scheduler_type == STABLE else None

    def schedule_progress(self, step: int, steps: int) -> float:
        """How far momentum, weight decay and similarity are on their way after `step` of `steps`, in [0, 1]."""
        if self.lr_scheduler_type == CONSTANT:
            return 0.0
        start = self.decay_start(steps) or 0
        return max(0, step - start) / (steps - start)

    def learning_rate_at(self, step: int, steps: int) -> float:
        """The learning rate of the step that follows `step` of `steps`."""
        peak, warmup = self.learning_rate, self.get_warmup_steps(steps)
        start, final = self.start_lr_ratio * peak, self.final_lr_ratio * peak
        if self.lr_scheduler_type == COSINE:
            return trainer_utils.learning_rate(step / steps, peak, start=start, final=final, warmup=warmup / steps)
        if step < warmup:
            return linear(start, peak, step / warmup)
        return linear(peak, final, self.schedule_progress(step, steps))


def decay_start(decay_steps: float | None, steps: int) -> int:
    """The step at which the decay of a run of `steps` begins."""
    decay = DECAY if decay_steps is None else decay_steps
    return steps - max(1, round(decay * steps if decay < 1 else decay))

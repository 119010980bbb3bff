"""MIMTrainer: transformers' Trainer for the three methods, by the hooks that it offers.

It adds what masked image modeling needs and nothing else: augmentation on the device, the two calls of the model
contract (`set_progress`, `update_target`), the papers' schedules and parameter groups, the models' own metrics, other
masks on each rank, and evaluation on fixed masks.
"""

from dataclasses import dataclass, field

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length
from transformers.utils import logging

from hf_mim import schedules
from hf_mim.callbacks import (
    BrokenImages,
    DatasetEpoch,
    MIMProgress,
    RankSeeds,
    TargetUpdate,
    Throughput,
    WeightDecay,
    decayed_parameters,
    seeded,
)
from hf_mim.data import ImageStream
from hf_mim.hub.push import HubTrainer

logger = logging.get_logger(__name__)


@dataclass
class MIMTrainingArguments(TrainingArguments):
    """TrainingArguments with the papers' schedules; what else differs from transformers is the defaults.

    The learning rate goes from `start_lr_ratio` × peak to the peak over `warmup_steps` (a number of optimizer steps, or
    below 1 a share of the run), then on a half cosine to `final_lr_ratio` × peak at the end. The peak is
    `base_lr` × images per optimizer step / 256, or `learning_rate` as it is where that is given: it wins.

    Raises:
        ValueError: a value outside its range, in one line that names the argument.
    """

    base_lr: float = field(default=1.5e-4, metadata={"help": "Peak learning rate for 256 images per optimizer step."})
    learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate as it is; wins over base_lr × batch / 256."}
    )
    start_lr_ratio: float = field(default=0.0, metadata={"help": "Learning rate at the first step, over the peak."})
    final_lr_ratio: float = field(default=0.0, metadata={"help": "Learning rate at the end of the run, over the peak."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "'cosine', the one that all recipes share."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay, at the start of the run."})
    weight_decay_end: float | None = field(
        default=None, metadata={"help": "Weight decay at the end, reached on a half cosine; default: it is constant."}
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta; I-JEPA and StoP use 0.999."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient norm to clip to; 0: no clipping."})

    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps (or share of the run)."})
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    # Trainer's filter looks at every loss: a device synchronisation per step, and it would hide a NaN.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN losses out of the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that the model does not take."})
    label_names: list[str] | None = field(
        default_factory=lambda: ["pixel_values"], metadata={"help": "Inputs without which there is no eval_loss."}
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluate the loss, collect no predictions."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last, smaller training batch."})
    dataloader_persistent_workers: bool = field(default=True, metadata={"help": "Keep workers between epochs."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for parameters without a gradient; no model here has any."}
    )
    # The buffers are tables that never change, and a similarity target that each rank sets alike.
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "Send buffers from rank 0 each step."})

    def __post_init__(self):
        self._check_numbers()
        default_accelerator = self.accelerator_config is None
        super().__post_init__()
        if self.lr_scheduler_type != "cosine" or self.lr_scheduler_kwargs:
            raise ValueError(
                f"lr_scheduler_type must be 'cosine' without lr_scheduler_kwargs (start_lr_ratio and final_lr_ratio "
                f"shape it), got {getattr(self.lr_scheduler_type, 'value', self.lr_scheduler_type)!r}"
            )
        if self.learning_rate is None:
            if self.auto_find_batch_size:
                raise ValueError("auto_find_batch_size needs learning_rate: base_lr cannot follow the batch it finds")
            self.learning_rate = self.base_lr * self.images_per_step / 256
        if super().n_gpu > 1:
            logger.warning(f"Using one of {super().n_gpu} GPUs; `torchrun --nproc_per_node={super().n_gpu}` uses all.")
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the data must not depend on the ranks' own RNG
        if self.dataloader_num_workers == 0:
            self.dataloader_persistent_workers = False  # torch refuses it
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch warns that there is nothing to pin for
        if default_accelerator:
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
            self.accelerator_config.dispatch_batches = False  # each rank reads its own part of a stream

    def __getstate__(self) -> dict:
        """Without the token: a run's `training_args.bin` is a pickle of these, and goes to the Hub with it."""
        return vars(self) | {"hub_token": None}

    def _check_numbers(self):
        """Numbers written as text (YAML reads `1e-4` as text) become numbers; each must be in its range."""
        positive = ("base_lr", "learning_rate")
        not_negative = ("start_lr_ratio", "final_lr_ratio", "weight_decay", "weight_decay_end", "warmup_steps")
        for name in (*positive, *not_negative):
            value = getattr(self, name)
            if value is None and name in ("learning_rate", "weight_decay_end"):
                continue
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"{name} must be a number, got {value!r}") from None
            if not (number > 0 if name in positive else number >= 0):
                raise ValueError(f"{name} must be {'above' if name in positive else 'at least'} 0, got {value!r}")
            setattr(self, name, number)
        whole = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1}
        for name, least in (whole | {"dataloader_num_workers": 0}).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {self.max_steps}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def n_gpu(self) -> int:
        """At most 1: masks of unequal length cannot pass through DataParallel. Many GPUs: one process for each."""
        return min(super().n_gpu, 1)

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step: per-device batch × accumulation × processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    def learning_rate_at(self, progress: float, warmup: float) -> float:
        """The learning rate at `progress` in [0, 1], for a warm-up that takes the first `warmup` share of the run."""
        peak = self.learning_rate
        return schedules.learning_rate(
            progress, peak, start=self.start_lr_ratio * peak, final=self.final_lr_ratio * peak, warmup=warmup
        )


class ScalarMeans:
    """Means of scalars over steps and ranks. The sums stay on the device; reading them is the only synchronisation."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, scalars: dict[str, torch.Tensor]):
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def pop(self, accelerator) -> dict[str, float]:
        """Means since the last reading, over all ranks, each of which has to call this."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = torch.stack([self.sums[name] for name in names])
        counts = torch.tensor([self.counts[name] for name in names], dtype=totals.dtype, device=totals.device)
        totals, counts = accelerator.reduce(torch.stack([totals, counts]), reduction="sum")
        self.__init__()
        return dict(zip(names, (totals / counts).tolist(), strict=True))


class MIMTrainer(HubTrainer, Trainer):
    """Pretrains a model of the contract: `forward(pixel_values, **ids)` with `loss` and `metrics` in its output.

    Args:
        model: one of hf_mim's `...ForPreTraining`.
        args: `MIMTrainingArguments`.
        train_dataset: gives `{"pixel_values": [C, h, w]}`; whatever else it gives (ids, noise) goes to the model, but
            `labels` do not. Without a length (a stream) it needs `max_steps`. Of an `ImageStream` each rank reads only
            its part; any other stream is read in full by all ranks, which take turns with its batches.
        augment: called on the device with the batch, uint8 `[B, C, h, w]`, returns what the model takes, float
            `[B, C, H, W]`; a module follows the model's train and eval mode. None: `pixel_values` are float already.
        kwargs: as for `transformers.Trainer`; on an `eval_dataset`, every `eval_loss` is measured on the same masks.

    Raises:
        ValueError: data without length and no `max_steps`, without `pixel_values`, or less than one batch of it.
    """

    def __init__(self, model, args: MIMTrainingArguments, train_dataset=None, augment=None, **kwargs):
        if not isinstance(args, MIMTrainingArguments):
            raise ValueError(f"args must be MIMTrainingArguments, got {type(args).__name__}")
        check_data(args, train_dataset)
        if args.world_size > 1 and isinstance(train_dataset, ImageStream):
            train_dataset = train_dataset.split(args.process_index, args.world_size)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        vars(model.config).pop("use_cache", None)  # Trainer's word to text models; it would go into config.json
        # The loss is a mean over a batch: Trainer has to divide it under accumulation, labels in the data or not.
        self.model_accepts_loss_kwargs = False
        self.augment = augment.to(args.device) if isinstance(augment, nn.Module) else augment
        self.means, self.throughput = ScalarMeans(), Throughput()
        for_data = DatasetEpoch(train_dataset), BrokenImages(train_dataset)
        for callback in (RankSeeds(), *for_data, TargetUpdate(), WeightDecay(), self.throughput):
            self.add_callback(callback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(MIMProgress())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if isinstance(self.augment, nn.Module):
            self.augment.train(model.training)
        if self.augment is not None:
            with torch.no_grad():
                inputs["pixel_values"] = self.augment(inputs["pixel_values"])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            self.means.add(outputs["metrics"])
            self.throughput.images += len(inputs["pixel_values"]) * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        """Beside the loss, the means of the models' metrics over steps and ranks, and the images per second."""
        if "loss" in logs:
            logs |= self.means.pop(self.accelerator)
            logs["images_per_second"] = self.throughput.read()
            if broken := hasattr(self.train_dataset, "num_broken") and self.train_dataset.num_broken():
                logs["broken_images"] = broken  # found by this process
        logs.pop("total_flos", None)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: Trainer's formula takes each pixel for a token. `training/benchmark.py step` counts them."""
        return 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All matrices but tokens, tables and embeddings; so neither biases nor norms, which are vectors."""
        return decayed_parameters(model)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        names = set(self.get_decay_parameter_names(model))
        decayed = {id(parameter) for name, parameter in model.named_parameters() if name in names}
        for group in optimizer.param_groups:
            group["decays"] = any(id(parameter) in decayed for parameter in group["params"])
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps) / num_training_steps
            if warmup > 1:
                raise ValueError(
                    f"warmup_steps must be at most the {num_training_steps} steps of the run, or below 1 as a share of "
                    f"them, got {self.args.warmup_steps:g}"
                )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: self.args.learning_rate_at(step / num_training_steps, warmup) / self.args.learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_train_dataloader(self):
        """As Trainer's; but an ImageStream, of which each rank has its part, must not be divided again."""
        if self.args.world_size == 1 or not isinstance(self.train_dataset, ImageStream):
            return super().get_train_dataloader()
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            drop_last=self.args.dataloader_drop_last,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return prepare_data_loader(
            loader,
            device=self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.args.accelerator_config.non_blocking,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """Every image counts in an evaluation: the smaller last batch too."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def evaluation_loop(self, *args, **kwargs):
        with seeded(self.args.seed + self.args.process_index, self.args.device):
            return super().evaluation_loop(*args, **kwargs)


def check_data(args: MIMTrainingArguments, train_dataset):
    """Raise ValueError, before anything is built, where the data cannot make one optimizer step."""
    if train_dataset is None:
        return
    if not has_length(train_dataset):
        if args.max_steps <= 0:
            raise ValueError("max_steps must be given for a train_dataset without a length, such as a stream")
        if isinstance(train_dataset, ImageStream) and args.world_size > 1 and args.gradient_accumulation_steps > 1:
            raise ValueError(  # the ranks' parts end at different batches; one would be a step behind, and hang
                f"gradient_accumulation_steps must be 1 for a stream on several processes, "
                f"got {args.gradient_accumulation_steps}"
            )
    elif args.dataloader_drop_last and len(train_dataset) < args.per_device_train_batch_size * args.world_size:
        raise ValueError(
            f"per_device_train_batch_size × processes must be at most the {len(train_dataset)} images of "
            f"train_dataset, got {args.per_device_train_batch_size} × {args.world_size}"
        )
    elif "pixel_values" not in (sample := train_dataset[0]):
        raise ValueError(
            f"train_dataset must give 'pixel_values', got {sorted(sample)}; hf_mim.data.ImageDataset makes them"
        )

"""MIMTrainer: transformers' Trainer for all methods, through the hooks that Trainer offers.

It adds what masked image modeling needs: augmentation on the device, the two calls of the model contract
(`set_progress`, `update_target`), the papers' schedules and parameter groups, the models' own metrics, different masks
on each rank, and evaluation on fixed masks. For runs that last weeks it adds a guard at each step (`guard.py`) and
checkpoints that are whole or absent (`saving.py`).
"""

import os
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import transformers.trainer
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, has_length

from hf_mim.data import DeviceAugment, ImageDataset, ImageStream
from hf_mim.data.cached import CachedImages
from hf_mim.data.dataset import collate
from hf_mim.data.stream import RING, EndlessStream
from hf_mim.data.workers import leaving_signals
from hf_mim.hub.push import HubTrainer
from hf_mim.models.target_encoder import TargetNetworkMixin
from hf_mim.models.vit import MIMPreTrainedModel
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.callbacks import (
    MetricsFile,
    SaveBeforeDecay,
    TargetUpdate,
    Throughput,
    WeightDecay,
)
from hf_mim.pretraining.collapse import CollapseAlarm
from hf_mim.pretraining.flops import StepFlops
from hf_mim.pretraining.guard import StepGuard
from hf_mim.pretraining.progress import MIMProgress
from hf_mim.pretraining.rates import RatesTrainer
from hf_mim.pretraining.saving import CheckpointTrainer
from hf_mim.pretraining.signals import SHARED_MEMORY, Ended, NoImagesError, free_shared_memory
from hf_mim.pretraining.trainer_options import check_optimizer
from hf_mim.trainer_utils import BrokenImages, DatasetEpoch, ProcessTrainer, StepSeeds, seeded


class ScalarMeans:
    """Means of scalars over steps and ranks. Values that are not finite do not count; a mean of none is NaN.

    The sums stay on the device. Only `pop` waits for it.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, Any] = {}

    def add(self, scalars: dict[str, torch.Tensor]) -> None:
        for name, value in scalars.items():
            value = value.detach().float()
            finite = torch.isfinite(value)
            self.sums[name] = self.sums.get(name, 0) + torch.where(finite, value, 0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last call, over all ranks. Every rank has to call it."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = torch.stack([self.sums[name] for name in names])
        counts = torch.stack([self.counts[name] for name in names]).to(totals.dtype)
        totals, counts = accelerator.reduce(torch.stack([totals, counts]), reduction="sum")
        self.sums, self.counts = {}, {}
        return dict(zip(names, (totals / counts).tolist(), strict=True))


class MIMTrainer(CheckpointTrainer, RatesTrainer, HubTrainer, ProcessTrainer, Trainer):
    """Pretrains a model whose `forward(pixel_values, **ids)` returns `loss`, `predictions` and `metrics`.

    Args:
        model: one of hf_mim's `...ForPreTraining`.
        args: `MIMTrainingArguments`.
        train_dataset: its samples are `{"pixel_values": [C, h, w]}`. The model also gets what else is in them (ids,
            noise), but no `labels`. Without a length (a stream) it needs `max_steps`. Each rank reads only its part of
            an `ImageStream`, over and over. All ranks read any other stream in full, and take turns with its batches.
        augment: called on the device with a batch, uint8 `[B, C, h, w]`; returns what the model takes, float
            `[B, C, H, W]`. A module follows the model's train and eval mode. A `DeviceAugment` also gets the images'
            keys, so that what it does to an image does not depend on the batch. If it has `nodata`, the model also gets
            `valid_pixels`. None: `pixel_values` are float already.
        kwargs: as for `transformers.Trainer`. With an `eval_dataset`, every `eval_loss` is measured on the same masks.

    Raises:
        ValueError: the data have no length and `max_steps` is not given, no `pixel_values`, or less than one batch;
            `optim_args` that the optimizer does not read.
        ImportError: the optimizer needs a package that is missing.
    """

    def __init__(
        self,
        model: MIMPreTrainedModel,
        args: MIMTrainingArguments,
        train_dataset: Any = None,
        augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, MIMTrainingArguments):
            raise ValueError(f"args must be MIMTrainingArguments, got {type(args).__name__}")
        check_data(args, train_dataset)
        if not kwargs.keys() & {"optimizers", "optimizer_cls_and_kwargs"}:
            check_optimizer(args, model)
        if args.world_size > 1 and isinstance(train_dataset, ImageStream):
            train_dataset = train_dataset.split(args.process_index, args.world_size)
        if isinstance(train_dataset, ImageDataset | ImageStream):
            train_dataset = train_dataset.identify()
            kwargs.setdefault("data_collator", collate)
        if isinstance(train_dataset, CachedImages):
            train_dataset.move_to(args.device)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        vars(model.config).pop("use_cache", None)  # Trainer adds it for language models; keep it out of config.json
        # The loss is a mean over a batch, so Trainer has to divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.augment = augment.to(args.device) if isinstance(augment, nn.Module) else augment
        self.means, self.throughput, self.step_flops = ScalarMeans(), Throughput(), StepFlops(model)
        self.guard = StepGuard(self, args)
        for_data = DatasetEpoch(train_dataset), BrokenImages(train_dataset)
        for_step = StepSeeds(), self.guard, TargetUpdate(self.guard), WeightDecay(), SaveBeforeDecay()
        for callback in (*for_data, *for_step, self.throughput, MetricsFile()):
            self.add_callback(callback)
        if isinstance(model, TargetNetworkMixin) and model.target_pairs():  # a frozen target does not collapse
            alarm = CollapseAlarm(args.stop_on_collapse)
            self.callback_handler.callbacks.insert(0, alarm)  # first, because all reports show what it adds to a log
        theirs = PrinterCallback if args.disable_tqdm else transformers.trainer.DEFAULT_PROGRESS_CALLBACK
        shown = self.callback_handler.callbacks
        shown.remove(next(one for one in reversed(shown) if type(one) is theirs))  # the last: a user may give one too
        self.add_callback(MIMProgress())

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput | None:  # type: ignore[override]  # a run that ends in a wait has none
        """As Trainer's. True resumes from the newest whole checkpoint, a path from the checkpoint there.

        After a SIGTERM, SIGHUP or SIGINT it saves a checkpoint and returns; `guard.signal` is then that signal.

        Raises:
            ValueError: there is no such whole checkpoint, or it was made with another number of images per step.
            NonFiniteError: the loss or the gradient was not finite in `max_skipped_steps` steps in a row.
            NoImagesError: no images came for `data_timeout` seconds.
        """
        checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
        self.guard.begin()
        with self.guard.listener.listening():
            try:
                output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
                late = gather_object([self.guard.listener.asked])  # it came when no step was left to end at
                self.guard.signal = self.guard.signal or next(filter(None, late), None)
                return output
            except (Ended, NoImagesError) as error:  # in a wait for images: the weights are those after a whole step
                if self.args.world_size == 1 and self.state.global_step > self._initial_global_step:
                    self._save_checkpoint(self.model, None)
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                if isinstance(error, NoImagesError):
                    raise
                self.guard.signal = error.signal
                return None

    @property
    def is_ending(self) -> bool:
        return self.guard.listener.asked is not None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        names, keys = inputs.pop("name", None), inputs.pop("augment_key", None)
        if "boxes" in inputs:
            inputs["pixel_values"] = cast(CachedImages, self.train_dataset).crops(inputs)
        if isinstance(self.augment, nn.Module):
            self.augment.train(model.training)
        if self.augment is not None:
            with torch.no_grad():
                inputs |= self._augmented(inputs["pixel_values"], keys)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training:
            self.means.add(outputs["metrics"] | {"loss": loss})
            self.guard.watch(loss, inputs["pixel_values"], outputs["predictions"], names)
            self.throughput.images += len(inputs["pixel_values"]) * self.args.world_size
            self.flops_of_batch = self.step_flops(inputs["pixel_values"].shape, outputs)
            self.throughput.flops += self.flops_of_batch
        return (loss, outputs) if return_outputs else loss

    def _augmented(self, pixel_values: torch.Tensor, keys: Any) -> dict[str, torch.Tensor]:
        """`pixel_values` as the model takes them, and `valid_pixels` if there may be pixels without data."""
        if not isinstance(self.augment, DeviceAugment):
            return {"pixel_values": self.augment(pixel_values)}
        images, valid = self.augment.with_valid(pixel_values, keys)
        return {"pixel_values": images} | ({} if valid is None else {"valid_pixels": valid})

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        return torch.where(torch.isfinite(loss), loss, 0)  # one bad step must not make the run's mean NaN

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        try:
            with self.throughput.waits(), self.guard.listener.waiting():
                return super().get_batch_samples(*args, **kwargs)
        except (ConnectionError, EOFError) as error:  # some dead workers; for others torch raises a RuntimeError
            raise RuntimeError(f"DataLoader worker or its source has gone: {error}") from error

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.guard.grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.guard.grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the loss: means of the model's metrics over steps and ranks, speed, skipped steps, broken images and
        images without data."""
        if "loss" in logs:
            logs |= self.means.pop(self.accelerator)
            logs |= self.throughput.read(self.args.device)
            if self.guard.skipped:
                logs["skipped_steps"] = self.guard.skipped
            if broken := hasattr(self.train_dataset, "num_broken") and self.train_dataset.num_broken():
                logs["broken_images"] = broken  # found by this process
            if empty := hasattr(self.train_dataset, "num_empty") and self.train_dataset.num_empty():
                logs["empty_images"] = empty
        if not logs.get("total_flos"):
            logs.pop("total_flos", None)  # the method has no formula
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # type: ignore[override]  # whole numbers beyond 2**53 are not needed
        """The FLOPs of the batch that was just trained on. Trainer adds them up over all ranks, in `total_flos` of its
        state. Its own formula counts each pixel as a token."""
        return self.flops_of_batch

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's. An ImageStream is read without end, from the place that the checkpoint holds."""
        if isinstance(self.train_dataset, ImageStream):
            loader = self._endless_loader()
        else:
            loader = super().get_train_dataloader()
        return leaving_signals(loader)

    def _endless_loader(self) -> DataLoader:
        """Each rank has its own part of the stream already, so Trainer must not divide it among the ranks again."""
        args, stream = self.args, cast(ImageStream, self.train_dataset)
        workers = min(args.dataloader_num_workers, stream.num_shards)  # a worker without a shard would give nothing
        prefetched = args.dataloader_prefetch_factor or 2
        if workers and prefetched > RING // 2:
            raise ValueError(f"dataloader_prefetch_factor must be at most {RING // 2} for a stream, got {prefetched}")
        self.endless_stream = EndlessStream(stream, self._train_batch_size, workers, self.stream_place(workers))
        loader = DataLoader(
            self.endless_stream,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
        )
        loader = prepare_data_loader(
            loader,
            device=args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=cast(AcceleratorConfig, args.accelerator_config).non_blocking,
        )
        return skip_first_batches(loader, self.endless_stream.skipped_batches)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(epochs, batches of this epoch) that are done. A stream is at its place already, and skips none."""
        done = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # as they are given now, not as the checkpoint has them
        if self.state.global_step >= max_steps:
            return sys.maxsize, 0  # Trainer would make one step too many
        return (0, 0) if isinstance(self.train_dataset, ImageStream) else done

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As Trainer's, with the smaller last batch: every image counts in an evaluation."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = dropped

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with seeded(self.args.seed + self.args.process_index, self.args.device):
            return super().evaluation_loop(*args, **kwargs)


def check_data(args: MIMTrainingArguments, train_dataset: Any) -> None:
    """Raise ValueError, before anything is built, if the data are not enough for one optimizer step."""
    if train_dataset is None:
        return
    if not has_length(train_dataset):
        if args.max_steps <= 0:
            raise ValueError("max_steps must be given for a train_dataset without a length, such as a stream")
        if args.train_sampling_strategy != "random":
            raise ValueError(
                "train_sampling_strategy must stay random for a train_dataset without a length: it has its own order, "
                "and shuffle_buffer mixes it"
            )
    elif args.dataloader_drop_last and len(train_dataset) < args.per_device_train_batch_size * args.world_size:
        raise ValueError(
            f"per_device_train_batch_size × processes must be at most the {len(train_dataset)} images of "
            f"train_dataset, got {args.per_device_train_batch_size} × {args.world_size}"
        )
    elif "pixel_values" not in (sample := cast(Any, train_dataset)[0]):
        raise ValueError(
            f"train_dataset must give 'pixel_values', got {sorted(sample)}; hf_mim.data.ImageDataset makes them"
        )
    else:
        check_shared_memory(args, sample["pixel_values"].nbytes)


def check_shared_memory(args: MIMTrainingArguments, bytes_per_image: int) -> None:
    """Raise ValueError if the batches that wait between workers and trainer do not fit into shared memory.

    A worker that finds no room there loses its batch, and the training waits for it without end.
    """
    free, workers = free_shared_memory(), args.dataloader_num_workers
    batches = workers * (args.dataloader_prefetch_factor or 2) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if free is None or (needed := batches * args.per_device_train_batch_size * bytes_per_image) <= free:
        return
    raise ValueError(
        f"dataloader_num_workers must be smaller than {workers}, or 0: {batches} batches take up to "
        f"{needed / 2**20:.0f} MiB of shared memory, and {SHARED_MEMORY} has {free / 2**20:.0f} MiB free (docker run "
        "--shm-size sets it)"
    )

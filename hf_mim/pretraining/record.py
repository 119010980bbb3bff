"""What a run took: images, time, waiting, and how its loss changed."""

import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset

from hf_mim.data import ImageDataset
from hf_mim.data.sources import source_name
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.result import Result
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.recipe import RunArguments
from hf_mim.run_folder import TRAINING_RESULT, result_path

if TYPE_CHECKING:
    from hf_mim.pretraining.trainer import MIMTrainer

PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}


def training_record(trainer: "MIMTrainer", run: RunArguments, images, nodata: str | None = None) -> Result:
    """`results/training.json`: what the training took and how its loss changed, over all parts of a resumed run.

    nodata: how many pixels have no data, in words.

    Only the seconds of training steps count: not evaluating, probing and saving, nor the time between two parts.
    """
    args, state, folder = trainer.args, trainer.state, Path(trainer.args.output_dir)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    # The logs of all parts of the run. A part that was killed may have made steps after its last log.
    logged = [(entry["seconds"], entry["images_per_second"]) for entry in state.log_history if "seconds" in entry]
    seconds = sum(lap for lap, _ in logged) + trainer.throughput.seconds
    timed = sum(lap * speed for lap, speed in logged) + trainer.throughput.images
    waiting = sum(entry.get("data_wait_seconds", 0) for entry in state.log_history) + trainer.throughput.waiting
    name = torch.get_device_module(args.device).get_device_name() if args.device.type == "cuda" else platform.machine()
    about = {"source": f"{source_name(run.dataset)}, split {run.train_split}"}
    about |= {"images": len(images)} if isinstance(images, Dataset) else {}
    about |= {"nodata": nodata} if nodata else {}
    about["local"] = Path(run.dataset).expanduser().exists()  # tells a folder owner/name from a dataset on the Hub
    result = Result(
        "pretrain",
        "loss",
        losses[-1] if losses else None,
        settings={
            "method": run.method,
            "processes": args.world_size,
            "precision": PRECISIONS[trainer.accelerator.mixed_precision],  # it may be set from outside
            "images_per_step": args.images_per_step,
            "seed": args.seed,
        },
        data=about,
        scores={
            "first_loss": losses[0] if losses else None,
            "steps": state.global_step,
            "images_seen": images_seen(args, trainer.train_dataset, state.global_step),
            "images_per_second": timed / seconds,
            "hours": seconds / 3600,
            "data_wait_share": waiting / seconds,
        },
        checkpoint=folder.name,
        checkpoint_sha256=checkpoint_sha256(folder),
        device=f"{args.device.type} ({name})",
        seconds=seconds,
    )
    result.save(result_path(folder, TRAINING_RESULT))
    return result


def images_seen(args: MIMTrainingArguments, images, steps: int) -> int:
    """The images of so many optimizer steps, on all processes. The last step of an epoch has fewer batches than the
    others if they do not divide by `gradient_accumulation_steps`."""
    if not isinstance(images, ImageDataset):
        return steps * args.images_per_step
    batch = args.per_device_train_batch_size * args.world_size
    batches = max(1, len(images) // batch if args.dataloader_drop_last else math.ceil(len(images) / batch))
    # Accelerate fills the last batch of several processes. That of a single one is smaller.
    filled = args.dataloader_drop_last or args.world_size > 1
    of_an_epoch = batches * batch if filled else len(images)
    epochs, rest = divmod(steps, math.ceil(batches / args.gradient_accumulation_steps))
    return epochs * of_an_epoch + rest * args.images_per_step

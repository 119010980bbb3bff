"""A real training process that the tests of kills and faults start, kill and start again: `killed_run.py FOLDER`.

It goes on from the newest whole checkpoint and ends with `FOLDER/model.safetensors`. By torchrun it is two ranks.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch
from tiny import make_model
from tiny_runs import arguments, image_column
from transformers import TrainerCallback

from hf_mim.data import DeviceAugment, ImageDataset, ImageStream
from hf_mim.pretraining.checkpoints import checkpoints
from hf_mim.pretraining.signals import INTERRUPTED
from hf_mim.pretraining.trainer import MIMTrainer

STEPS = 60


class SayThatTrainingBegins(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        print("training", flush=True)


def run(folder: Path, given) -> int:
    model, images = make_model(given.method, drop_path_rate=0.1), image_column(102, broken=[7])
    size = model.config.training_size
    if given.stream:
        images = ImageStream(images.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=5), size=size)
    else:
        images = ImageDataset(images.select([i for i in range(0, 102, 2)]), size=size)
    args = arguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=given.batch,
        gradient_accumulation_steps=given.accumulation,
        dataloader_num_workers=given.workers,
        save_strategy="steps",
        save_steps=given.save_steps,
        save_total_limit=2,
        logging_steps=4,
        data_seed=1,
        **({"ddp_backend": "gloo"} if torch.distributed.is_torchelastic_launched() else {}),
    )
    augment = DeviceAugment(grayscale_probability=0.2, blur_probability=0.5)
    trainer = MIMTrainer(model, args, images, augment=augment)
    trainer.add_callback(SayThatTrainingBegins())
    trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
    if trainer.guard.signal:
        return INTERRUPTED
    trainer.save_model()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="stop_jepa")
    parser.add_argument("--stream", action="store_true")
    for name, default in (("batch", 4), ("accumulation", 2), ("workers", 2), ("save_steps", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(1)
    status = run(given.folder, given)
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())

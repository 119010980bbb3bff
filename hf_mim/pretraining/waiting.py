"""How long a run waits for its images, and which command would shorten it.

The time is that of the main process in its DataLoader, which `Throughput` measures. No device is waited for.
"""

import logging
import math
import os
import re
import shlex
from collections.abc import Callable
from statistics import median

from transformers import TrainerCallback

from hf_mim.data.crop import image_size
from hf_mim.data.decode import BrokenImage
from hf_mim.data.sources import fixed_sample
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.recipe import RunArguments

logger = logging.getLogger(__name__)

MUCH = 0.2  # of the time
_EARLY, _SHORT = 60, 5  # seconds of training after which to say it during the run, and at its end
_SIZES = 64  # images whose sizes are read


class WaitingAdvice(TrainerCallback):
    """Says once, in one line, what would help if more than a fifth of the time is spent waiting for images.

    The first log is left out, because the workers start before it.

    Args:
        advice: makes the end of the line. It is called only if the line is needed.
    """

    def __init__(self, advice: Callable[[], str]):
        self.advice, self.rows, self.seconds, self.waiting, self.said = advice, 0, 0.0, 0.0, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "data_wait_seconds" not in logs:
            return
        if self.rows:
            self.seconds, self.waiting = self.seconds + logs["seconds"], self.waiting + logs["data_wait_seconds"]
        self.rows += 1
        self._say_after(_EARLY, state)

    def on_train_end(self, args, state, control, **kwargs):
        self._say_after(_SHORT, state)

    def _say_after(self, seconds: float, state):
        if self.said or self.seconds < seconds or self.waiting <= MUCH * self.seconds:
            return
        self.said = True
        if state.is_world_process_zero:
            share = 100 * self.waiting / self.seconds
            logger.warning("%.0f %% of the time is waiting for images; %s", share, self.advice())


def advice(images, run: RunArguments, args: MIMTrainingArguments, size: tuple[int, int], num_channels: int) -> str:
    """What would help: more workers where there are cores for them, and smaller files where images are large.

    Args:
        images: those of the run, undecoded.
        size: (height, width) of the training input.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    found = []
    if args.dataloader_num_workers < cores and not run.streaming:
        found.append(
            f"more workers: hf-mim pretrain --resume --output_dir {shlex.quote(args.output_dir)} "
            f"--dataloader_num_workers {cores}"
        )
    if (smaller := _smaller_files(images, run, size, num_channels)) is not None:
        found.append(f"smaller files: {smaller}")
    return " or ".join(found) or "all cores decode already, and the images are small: more cores or a faster disk help"


def sampled_sizes(images, num_channels: int) -> list[tuple[int, int]]:
    """(width, height) of a few images."""
    sizes = []
    for row in fixed_sample(images, _SIZES):
        try:
            sizes.append(image_size(row["image"], num_channels))
        except (BrokenImage, OSError, ValueError):  # it is found and counted where it is used
            continue
    return sizes


def _smaller_files(images, run: RunArguments, size: tuple[int, int], num_channels: int) -> str | None:
    """The command that prepares the images so that little is decoded in vain; None if they are small already.

    Tiles of twice the window leave it room to move. A short side of size / √(smallest share) is enough for every crop:
    none has to be enlarged.
    """
    if run.streaming or not (sizes := sampled_sizes(images, num_channels)):
        return None
    if run.crop_pixels is not None:
        side = 2 * max(run.crop_pixels if isinstance(run.crop_pixels, tuple) else (run.crop_pixels,))
        is_large, option = median(w * h for w, h in sizes) > 2 * side**2, f"--tile {side}"
    else:
        side = math.ceil(max(size) / math.sqrt(run.crop_scale[0]) / 32) * 32
        is_large, option = median(map(min, sizes)) > 1.5 * side, f"--short_side {side}"
    local = os.path.exists(os.path.expanduser(run.dataset))
    base = run.dataset.rstrip("/") if local else re.sub(r".*/|:.*", "", run.dataset)
    dest = shlex.quote(f"{base}_{side}")
    return f"hf-mim prepare {shlex.quote(run.dataset)} {dest} {option}, then --dataset {dest}" if is_large else None

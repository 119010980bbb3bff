"""Callbacks of the trainer: target update, weight decay, throughput and the log in a file.

A checkpoint has to hold nothing for them: what they do follows from the step number.
"""

import contextlib
import json
import logging
import math
import time
from pathlib import Path

import psutil
import torch
from transformers import TrainerCallback

from hf_mim.files import replacing
from hf_mim.models.target_encoder import cosine
from hf_mim.pretraining.guard import StepGuard
from hf_mim.run_folder import METRICS

logger = logging.getLogger(__name__)


class TargetUpdate(TrainerCallback):
    """Tells the model its progress before each optimizer step, and moves its target after it.

    Progress follows from the number of optimizer steps before this one (`schedule_progress`). A step that the loss
    scaler or `guard` has skipped moves nothing.
    """

    def __init__(self, guard: StepGuard):
        self.guard = guard

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_progress(args.schedule_progress(state.global_step, state.max_steps))

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not optimizer.step_was_skipped:
            progress = args.schedule_progress(state.global_step, state.max_steps)
            model.update_target(progress, self.guard.skip)


class WeightDecay(TrainerCallback):
    """Sets the weight decay of the decayed parameter groups before each optimizer step.

    It goes on half a cosine to `weight_decay_end`, as in I-JEPA (arXiv 2301.08243, appendix A: .04 → .4).
    """

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
        value = cosine(args.weight_decay, end, args.schedule_progress(state.global_step, state.max_steps))
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = value


class SaveBeforeDecay(TrainerCallback):
    """Saves a checkpoint where the decay of warmup_stable_decay begins: from there the run can be made longer."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.decay_start(state.max_steps) and args.save_strategy != "no":
            control.should_save = True


class Throughput(TrainerCallback):
    """Training images per second between two readings; evaluating and saving do not count as training time."""

    def __init__(self):
        self._restart()

    def _restart(self):
        self.images, self.flops, self.seconds, self.waiting = 0, 0.0, 0.0, 0.0
        self.mark = time.perf_counter()

    def _lap(self):
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    @contextlib.contextmanager
    def waits(self):
        """The time that passes inside counts as waiting for data."""
        start = time.perf_counter()
        yield
        self.waiting += time.perf_counter() - start

    def read(self, device: torch.device) -> dict[str, float]:
        """The numbers since the last call. `images_per_second` is for all processes together, the rest for this one.

        `tflops` are 10¹² FLOPs per second, waiting included; absent for a method without a formula (`flops.py`).
        `seconds` of training, `data_wait_seconds` among them, and their share `data_wait_share`; `device_memory_gib` is
        the peak on the device, in GiB. On a CPU, `memory_gib` is what the process holds now.
        """
        self._lap()
        found = {"images_per_second": self.images / self.seconds}
        found |= {"tflops": self.flops / self.seconds / 1e12} if self.flops else {}
        found |= {"seconds": self.seconds, "data_wait_seconds": self.waiting}
        found["data_wait_share"] = self.waiting / self.seconds
        if device.type == "cpu":
            found["memory_gib"] = psutil.Process().memory_info().rss / 2**30
        else:
            found["device_memory_gib"] = torch.accelerator.max_memory_allocated(device) / 2**30
            torch.accelerator.reset_peak_memory_stats(device)
        self._restart()
        return found

    def on_train_begin(self, args, state, control, **kwargs):
        self._restart()

    def on_step_end(self, args, state, control, **kwargs):
        self._lap()

    def restart_clock(self, *args, **kwargs):
        """Leave out the time since the last step: it was no training."""
        self.mark = time.perf_counter()

    on_evaluate = on_save = restart_clock


class MetricsFile(TrainerCallback):
    """Writes `metrics.jsonl` in the run folder: a line for each log, with its step and time (Unix seconds).

    A resumed run first deletes the lines after the step from which it resumes.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / METRICS
        if not state.is_world_process_zero or not path.exists():
            return
        with _warn_if_unwritable(path):
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= state.global_step]
            with replacing(path) as aside:
                aside.write_text("".join(f"{line}\n" for line in lines))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS
        entry = {"step": state.global_step, "time": round(time.time(), 3)} | {k: _plain(v) for k, v in logs.items()}
        with _warn_if_unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(entry) + "\n")


def _plain(value):
    """The value, or None (null) for a number that is not finite, because JSON has no word for it."""
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl. Infinity for half a line, which a killed run can leave."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextlib.contextmanager
def _warn_if_unwritable(path: Path):
    """A log that cannot be written (a full disk) is a warning, and does not end the run."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)

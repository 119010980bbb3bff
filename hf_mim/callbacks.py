"""What happens beside the step: target update, weight decay, epochs of the data, broken images, speed.

No callback keeps anything that a checkpoint would have to hold: what they do follows from the step number.
"""

import time

from accelerate.utils import set_seed
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from hf_mim import schedules

logger = logging.get_logger(__name__)


class TargetUpdate(TrainerCallback):
    """Tells the model its progress before each step and moves its target after each optimizer step that was taken.

    Progress is the number of optimizer steps done before this one, over all of them. Under gradient accumulation this
    is once per optimizer step; a step that the loss scaler skipped moves nothing.
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_progress(state.global_step / state.max_steps)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not optimizer.step_was_skipped:
            model.update_target(state.global_step / state.max_steps)


class WeightDecay(TrainerCallback):
    """Sets the weight decay of the decayed parameter groups before each optimizer step (`weight_decay_end`)."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
        value = schedules.weight_decay(state.global_step / state.max_steps, args.weight_decay, end)
        for group in optimizer.param_groups:
            if group["decays"]:
                group["weight_decay"] = value


class RankSeeds(TrainerCallback):
    """Gives each rank its own random numbers, or all would draw the same masks. Resuming restores them after this."""

    def on_train_begin(self, args, state, control, **kwargs):
        set_seed(args.seed, device_specific=True)


class DatasetEpoch(TrainerCallback):
    """Tells the training data which epoch begins, so that its crops can depend on (seed, epoch, index) alone.

    Accelerate does this only in a single process and only until a resume skips batches.
    """

    def __init__(self, train_dataset):
        self.train_dataset = train_dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(int(state.epoch))


class Throughput(TrainerCallback):
    """Training images per second between two readings; evaluating and saving do not count as training time."""

    def __init__(self):
        self._restart()

    def _restart(self):
        self.images, self.seconds, self.mark = 0, 0.0, time.perf_counter()

    def _lap(self):
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    def read(self) -> float:
        """Images per second since the last reading, those of all processes together."""
        self._lap()
        rate = self.images / self.seconds
        self._restart()
        return rate

    def on_train_begin(self, args, state, control, **kwargs):
        self._restart()

    def on_step_end(self, args, state, control, **kwargs):
        self._lap()

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()


class MIMProgress(ProgressCallback):
    """Trainer's progress bar, with the loss and the images per second on it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.training_bar is not None and "images_per_second" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}, {logs['images_per_second']:.0f} images/s")

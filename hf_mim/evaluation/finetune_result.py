"""What a fine-tuning tells: a curve while it trains, and the result at its end."""

import math
import weakref
from contextlib import ExitStack
from typing import Any, cast

import torch
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from hf_mim.data import ImageDataset
from hf_mim.evaluation.metrics import top_k_accuracy
from hf_mim.evaluation.result import Result
from hf_mim.progress import progress_bar, watched


class AccuracyCurve(TrainerCallback):
    """Classifies the test images after some epochs, at most `POINTS` of them. Their labels stay unread until the end.

    Nothing is chosen by it, and the training ends in the same weights: each step, each image and the order have seeds
    of their own. predicted: epoch → class ids `[n]`.
    """

    POINTS = 20

    def __init__(self, trainer: Trainer, images: ImageDataset):
        # The trainer holds this. In a cycle, its bar and workers would outlive a signal until they are collected.
        self.trainer, self.images, self.predicted = weakref.proxy(trainer), images, {}

    def on_epoch_end(self, args, state, control, **kwargs):
        epoch, step = round(state.epoch), math.ceil(args.num_train_epochs / self.POINTS)
        if epoch % step == 0 and epoch < args.num_train_epochs:  # after the last one, the result is predicted
            self.predicted[epoch] = self.logits().argmax(dim=1)

    def logits(self) -> torch.Tensor:
        """The logits of all test images, `[n, C]`."""
        args = self.trainer.args
        before, args.dataloader_drop_last = args.dataloader_drop_last, False
        try:
            return torch.from_numpy(self.trainer.predict(self.images).predictions)
        finally:
            args.dataloader_drop_last = before


class LossOnBar(ProgressCallback):
    """A progress bar with the loss on it. Without this, Trainer prints a line for every epoch."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.shown, self.current_step = ExitStack(), state.global_step
        bar = progress_bar(state.is_world_process_zero, "fine-tuning", state.max_steps)
        self.training_bar = self.shown.enter_context(bar)

    def on_prediction_step(self, args, state, control, **kwargs):
        if watched():
            super().on_prediction_step(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.4g}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.shown.close()


def finetuning_result(
    trainer: Trainer, logits: torch.Tensor, labels: torch.Tensor, settings: dict, curve: dict[int, float]
) -> Result:
    """The result of a fine-tuning that has ended, without its data.

    Args:
        logits, labels: of the test images, `[n, C]` and `[n]`.
        settings: of the recipe.
        curve: epoch → test accuracy.
    """
    scores = top_k_accuracy(logits, labels, [1, 5] if logits.shape[1] > 5 else [1])
    losses = [row for row in trainer.state.log_history if "loss" in row]
    curve = curve | {round(row["epoch"]): scores["top1_accuracy"] for row in losses[-1:]}
    result = Result(
        protocol="finetune",
        metric="top-1 accuracy",
        value=scores.pop("top1_accuracy"),
        settings=settings
        | {
            "learning_rate": trainer.args.learning_rate,
            "steps": trainer.state.max_steps,
            "warmup_epochs": cast(Any, trainer.args).warmup_epochs,
            "classifier": type(trainer.model).__name__,
        },
        data={},
        scores=scores,
        table=[
            {"epoch": row["epoch"], "training loss": row["loss"], "test accuracy": curve.get(round(row["epoch"]))}
            for row in losses
        ],
    )
    result.predicted = logits.argmax(dim=1)
    return result

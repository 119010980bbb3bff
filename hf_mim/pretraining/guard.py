"""Steps that go wrong change nothing, and a signal ends the run at a whole checkpoint.

At each step every rank votes twice: is the loss or the gradient not finite, and has a signal told this process to stop?
The votes of all ranks are added on the device, and there the optimizer obeys the first sum. The host reads both sums
`LAG` steps later, so that no step waits for the device. All ranks read the same sums at the same step.
"""

import logging
import signal
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TrainerCallback

from hf_mim.files import listed
from hf_mim.pretraining.checkpoints import newest_whole
from hf_mim.pretraining.signals import Listener

logger = logging.getLogger(__name__)

LAG = 2  # steps between a vote on an accelerator and the host's reading of it


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


@dataclass
class Votes:
    """A step's number, its two votes on their way to the host, and its images."""

    step: int
    votes: Tensor
    arrived: torch.Event | None
    finite: list[Tensor]  # [B] bools for each micro-batch
    names: list[list[str]]

    def read(self) -> tuple[bool, bool]:
        """Whether the step was skipped, and whether the run has to stop."""
        if self.arrived is not None:
            self.arrived.synchronize()
        skipped, stop = self.votes.tolist()
        return skipped > 0, stop > 0

    def images(self) -> str:
        """Names the images whose predictions are not finite, or all images of the step if there are none."""
        names = [name for batch in self.names for name in batch]
        wrong = [name for name, finite in zip(names, torch.cat(self.finite).tolist(), strict=True) if not finite]
        if wrong:
            return f"the predictions of {listed(wrong, 20)} are not finite"
        return f"all of its images have finite predictions: {listed(names)}"


class StepGuard(TrainerCallback):
    """Skips steps whose loss or gradient is not finite. Ends the run after `max_skipped` of them in a row or a signal.

    A skipped step leaves weights, optimizer state and EMA target as they are; schedules and data go on. `skip` is a
    0-dim tensor on the device, 1.0 while the current step is skipped. A fused AdamW reads it there. With any other
    optimizer, the host waits for it at each step.
    """

    def __init__(self, trainer, args):
        self.trainer, self.max_skipped = trainer, args.max_skipped_steps
        self.listener = Listener(args.data_timeout)
        self.begin()

    def begin(self):
        """Forget what an earlier training has seen."""
        self.skipped = 0  # steps that this process has skipped
        self.in_a_row = 0  # steps skipped since the last good one
        self.proved = -1  # the last step after which the weights gave a finite loss and gradient
        self.signal: signal.Signals | None = None  # the one that has ended the run
        self._pending: deque[Votes] = deque()
        self.skip, self.grad_norm = None, None

    def on_step_begin(self, args, state, control, **kwargs):
        self._losses, self._finite, self._names = [], [], []

    def watch(self, loss: Tensor, pixel_values: Tensor, predictions: Tensor, names: list[str] | None):
        """Note a micro-batch's loss, and for which of its images both pixels and predictions are finite.

        With R masks per image, `predictions` has R rows for each image, those of the first image first.
        """
        predictions = predictions.unflatten(0, (len(pixel_values), -1))
        sums = [tensor.detach().flatten(1).sum(1, dtype=torch.float32) for tensor in (pixel_values, predictions)]
        self._losses.append(loss.detach().float())
        self._finite.append(torch.isfinite(sums[0] + sums[1]))
        self._names.append(names or [f"image {index} of the batch" for index in range(len(pixel_values))])

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        total = torch.stack(self._losses).sum() + full_tensor(self.grad_norm)
        asked = total.new_full((), float(self.listener.asked is not None))
        votes = torch.stack([(~torch.isfinite(total)).float(), asked])
        votes = self.trainer.accelerator.reduce(votes, "sum")
        self.skip = votes[0].clamp(max=1)
        if self.trainer.accelerator.scaler is None:  # a loss scaler skips the step by itself
            if getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
                optimizer.optimizer.found_inf = self.skip
            elif self.skip.item():
                optimizer.zero_grad()  # without gradients an optimizer has nothing to do
        self._pending.append(Votes(state.global_step, *_send(votes), self._finite, self._names))

    def on_step_end(self, args, state, control, **kwargs):
        lag = 0 if args.device.type == "cpu" else LAG
        while len(self._pending) > lag:
            self._judge(self._pending.popleft(), args, control)

    def settle(self):
        """Read the votes of all steps so far. Every rank has to call it, because one may find that the run must end."""
        while self._pending:
            self._judge(self._pending.popleft(), self.trainer.args, self.trainer.control)

    def on_train_end(self, args, state, control, optimizer=None, **kwargs):
        while self._pending:
            self._judge(self._pending.popleft(), args)  # too late to stop
        if not self.in_a_row:
            self.trainer.after_step(True, state.global_step)
        else:
            logger.warning(
                f"The last {self.in_a_row} steps of the run were skipped: its weights are those after step "
                f"{state.global_step - self.in_a_row}, and they gave no finite loss"
            )
        if optimizer is not None and hasattr(optimizer.optimizer, "found_inf"):
            del optimizer.optimizer.found_inf

    def _judge(self, votes: Votes, args, control=None):
        skipped, stop = votes.read()
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.skipped += skipped
        if skipped:
            logger.warning(
                f"Step {votes.step + 1} is skipped, because its loss or its gradient is not finite; {votes.images()}"
            )
        else:
            self.proved = votes.step
        self.trainer.after_step(not skipped, votes.step)
        if self.in_a_row >= self.max_skipped:
            last, saved = newest_whole(args.output_dir, up_to=self.proved), newest_whole(args.output_dir)
            none = f"none ({saved.name} has given no finite loss yet)" if saved else "none yet"
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row, up to step {votes.step + 1}, had a loss or a gradient that is not "
                f"finite; the last good checkpoint is {last or none}. Try a lower base_lr, longer warmup_steps, "
                f"max_grad_norm 1{', bf16 in place of fp16' if args.fp16 else ''}, and look at the images named above"
            )
        if stop and control is not None:
            self.signal = self.listener.asked or signal.SIGTERM  # or: another rank was told to stop
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def full_tensor(value):
    """The whole of a DTensor, which a sharded model has; every rank has to ask. Anything else is returned as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _send(votes: Tensor) -> tuple[Tensor, torch.Event | None]:
    """Start copying the votes to the host. Returns the copy, and the event of its arrival (None on a CPU)."""
    if votes.device.type == "cpu":
        return votes, None
    host = torch.empty_like(votes, device="cpu", pin_memory=True).copy_(votes, non_blocking=True)
    event = torch.Event(votes.device)
    event.record()
    return host, event

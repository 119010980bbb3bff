"""The optimizer's parameter groups, and how their learning rates go."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_mim.evaluation.classifier import parameter_depths
from hf_mim.models.target_encoder import online_encoder
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.trainer_utils import decayed_parameters

if TYPE_CHECKING:
    from transformers import Trainer as Base  # stands after the mixin among the bases
else:
    Base = object


class RatesTrainer(Base):
    """A mixin that must stand before `transformers.Trainer` among a trainer's bases."""

    if TYPE_CHECKING:
        args: MIMTrainingArguments

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters with weight decay: see `decayed_parameters`."""
        return decayed_parameters(model)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        names = set(self.get_decay_parameter_names(model))
        decayed = {id(parameter) for name, parameter in model.named_parameters() if name in names}
        for group in optimizer.param_groups:
            group["decays"] = any(id(parameter) in decayed for parameter in group["params"])
        if self.args.encoder_layer_decay < 1:
            optimizer.param_groups[:] = self._groups_by_depth(optimizer.param_groups, online_encoder(model))
        return optimizer

    def _groups_by_depth(self, groups: list[dict], encoder: nn.Module) -> list[dict]:
        """The groups, divided by the depth of the encoder's parameters, which decides the `lr_scale` of a group.

        It is 1 above the blocks and for all that is not the encoder, and falls by `encoder_layer_decay` from block to
        block. The first group has 1, because Trainer logs its learning rate.
        """
        depths, parameters = parameter_depths(encoder), dict(encoder.named_parameters())
        top = max(depths.values())
        scales = {
            id(parameters[name]): self.args.encoder_layer_decay ** (top - depth) for name, depth in depths.items()
        }
        divided = []
        for group in groups:
            parts = {}
            for parameter in group["params"]:
                parts.setdefault(scales.get(id(parameter), 1.0), []).append(parameter)
            for scale in sorted(parts, reverse=True):
                rate = scale * self.args.learning_rate
                divided.append(group | {"params": parts[scale], "lr_scale": scale, "lr": rate})
        return divided

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            check_schedule(self.args, num_training_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer,
                lambda step: self.args.learning_rate_at(step, num_training_steps) / self.args.learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As Trainer's, but learning rate and betas are those that are given now, not those of the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._created_lr_scheduler:
            return
        args, scheduler = self.args, getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        groups = self.optimizer.param_groups
        scheduler.base_lrs = [group.get("lr_scale", 1.0) * args.learning_rate for group in groups]
        shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
        rates = [share * peak for share, peak in zip(shares, scheduler.base_lrs, strict=True)]
        for group, rate, peak in zip(groups, rates, scheduler.base_lrs, strict=True):
            group |= {"lr": rate, "initial_lr": peak}
            group |= {"betas": (args.adam_beta1, args.adam_beta2)} if "betas" in group else {}
            group |= {"eps": args.adam_epsilon} if "eps" in group else {}
        scheduler._last_lr = rates


def check_schedule(args: MIMTrainingArguments, steps: int):
    """Raise ValueError if warm-up and decay are longer than the run."""
    if args.warmup_steps > steps:
        raise ValueError(
            f"warmup_steps must be at most the {steps} steps of the run, or below 1 as a share of them, "
            f"not {args.warmup_steps:g}"
        )
    warmup, start = args.get_warmup_steps(steps), args.decay_start(steps)
    if start is not None and start < warmup:
        raise ValueError(
            f"warmup_steps and decay_steps must together be at most the {steps} steps of the run, not {warmup} and "
            f"{steps - start}"
        )

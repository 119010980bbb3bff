"""The target network: a copy of the online one that follows it as an exponential moving average (EMA).

Also the two interpolations that schedules of the models use; `hf_mim.trainer_utils` builds on them.
"""

import math

import torch
from transformers import initialization as init


def linear(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 on a straight line."""
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 on half a cosine wave."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def check_momentum(config):
    """Raise ValueError for a momentum outside [0, 1]."""
    for name in ("momentum_start", "momentum_end"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(config, name)}")


class TargetNetworkMixin:
    """For pretraining models with EMA targets; it stands before the `PreTrainedModel` among the bases.

    The model names its `(target, online)` modules in `target_pairs()`. The target equals the online network at the
    start, never gets a gradient, and is always in evaluation mode (no drop path). It stays in float32 when the rest is
    loaded in half precision, because in bfloat16 with momentum .999 it would never move.
    """

    def post_init(self):
        super().post_init()
        targets = [target for target, _ in self.target_pairs()]
        names = {name for name, module in self.named_modules() if any(module is target for target in targets)}
        self._keep_in_fp32_modules_strict |= names

    @torch.no_grad()
    def initialize_weights(self):
        # transformers calls this for a new model and at the end of every load. `init.copy_` does nothing to a parameter
        # that was loaded, so three cases come out right: a new model (target := online), a whole checkpoint (neither
        # changes), and a checkpoint of StoP-JEPA's encoder alone, which is the target (online := target).
        super().initialize_weights()
        for target, online in self.target_pairs():
            for t, o in zip(target.parameters(), online.parameters(), strict=True):
                if getattr(t, "_is_hf_initialized", False):  # the target was loaded
                    init.copy_(o, t.to(o.dtype))
                init.copy_(t, o.to(t.dtype))
            target.requires_grad_(False).eval()  # here again, because a load sets requires_grad on all that it loads

    def train(self, mode: bool = True):
        super().train(mode)
        for target, _ in self.target_pairs():
            target.eval()
        return self

    def momentum(self, progress: float) -> float:
        """The share of the old target that an update at this `progress` in [0, 1] keeps."""
        interpolate = {"linear": linear, "cosine": cosine}[self.config.momentum_schedule]
        return interpolate(self.config.momentum_start, self.config.momentum_end, progress)

    @torch.no_grad()
    def update_target(self, progress: float, skip: torch.Tensor | None = None):
        """target ← momentum · target + (1 - momentum) · online; call once after each optimizer step.

        `skip` is 0-dim, on the device. Where it is 1 the target stays as it is; the host need not read it.
        """
        weight = 1 - self.momentum(progress)
        for target, online in self.target_pairs():
            targets = [_local(parameter) for parameter in target.parameters()]
            sources = [_local(o).to(t.dtype) for t, o in zip(targets, online.parameters(), strict=True)]
            if skip is None:
                torch._foreach_lerp_(targets, sources, weight)
            else:
                weights = (weight * (1 - skip)).to(targets[0].dtype)
                torch._foreach_lerp_(targets, sources, [weights] * len(targets))


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """A sharded parameter (a DTensor) → this process's shard. Target and online network are sharded alike."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def online_encoder(model):
    """The encoder of a pretraining model that gets gradients."""
    pairs = model.target_pairs() if isinstance(model, TargetNetworkMixin) else []
    return next((online for _, online in pairs if type(online) is type(model.base_model)), model.base_model)

"""The target network: a copy of the online one that follows it as an exponential moving average (EMA).

Also the two interpolations that models schedule by; `hf_mim.trainer_utils` builds on them.
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
    """For pretraining models with EMA targets; goes before the `PreTrainedModel` in the bases.

    The model names its `(target, online)` modules in `target_pairs()`. The target equals the online network at the
    start, never gets a gradient, is always in evaluation mode (no drop path), and stays in float32 when the rest is
    loaded in half precision: in bfloat16 with momentum .999 it would never move.
    """

    def post_init(self):
        super().post_init()
        targets = [target for target, _ in self.target_pairs()]
        names = {name for name, module in self.named_modules() if any(module is target for target in targets)}
        self._keep_in_fp32_modules_strict |= names

    @torch.no_grad()
    def initialize_weights(self):
        # Runs from scratch and at the end of every load, which has set requires_grad on all that it loaded.
        super().initialize_weights()
        for target, online in self.target_pairs():
            for t, o in zip(target.parameters(), online.parameters(), strict=True):
                if getattr(t, "_is_hf_initialized", False):  # loaded: from a checkpoint of the encoder, it alone
                    init.copy_(o, t.to(o.dtype))  # leaves what was loaded alone
                init.copy_(t, o.to(t.dtype))
            target.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        for target, _ in self.target_pairs():
            target.eval()
        return self

    def momentum(self, progress: float) -> float:
        """Share of the old target that an update at `progress` in [0, 1] keeps."""
        interpolate = {"linear": linear, "cosine": cosine}[self.config.momentum_schedule]
        return interpolate(self.config.momentum_start, self.config.momentum_end, progress)

    @torch.no_grad()
    def update_target(self, progress: float, skip: torch.Tensor | None = None):
        """target ← momentum · target + (1 - momentum) · online; call once after each optimizer step.

        `skip`, 0-dim on the device: where it is 1, the target stays as it is, and the host does not have to know.
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
    """Of a sharded parameter (a DTensor) this process's shard; target and online network are sharded alike."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter

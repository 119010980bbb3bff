"""The target network: a copy of the online one that follows it as an exponential moving average (EMA), or a frozen one.

Also the two interpolations that schedules of the models use; `hf_mim.trainer_utils` builds on them.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_vit import MIMConfig

if TYPE_CHECKING:
    from .vit import MIMPreTrainedModel as Base  # stands after the mixin among the bases
    from .vit import ViTEncoder
else:
    Base = object


def linear(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 on a straight line."""
    return start + (end - start) * progress


def cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at progress 1 on half a cosine wave."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


# What decides the weights and the features of an encoder, beside the images that it takes.
ENCODER_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "use_cls_token")
ENCODER_FIELDS += ("layer_norm_eps", "hidden_act", "num_register_tokens")


def target_encoder_config(config: MIMConfig) -> MIMConfig:
    """The config of the target encoder: that of a frozen one by `target_config`, or else that of the model."""
    if getattr(config, "target_config", None) is None:
        return config
    same = {name: getattr(config, name) for name in ("image_size", "patch_size", "num_channels")}
    return MIMConfig(**same, **config.target_config)


def check_target(config: MIMConfig) -> None:
    """Raise ValueError for a momentum outside [0, 1], or a frozen target that is no encoder."""
    if getattr(config, "target_config", None) is not None:
        config.target_config.setdefault("num_register_tokens", 0)  # checkpoints from before there were any
        if set(config.target_config) != set(ENCODER_FIELDS):
            raise ValueError(f"target_config must have {', '.join(ENCODER_FIELDS)}, not {config.target_config}")
        target_encoder_config(config).check_fields()
    for name in ("momentum_start", "momentum_end"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {getattr(config, name)}")


class TargetNetworkMixin(Base):
    """For pretraining models with EMA targets; it stands before the `PreTrainedModel` among the bases.

    The model names its `(target, online)` modules in `target_pairs()`. If there are none, its `target_encoder` is
    frozen: it has the weights of another checkpoint and never moves. An EMA target equals the online network at the
    start, never gets a gradient, and is always in evaluation mode (no drop path). It stays in float32 when the rest is
    loaded in half precision, because in bfloat16 with momentum .999 it would never move.
    """

    if TYPE_CHECKING:
        target_encoder: ViTEncoder
        target_pairs: Callable[[], list[tuple[nn.Module, nn.Module]]]

    def post_init(self) -> None:
        super().post_init()
        targets = self.target_networks()
        names = {name for name, module in self.named_modules() if any(module is target for target in targets)}
        self._keep_in_fp32_modules_strict |= names  # type: ignore[operator]  # transformers has made it a set

    def target_networks(self) -> list[nn.Module]:
        """The modules that give the targets."""
        return [target for target, _ in self.target_pairs()] or [self.target_encoder]

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # transformers calls this for a new model and at the end of every load. `init.copy_` does nothing to a parameter
        # that was loaded, so three cases come out right: a new model (target := online), a whole checkpoint (neither
        # changes), and a checkpoint of StoP-JEPA's encoder alone, which is the target (online := target).
        super().initialize_weights()
        for target, online in self.target_pairs():
            for t, o in zip(target.parameters(), online.parameters(), strict=True):
                if getattr(t, "_is_hf_initialized", False):  # the target was loaded
                    init.copy_(o, t.to(o.dtype))
                init.copy_(t, o.to(t.dtype))
        for target in self.target_networks():
            target.requires_grad_(False).eval()  # here again, because a load sets requires_grad on all that it loads

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for target in self.target_networks():
            target.eval()
        return self

    def momentum(self, progress: float) -> float:
        """The share of the old target that an update at this `progress` in [0, 1] keeps."""
        interpolate = {"linear": linear, "cosine": cosine}[self.config.momentum_schedule]
        return interpolate(self.config.momentum_start, self.config.momentum_end, progress)

    @torch.no_grad()
    def update_target(self, progress: float, skip: torch.Tensor | None = None) -> None:
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


def online_encoder(model: PreTrainedModel) -> nn.Module:
    """The encoder of a pretraining model that gets gradients."""
    pairs = model.target_pairs() if isinstance(model, TargetNetworkMixin) else []
    return next((online for _, online in pairs if type(online) is type(model.base_model)), model.base_model)

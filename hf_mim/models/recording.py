"""`return_dict`, `output_hidden_states` and `output_attentions` for the `forward` of a pretraining model."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple


def pretraining_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `forward` of a pretraining model, so that it takes what transformers' models take besides.

    - `return_dict=False`: a tuple without what is None.
    - `output_hidden_states`: the residual stream of `self.encoder`, which sees the context: before each layer and after
      the last, before the final norm, each `[B, prefix + Nc, D]`.
    - `output_attentions`: its attention weights `[B, heads, prefix + Nc, prefix + Nc]`; they need
      `attn_implementation="eager"`, as elsewhere in transformers.

    Their defaults are the config's. Any other argument that `forward` does not name is a TypeError.
    """

    @functools.wraps(forward)
    def recorded(
        self: Any,
        *args: Any,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        asked = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        defaults = {name: getattr(self.config, f"output_{name}", False) for name in asked}
        wanted = [name for name in asked if (defaults[name] if asked[name] is None else asked[name])]
        if not wanted:
            return forward(self, *args, **kwargs)
        with recording(self.encoder) as seen:
            output = forward(self, *args, **kwargs)
        for name in wanted:
            output[name] = tuple(seen[name])
        return output

    return can_return_tuple(recorded)


@contextlib.contextmanager
def recording(encoder: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Inside, a pass of the encoder fills "hidden_states" and "attentions" of the dictionary that this yields."""
    seen: dict[str, list[torch.Tensor]] = {"hidden_states": [], "attentions": []}
    layers: Any = encoder.layers
    hooks = [layers[-1].register_forward_hook(lambda layer, args, output: seen["hidden_states"].append(output))]
    for layer in layers:
        hooks += [
            layer.register_forward_pre_hook(lambda layer, args: seen["hidden_states"].append(args[0])),
            layer.attention.register_forward_hook(lambda layer, args, output: seen["attentions"].append(output[1])),
        ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()

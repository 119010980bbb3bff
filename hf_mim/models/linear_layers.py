"""Parts of a linear layer's `A·x + b`, right also for a module that replaces the layer.

Users replace `nn.Linear` by a layer that multiplies in fp8 or by a LoRA adapter. Code that reads the `weight` of such a
module would silently skip what the module adds. So this package reads the weight only of a plain `nn.Linear`, where
that saves work. Every other module is called.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn


def is_plain(module: nn.Module) -> bool:
    """Whether a call of `module` computes `F.linear(x, weight, bias)` and nothing else.

    A subclass, a wrapper, hooks (tensor parallelism, pruning) or a replaced `forward` (offloading) do more.
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def input_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that the inputs of a linear layer need: that of its first parameter with at least 16 bits.

    Quantised weights are int8 or fp8, and no input may be. The bias or the scale of such a layer has the right dtype.
    """
    return next(p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1)


def bias_of(module: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """b `[out]` of a linear layer whose inputs look like `like [..., in]`."""
    if is_plain(module):
        return cast(torch.Tensor, module.bias)
    zeros = like.new_zeros(16, like.shape[-1], dtype=input_dtype(module))  # fp8 kernels take no fewer than 16 rows
    return module(zeros)[0]


def product_without_bias(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A·x `[..., out]` of a linear layer for `x [..., in]`."""
    if is_plain(module):
        return F.linear(x, cast(torch.Tensor, module.weight))
    return module(x) - bias_of(module, x)

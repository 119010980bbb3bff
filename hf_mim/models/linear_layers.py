"""Parts of a linear layer's `A·x + b` that are right for a module that replaces the layer, too.

Users replace `nn.Linear` by a layer that multiplies in fp8 or by a LoRA adapter. Code that reads the `weight` of such a
module would silently skip what the module adds. So this package reads the weight only of a plain `nn.Linear`, where it
saves work, and calls every other module.
"""

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
    """The dtype of the inputs of a linear layer: that of its first parameter in at least 16 bits.

    Quantised weights have a dtype (int8, fp8) in which no input may come; their bias or scale tells the right one.
    """
    return next(p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1)


def bias_of(module: nn.Module, like: torch.Tensor) -> torch.Tensor:
    """b `[out]` of a linear layer with inputs as `like [..., in]`."""
    if is_plain(module):
        return module.bias
    zeros = like.new_zeros(16, like.shape[-1], dtype=input_dtype(module))  # fp8 kernels take no fewer than 16 rows
    return module(zeros)[0]


def product_without_bias(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A·x `[..., out]` of a linear layer for `x [..., in]`."""
    if is_plain(module):
        return F.linear(x, module.weight)
    return module(x) - bias_of(module, x)

"""Tensors of all ranks of a distributed training. In a single process each function gives back what it was given."""

from typing import Any

import torch
import torch.distributed as dist


def rank_and_count() -> tuple[int, int]:
    """The number of this rank, and how many there are."""
    is_distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, ...]` of each rank, of one shape → `[ranks · B, ...]`, in the order of the ranks. It carries no gradient."""
    count = rank_and_count()[1]
    if count == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(count)]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks. The gradient is that of the mean of the losses of all ranks."""
    return tensor if rank_and_count()[1] == 1 else _Mean.apply(tensor)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _mean(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        # Each rank's loss depends on the mean, and the trainer averages the gradients of the ranks, not their sum.
        return _mean(gradient)


def _mean(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total / rank_and_count()[1]

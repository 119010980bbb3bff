"""Divide labelled images by class and by a seed: one part to fit on, the other to choose by."""

import torch
from torch import Tensor


def check_labels(labels: Tensor):
    """Raise ValueError, in one line, unless all labels [n] of training images are known and of two classes or more."""
    if len(labels) == 0:
        raise ValueError("train holds no images")
    unlabelled = int((labels < 0).sum())
    if unlabelled:
        raise ValueError(f"{unlabelled} of the {len(labels)} images of train have no label; leave them out")
    if labels.min() == labels.max():
        raise ValueError(f"train must hold at least two classes; all its {len(labels)} images are of one")


def random_ranks(labels: Tensor, *seed: int) -> tuple[Tensor, Tensor]:
    """(rank [n], size [n]): each image's place, from 0, in a random order of its class, and the size of that class.

    The images with `rank < k` are k of each class. A larger k keeps the images of a smaller one.
    """
    order = torch.randperm(len(labels), generator=generator(*seed))
    order = order[labels[order].argsort(stable=True)]  # class by class, at random within
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[classes[order]]
    return ranks, counts[classes]


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Ids (kept, held out). About `share` of each class is held out, at least one image and never all.

    A class with a single image keeps it. Raises ValueError if that leaves nothing to hold out.
    """
    ranks, counts = random_ranks(labels, seed)
    held = ranks < (counts * share).round().clamp(min=1).minimum(counts - 1)
    if not held.any():
        raise ValueError("train must hold a class with two images or more: a part of them is held out to choose by")
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def generator(*seed: int) -> torch.Generator:
    """A random generator on the CPU. Each sequence of whole numbers in 0..2³²-1 gives its own random numbers."""
    from numpy.random import SeedSequence

    # SeedSequence([1]) equals SeedSequence([1, 0]); the length in front tells them apart.
    state = SeedSequence([len(seed), *seed]).generate_state(1, dtype="uint64")[0]
    return torch.Generator().manual_seed(int(state >> 1))

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


def stratified_split(labels: Tensor, share: float, seed: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids (kept, held out). About `share` of each class is held out, at least one image and never all.

    A class with a single image keeps it. With `groups` [n], all images of a group are on one side, and each class keeps
    a group at least. Raises ValueError if that leaves nothing to hold out.
    """
    if groups is not None:
        return _grouped_split(labels, share, seed, groups)
    ranks, counts = random_ranks(labels, seed)
    held = ranks < (counts * share).round().clamp(min=1).minimum(counts - 1)
    if not held.any():
        raise ValueError("train must hold a class with two images or more: a part of them is held out to choose by")
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _grouped_split(labels: Tensor, share: float, seed: int, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Take groups in a random order. Hold one out if that brings the numbers of its classes nearer to their share."""
    counts = labels.unique(return_inverse=True, return_counts=True)[1:]
    classes, left = counts[0], counts[1].tolist()  # left: images of each class that are kept
    wanted = [max(1.0, share * size) for size in left]
    pairs, numbers = torch.stack([groups.unique(return_inverse=True)[1], classes]).unique(dim=1, return_counts=True)
    contents: dict[int, list[tuple[int, int]]] = {}
    for group, label, number in zip(*pairs.tolist(), numbers.tolist(), strict=True):
        contents.setdefault(group, []).append((label, number))
    order = torch.randperm(len(contents), generator=generator(seed)).tolist()

    def gain(group: int) -> float:
        """How much nearer to their share the classes come; negative for further away."""
        return sum(abs(wanted[label]) - abs(wanted[label] - number) for label, number in contents[group])

    held = set()
    for group in order:
        if all(left[label] > number for label, number in contents[group]) and gain(group) > 0:
            held.add(group)
            for label, number in contents[group]:
                left[label], wanted[label] = left[label] - number, wanted[label] - number
    if not held:
        possible = [g for g in order if all(left[label] > number for label, number in contents[g])]
        if not possible:
            raise ValueError("group leaves nothing to hold out: no class has images of two groups that can be parted")
        held.add(max(possible, key=gain))
    chosen = torch.zeros(len(contents), dtype=torch.bool)
    chosen[sorted(held)] = True
    is_held = chosen[groups.unique(return_inverse=True)[1]]
    return (~is_held).nonzero()[:, 0], is_held.nonzero()[:, 0]


def random_split(count: int, share: float, *seed: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids (kept, held out) in random orders: about `share` of `count` images is held out, one at least and never all.

    With `groups` [count], whole groups are, and at most that many images where a group is not larger. Raises ValueError
    for a single group.
    """
    order = torch.randperm(count, generator=generator(*seed))
    wanted = min(max(round(share * count), 1), count - 1)
    if groups is None:
        return order[wanted:], order[:wanted]
    _, ids, sizes = groups.unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise ValueError("group must tell two groups at least in the training images, and all of them are of one")
    first = list(dict.fromkeys(ids[order].tolist()))  # the groups, in the order in which they are drawn
    number = int((sizes[first].cumsum(0) <= wanted).sum())
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[first[: max(1, number)]] = True
    held = chosen[ids[order]]
    return order[~held], order[held]


def generator(*seed: int) -> torch.Generator:
    """A random generator on the CPU. Each sequence of whole numbers in 0..2³²-1 gives its own random numbers."""
    from numpy.random import SeedSequence

    # SeedSequence([1]) equals SeedSequence([1, 0]); the length in front tells them apart.
    state = SeedSequence([len(seed), *seed]).generate_state(1, dtype="uint64")[0]
    return torch.Generator().manual_seed(int(state >> 1))

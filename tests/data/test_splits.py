"""Stratified, seeded choices of labelled images."""

import pytest
import torch

from hf_mim.data.splits import check_labels, generator, random_ranks, random_split, stratified_split

LABELS = torch.tensor([3] * 20 + [7] * 10 + [0] * 2 + [5])[torch.randperm(33, generator=generator(1))]


def test_every_sequence_of_seeds_has_a_stream_of_its_own():
    seeds = [(), (0,), (3,), (3, 0), (0, 3), (3, 0, 0), (1, 3), (3, 1)]
    assert len({generator(*seed).initial_seed() for seed in seeds}) == len(seeds)
    assert torch.equal(torch.rand(4, generator=generator(3, 1)), torch.rand(4, generator=generator(3, 1)))


def test_ranks_number_the_images_of_each_class():
    ranks, counts = random_ranks(LABELS, 4)
    for label, size in ((3, 20), (7, 10), (0, 2), (5, 1)):
        assert sorted(ranks[LABELS == label].tolist()) == list(range(size))
        assert counts[LABELS == label].unique().tolist() == [size]


def test_split_holds_out_the_share_of_every_class_and_leaves_it_some():
    kept, held = stratified_split(LABELS, 0.2, seed=0)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(33))
    assert {label: int((LABELS[held] == label).sum()) for label in (3, 7, 0, 5)} == {3: 4, 7: 2, 0: 1, 5: 0}
    assert int((LABELS[stratified_split(LABELS, 0.99, seed=0)[0]] == 7).sum()) == 1


def test_split_is_a_function_of_the_seed_and_not_of_the_global_one():
    torch.manual_seed(1)
    first = stratified_split(LABELS, 0.2, seed=0)[1]
    torch.manual_seed(2)
    assert torch.equal(first, stratified_split(LABELS, 0.2, seed=0)[1])
    assert not torch.equal(first, stratified_split(LABELS, 0.2, seed=1)[1])
    assert torch.equal(first.sort()[0], first), "in the order of the images, so that they are read in their order"


@pytest.mark.parametrize(
    "labels, message",
    [
        ([], "holds no images"),
        ([0, -1, 1], "1 of the 3 images of train have no label"),
        ([4, 4, 4], "at least two classes; all its 3 images are of one"),
    ],
)
def test_labels_that_cannot_be_used_are_told_in_one_line(labels, message):
    with pytest.raises(ValueError, match=message) as error:
        check_labels(torch.tensor(labels, dtype=torch.long))
    assert "\n" not in str(error.value)


def test_nothing_can_be_held_out_of_single_images():
    with pytest.raises(ValueError, match="two images or more"):
        stratified_split(torch.arange(5), 0.2, seed=0)


def grouped(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and groups of 300 images: groups of 1 to 9 images, each of one of three classes or of two of them."""
    random = generator(seed)
    sizes = torch.randint(1, 10, (300,), generator=random)
    groups = torch.repeat_interleave(torch.arange(300), sizes)[:300]
    labels = (groups % 3 + (torch.rand(300, generator=random) < 0.1)) % 3
    order = torch.randperm(300, generator=random)
    return labels[order], groups[order]


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides_and_each_class_gives_about_its_share(seed):
    labels, groups = grouped(seed)
    kept, held = stratified_split(labels, 0.2, seed, groups)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(300))
    assert not set(groups[kept].tolist()) & set(groups[held].tolist())
    shares = labels[held].bincount(minlength=3) / labels.bincount()
    assert ((shares - 0.2).abs() < 0.08).all(), shares
    again = stratified_split(labels, 0.2, seed, groups)
    assert torch.equal(kept, again[0]) and torch.equal(held, again[1])
    assert not torch.equal(held, stratified_split(labels, 0.2, seed + 9, groups)[1])
    assert torch.equal(held.sort()[0], held)


def test_a_class_of_one_group_stays_and_if_nothing_can_be_held_out_it_is_said():
    labels, groups = torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([5, 5, 5, 6, 6, 7, 7])
    kept, held = stratified_split(labels, 0.2, 0, groups)
    assert set(groups[held].tolist()) in ({6}, {7}) and 5 in groups[kept], "two are the least that can be held out"
    with pytest.raises(ValueError, match="group leaves nothing to hold out"):
        stratified_split(labels, 0.2, 0, labels)


def test_a_random_split_is_as_before_without_groups_and_keeps_groups_together():
    order = torch.randperm(30, generator=generator(3, 1))
    kept, held = random_split(30, 0.1, 3, 1)
    assert torch.equal(held, order[:3]) and torch.equal(kept, order[3:])
    groups = torch.arange(30) // 4
    kept, held = random_split(30, 0.3, 3, 1, groups=groups)
    assert not set(groups[kept].tolist()) & set(groups[held].tolist()) and len(held) in (6, 8)
    assert len(random_split(30, 0.01, 3, 1, groups=groups)[1]) in (2, 4), "one group at least"
    with pytest.raises(ValueError, match="group must tell two groups at least"):
        random_split(4, 0.5, 0, groups=torch.zeros(4))

"""Claims of Latent MIM, on tiny models and hand-made tensors."""

import math
from functools import partial

import passes
import pytest
import torch

from hf_mim.models.losses import normalized_l2, patch_discrimination
from hf_mim.models.modeling_latent_mim import mean_pairwise_cosine, patchify_with_gap

make = partial(passes.make, "latent_mim", mask_ratio=0.8, patch_gap=4)


def test_the_encoder_that_is_used_is_the_online_one():
    model = make()
    assert model.base_model is model.encoder


def test_each_patch_is_cut_at_its_offset_in_its_cell():
    images = torch.arange(2 * 3 * 12 * 18.0).reshape(2, 3, 12, 18)
    offsets = torch.randint(3, (2, 2, 3, 2), generator=torch.Generator().manual_seed(0))
    patches = patchify_with_gap(images, (4, 4), offsets, gap=2)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                top, left = 6 * row + int(offsets[b, row, column, 0]), 6 * column + int(offsets[b, row, column, 1])
                expected = images[b, :, top : top + 4, left : left + 4].permute(1, 2, 0).flatten()
                assert torch.equal(patches[b, row * 3 + column], expected)


def test_drawn_offsets_are_uniform_over_the_gap():
    model = make(patch_gap=3)
    offsets = model(torch.randn(50, 3, 56, 56)).patch_offsets
    counts = torch.bincount(offsets.flatten())
    assert len(counts) == 3 and (counts / counts.sum() - 1 / 3).abs().max() < 0.02


def test_without_a_gap_training_sees_what_evaluation_sees():
    model = make(patch_gap=0)
    images = torch.randn(2, 3, 32, 32)
    patches, grid, _ = model.draw(images)
    expected, expected_grid = model.encoder.cut(images)
    assert torch.equal(patches, expected) and grid == expected_grid == (8, 8)


def test_without_mask_target_the_targets_are_those_of_the_whole_image():
    model = make(mask_target=False, patch_gap=0).eval()
    with torch.no_grad():
        for parameter in model.target_encoder.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 32, 32)
    output = model(images)
    whole = model.target_projector(model.target_encoder(images).last_hidden_state[:, 1:])
    expected = torch.stack([tokens[ids] for tokens, ids in zip(whole, output.target_ids, strict=True)])
    torch.testing.assert_close(output.targets, expected)
    masked = passes.make("latent_mim", mask_ratio=0.8, patch_gap=0).eval()
    masked.load_state_dict(model.state_dict())
    assert not torch.allclose(masked(images, output.context_ids, output.target_ids).targets, expected, atol=1e-3)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_projector_has_as_many_linears_as_asked_for(depth):
    model = make(projector_num_layers=depth)
    shapes = [tuple(linear.weight.shape) for linear in model.projector.linears]
    width = model.config.projector_hidden_size
    assert len(shapes) == depth and shapes[0][1] == shapes[-1][0] == 48
    assert all(shape[0] == width for shape in shapes[:-1])
    with pytest.raises(ValueError, match="projector_num_layers must be at least 1, not 0"):
        make(projector_num_layers=0)


def test_a_wrong_training_size_is_refused_by_name():
    with pytest.raises(ValueError, match=r"patch_size \+ patch_gap = 8×8.*training_size is \(64, 64\)"):
        make()(torch.randn(2, 3, 32, 36))


def test_chance_of_patch_discrimination_is_known():
    """Equal logits everywhere: 2·temperature·ln K; perfect predictions fall far below."""
    targets = torch.zeros(3, 176, 16)
    predictions = torch.randn(3, 176, 16, generator=torch.Generator().manual_seed(0))
    chance = patch_discrimination(predictions, targets, 0.2)
    assert abs(chance - 0.4 * math.log(176)) < 1e-5 and abs(chance - 2.07) < 0.01
    assert patch_discrimination(predictions, predictions, 0.2) < 0.25 * chance


def test_patch_discrimination_compares_within_an_image_only():
    predictions, targets = torch.randn(2, 2, 10, 16, generator=torch.Generator().manual_seed(0))
    alone = [patch_discrimination(predictions[i : i + 1], targets[i : i + 1], 0.2) for i in range(2)]
    torch.testing.assert_close(patch_discrimination(predictions, targets, 0.2), sum(alone) / 2)


def test_normalized_l2_is_zero_for_standardised_targets_only():
    targets = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    standard = (targets - targets.mean(-1, keepdim=True)) / targets.std(-1, keepdim=True)
    assert normalized_l2(standard, targets) < 1e-10 < normalized_l2(targets, targets)


def test_mean_pairwise_cosine_of_orthogonal_equal_and_opposite_tokens():
    assert abs(mean_pairwise_cosine(torch.eye(8)[None]) - 1 / 8) < 1e-6
    assert abs(mean_pairwise_cosine(torch.ones(2, 5, 8)) - 1) < 1e-6
    assert abs(mean_pairwise_cosine(torch.tensor([[[1.0, 0], [-2, 0]]]))) < 1e-6


def test_similarity_target_moves_along_a_cosine_and_enters_the_loss():
    model = make()
    images = torch.randn(2, 3, 64, 64)
    drawn = model(images)
    given = {k: drawn[k] for k in ("context_ids", "target_ids", "patch_offsets")}
    for progress, target in ((0, 0.75), (0.5, 0.5), (1, 0.25)):
        model.set_progress(progress)
        output = model(images, **given)
        m = output.metrics
        term = (m["similarity_predictions"] - target) ** 2 + (m["similarity_visible"] - target) ** 2
        torch.testing.assert_close(output.loss.detach(), m["patch_discrimination"] + 0.1 * term)


def test_the_target_network_sees_only_masked_patches():
    model = make(patch_gap=0).eval()
    images = torch.randn(2, 3, 32, 32)
    first = model(images)
    given = {k: first[k] for k in ("context_ids", "target_ids", "patch_offsets")}
    patches, grid = model.encoder.cut(images)
    expected = model.target_encoder.encode(
        patches.gather(1, first.target_ids[..., None].expand(-1, -1, patches.shape[-1])), grid, first.target_ids
    )
    torch.testing.assert_close(model.target_projector(expected)[:, 1:], first.targets)
    assert torch.equal(model(images, **given).targets, first.targets)

"""SymMIM: what it promises beyond the matrix of `test_models.py`."""

import math

import pytest
import torch
from passes import drawn, make

from hf_mim.models.losses import info_nce
from hf_mim.models.masking import checkerboard, split_checkerboard
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.models.vit import patchify, unpatchify

GRIDS = [(8, 8), (7, 7), (6, 10), (5, 4), (1, 2)]


def sym_mim(**changes):
    return make("sym_mim", **changes)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("cell", [1, 2, 3])
def test_checkerboards_are_those_of_the_formula(grid, cell):
    fields = checkerboard(grid, cell).unflatten(0, grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            assert fields[i, j] == ((i // cell + j // cell) % 2 == 0)


@pytest.mark.parametrize(("side", "cell", "swaps"), [(14, 1, True), (8, 2, True), (14, 2, False), (7, 1, False)])
def test_a_mirror_image_swaps_the_halves_only_of_an_even_number_of_whole_cells(side, cell, swaps):
    fields = checkerboard((side, side), cell).unflatten(0, (side, side))
    assert fields.flip(0).equal(~fields) == fields.flip(1).equal(~fields) == swaps
    assert fields.flip(0, 1).equal(fields)  # through the centre, a patch and its image are always of one half


@pytest.mark.parametrize("grid", GRIDS)
def test_both_halves_are_of_one_length_and_of_one_colour_each(grid):
    pattern, count = checkerboard(grid), math.prod(grid) // 2
    inverted = torch.tensor([False, True] * 4)
    ids, others = split_checkerboard(grid, 1, inverted, torch.rand(8, len(pattern)))
    assert ids.shape == others.shape == (8, count)
    assert all(pattern[row].eq(not flip).all() for row, flip in zip(ids, inverted, strict=True))
    assert all(pattern[row].eq(flip).all() for row, flip in zip(others, inverted, strict=True))
    assert all(len(set(row.tolist())) == count for row in ids)


def test_which_patches_of_a_larger_half_are_left_out_is_drawn():
    torch.manual_seed(0)
    ids, _ = split_checkerboard((3, 3), 1, torch.zeros(200, dtype=torch.bool), torch.rand(200, 9))
    assert torch.bincount(ids.flatten(), minlength=9)[::2].min() > 130  # 160 of 200 are expected


@pytest.mark.parametrize("phase", ["random", "fixed"])
def test_no_half_of_the_places_is_never_predicted_unless_the_phase_is_fixed(phase):
    model = sym_mim(mask_phase=phase)
    torch.manual_seed(0)
    masks = model.draw_masks(64, (8, 8))
    for name in masks:
        places = torch.bincount(masks[name].flatten(), minlength=64).unflatten(0, (8, 8))
        assert bool((places > 0).all()) == (phase == "random")


def test_random_halves_are_no_checkerboard():
    masks = sym_mim(mask_pattern="random", mask_cell=50).draw_masks(4, (8, 8))
    for ids in masks.values():
        assert ids.shape == (4, 32) and len(set(checkerboard((8, 8))[ids[0]].tolist())) == 2


def test_the_target_encoder_sees_the_coarse_cells_and_nothing_else():
    model, images = sym_mim(), torch.randn(4, 3, 32, 32)
    masks = model.draw_masks(4, (8, 8))
    before = model(images, **masks).metrics
    hidden = torch.ones(4, 64, dtype=torch.bool).scatter(1, masks["target_context_ids"], False)
    seen_online = torch.zeros(4, 64, dtype=torch.bool).scatter(1, masks["context_ids"], True)
    patches = patchify(images, (4, 4))
    other = torch.where((hidden & ~seen_online)[..., None], torch.randn_like(patches), patches)
    after = model(unpatchify(other, (4, 4), (8, 8)), **masks).metrics
    for name in ("contrast", "target_std", "feature_std"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["reconstruction"], after["reconstruction"])


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_without_the_contrast_it_is_mae_on_the_same_ids(norm_pix_loss):
    model = sym_mim(contrast_weight=0, norm_pix_loss=norm_pix_loss)
    assert {name.partition(".")[0] for name in model.state_dict()} == {"encoder", "decoder"}
    assert model.target_pairs() == model.target_networks() == []
    mae = MAEForPreTraining(make("mae", norm_pix_loss=norm_pix_loss).config)
    mae.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    output = drawn(model, images)
    assert "target_context_ids" not in output and "contrast" not in output.metrics
    ids = {"context_ids": output.context_ids, "target_ids": output.target_ids}
    assert torch.equal(mae(images, **ids).loss, output.loss)


def test_info_nce_is_that_of_a_loop_in_float64():
    torch.manual_seed(0)
    queries, keys = torch.randn(3, 16), torch.randn(7, 16)
    losses = []
    for number, query in enumerate(queries.double()):
        cosines = [torch.dot(query, key) / (query.norm() * key.norm()) for key in keys.double()]
        likelihoods = [math.exp(cosine / 0.3) for cosine in cosines]
        losses.append(-math.log(likelihoods[number + 2] / sum(likelihoods)))
    assert info_nce(queries, keys, 0.3, first=2).item() == pytest.approx(2 * 0.3 * sum(losses) / 3, rel=1e-6)
    valid = torch.tensor([True, False, True])
    kept = 2 * 0.3 * (losses[0] + losses[2]) / 2
    assert info_nce(queries, keys, 0.3, 2, valid).item() == pytest.approx(kept, rel=1e-6)
    equal = info_nce(torch.ones(4, 16), torch.ones(4, 16), 0.2).item()
    assert equal == pytest.approx(2 * 0.2 * math.log(4), rel=1e-6)


def test_info_nce_stays_in_float32_under_autocast(monkeypatch):
    model, images, seen = sym_mim(), torch.randn(8, 3, 32, 32), []

    def spy(*words):
        seen.append((words, info_nce(*words)))
        return seen[-1][1]

    monkeypatch.setattr("hf_mim.models.modeling_sym_mim.info_nce", spy)
    with torch.autocast("cpu", torch.bfloat16):
        output = drawn(model, images)
    ((words, loss),) = seen
    assert words[0].dtype == words[1].dtype == loss.dtype == torch.float32
    torch.testing.assert_close(output.metrics["contrast"], info_nce(*words), rtol=1e-6, atol=0)


def test_the_loss_is_the_reconstruction_and_the_weighted_contrast():
    images = torch.randn(8, 3, 32, 32)
    output = drawn(sym_mim(contrast_weight=0.3), images)
    parts = output.metrics
    torch.testing.assert_close(output.loss, parts["reconstruction"] + 0.3 * parts["contrast"])


def test_a_batch_is_standardised_as_batch_norm_does_it():
    model = sym_mim()
    features = torch.randn(16, model.config.hidden_size)
    layers = list(model.projector)
    norm = torch.nn.BatchNorm1d(model.config.projector_hidden_size, affine=False).train()
    torch.testing.assert_close(layers[1](layers[0](features)), norm(layers[0](features)))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mask_cell": 0}, "mask_cell must be at least 1, not 0"),
        ({"mask_cell": 8}, "mask_cell must be below 8, so that 8×8 patches have two cells at least, not 8"),
        ({"image_size": 4}, "image_size must hold two patches at least, and there is one"),
        ({"contrast_weight": -1}, "contrast_weight must be 0 or more, got -1"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"momentum_end": 2}, r"momentum_end must be in \[0, 1\], got 2"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        sym_mim(**settings)

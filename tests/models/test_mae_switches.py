"""MAE's masks in units of several patches, its decoder by cross-attention, and registers of every encoder."""

from functools import partial

import passes
import pytest
import torch
from tiny import METHODS

from hf_mim.models.masking import patches_of_units

make = partial(passes.make, "mae")


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("grid", "unit"), [((8, 8), 2), ((4, 6), 2), ((6, 9), 3), ((5, 7), 1)])
def test_a_unit_has_the_patches_of_its_square(grid, unit):
    rows, columns = grid[0] // unit, grid[1] // unit
    ids = patches_of_units(torch.arange(rows * columns)[None], grid, unit)[0].unflatten(0, (rows * columns, -1))
    for row in range(grid[0]):
        for column in range(grid[1]):
            assert row * grid[1] + column in ids[row // unit * columns + column // unit]


def test_masks_of_units_are_whole_squares_and_uniform():
    model = make(mask_unit=2)
    torch.manual_seed(0)
    masks = model.draw_masks(2000, (8, 8))
    assert masks["context_ids"].shape == (2000, 16) and masks["target_ids"].shape == (2000, 48)
    seen = torch.zeros(2000, 64).scatter(1, masks["context_ids"], 1).unflatten(1, (4, 2, 4, 2))
    assert torch.equal(seen, seen[:, :, :1, :, :1].expand_as(seen))
    assert (seen.mean(dim=0) - 0.25).abs().max() < 0.04
    every = torch.cat([*masks.values()], dim=1).sort(dim=1).values
    assert torch.equal(every, torch.arange(64).expand(2000, -1))


def test_units_of_one_patch_are_masks_of_patches_to_the_bit():
    plain, model = make(), make(mask_unit=1, decoder_targets=1.0, num_register_tokens=0)
    torch.manual_seed(1)
    expected = plain.draw_masks(3, (8, 8))
    torch.manual_seed(1)
    for name, ids in model.draw_masks(3, (8, 8), **model.training_masks()).items():
        assert torch.equal(ids, expected[name])


def test_a_step_predicts_a_random_share_of_the_masked_patches_and_an_evaluation_all():
    model = make(decoder_attention="cross", decoder_targets=0.25)
    torch.manual_seed(0)
    output = model.train()(images())
    assert output.context_ids.shape == (4, 16) and output.target_ids.shape == output.predictions.shape[:2] == (4, 12)
    assert len(model.eval()(images()).target_ids[0]) == 48
    places = torch.cat([model.train()(images(64)).target_ids.flatten() for _ in range(20)])
    assert torch.bincount(places, minlength=64).min() > 0.7 * len(places) / 64
    filled, mask = model.reconstruct(images())
    assert mask.sum(dim=(1, 2, 3)).tolist() == [48 * 16] * 4


def test_with_cross_attention_each_patch_is_predicted_by_itself():
    model = make(decoder_attention="cross").eval()
    whole = passes.drawn(model, images())
    part = model(images(), whole.context_ids, whole.target_ids[:, 5:9])
    torch.testing.assert_close(part.predictions, whole.predictions[:, 5:9])
    assert not any(isinstance(module, type(model.encoder.layers[0])) for module in model.decoder.modules())
    plain = make().eval()
    together = passes.drawn(plain, images())
    alone = plain(images(), together.context_ids, together.target_ids[:, 5:9]).predictions
    assert (alone - together.predictions[:, 5:9]).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_registers_take_part_and_are_not_read(method):
    encoder = passes.make(method, num_register_tokens=3).encoder.eval()
    config = encoder.config
    assert config.num_prefix_tokens == config.use_cls_token + 3
    output = encoder(images())
    assert output.last_hidden_state.shape[1] == config.num_prefix_tokens + 64
    torch.testing.assert_close(
        output.pooler_output, output.last_hidden_state[:, config.num_prefix_tokens :].mean(dim=1)
    )
    with torch.no_grad():
        encoder.embeddings.register_tokens.normal_()
    assert (encoder(images()).pooler_output - output.pooler_output).abs().max() > 1e-3
    # They have no position: a pass over another grid only resamples the patches' places.
    assert encoder(images()[..., :20]).last_hidden_state.shape[1] == config.num_prefix_tokens + 40


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"mask_unit": 0}, "mask_unit must be at least 1, not 0"),
        ({"mask_unit": 3}, "mask_unit must divide the sides of the grid of 8×8 patches, not 3"),
        ({"mask_unit": 8}, "mask_unit must be below 8, so that a grid of 8×8 patches has two units at least, not 8"),
        ({"mask_unit": 4, "mask_ratio": 0.9}, "mask_ratio must leave between 1 and 3 of the 4 units visible, got 0.9"),
        ({"decoder_targets": 0.5}, "decoder_targets must be 1 with decoder_attention 'self', not 0.5"),
        ({"decoder_targets": 0, "decoder_attention": "cross"}, "decoder_targets must be above 0 and at most 1, got 0"),
        ({"num_register_tokens": -1}, "num_register_tokens must be 0 or more, not -1"),
    ],
)
def test_wrong_switches_are_refused_in_one_line(settings, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        make(**settings)

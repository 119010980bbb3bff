import math

import pytest
import torch
from passes import make
from transformers import ViTMAEConfig, ViTMAEModel

import hf_mim
from hf_mim.models.positions import PositionEmbeddings, resize_table, sincos_table


def test_table_is_column_half_first_by_the_formula():
    table = sincos_table((2, 3), 16, num_prefix_tokens=1)
    assert table.shape == (7, 16) and not table[0].any()
    for row in range(2):
        for column in range(3):
            code = [
                f(place / 10000 ** (i / 4)) for place in (column, row) for f in (math.sin, math.cos) for i in range(4)
            ]
            torch.testing.assert_close(table[1 + row * 3 + column], torch.tensor(code))


def test_rescaled_places_run_to_the_whole_grid():
    """Latent MIM's linspace(0, 1, n) · n: steps of n / (n - 1)."""
    table = sincos_table((1, 5), 4, rescaled=True)
    torch.testing.assert_close(table[:, 0], torch.tensor([math.sin(5 / 4 * i) for i in range(5)]))


def test_resized_positions_equal_those_of_transformers():
    theirs = ViTMAEModel(
        ViTMAEConfig(image_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).embeddings
    theirs.initialize_weights()
    table = torch.randn(17, 32)
    theirs.position_embeddings.data = table[None]
    expected = theirs.interpolate_pos_encoding(torch.empty(1, 7 * 3 + 1, 32), 7 * 16, 3 * 16)[0]
    torch.testing.assert_close(resize_table(table, (4, 4), (7, 3), num_prefix_tokens=1), expected)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_trained_grid_gets_its_table_as_it_is(grid):
    sizes = dict(hidden_size=16, num_attention_heads=1, num_hidden_layers=1)
    config = hf_mim.MAEConfig(image_size=tuple(16 * side for side in grid), **sizes)
    positions = PositionEmbeddings(config, 16)
    positions.init_weights()
    prefix, places = positions(grid, torch.float32)
    assert len(prefix) == 1 and prefix.data_ptr() == positions.table.data_ptr()
    assert torch.equal(torch.cat([prefix, places]), positions.table)


def test_learned_positions_are_trained_saved_and_copied_to_the_target(tmp_path):
    model = make("stop_jepa", position_embedding="learned")
    model(torch.randn(2, 3, 32, 32)).loss.backward()
    name = "embeddings.position_embeddings.table"
    online, target = model.encoder.get_parameter(name), model.target_encoder.get_parameter(name)
    assert online.grad.any() and model.predictor.position_embeddings.table.grad.any()
    assert torch.equal(online, target) and not target.requires_grad
    assert abs(online.std() - 0.02) < 0.002
    model.save_pretrained(tmp_path)
    assert torch.equal(hf_mim.StopJepaForPreTraining.from_pretrained(tmp_path).encoder.get_parameter(name), online)

"""The sizes of a model are read from the shapes and positions of a file; other ones are assumed or asked for."""

import pytest
import torch

import hf_mim
from hf_mim.hub import key_tables
from hf_mim.hub.convert import Conversion, convert
from hf_mim.hub.sizes import find_grid
from hf_mim.models.positions import sincos_table


def vit_state(width, depth, mlp, grid=(2, 2), patch=16, channels=3):
    """A state dict with timm's names and empty weights of any size."""
    with torch.device("meta"):
        config = hf_mim.MAEConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=4,
            intermediate_size=mlp,
            image_size=(grid[0] * patch, grid[1] * patch),
            patch_size=patch,
            num_channels=channels,
        )
        state = hf_mim.MAEModel(config).state_dict()
    state = {key: torch.zeros(x.shape) for key, x in state.items()}
    state["embeddings.position_embeddings.table"] = sincos_table(grid, width, num_prefix_tokens=1)
    return key_tables.to_theirs(state, key_tables.TIMM_VIT_CLS, (patch, patch))


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (1024, 16), (1280, 16)])
def test_sizes_are_read_from_shapes_and_heads_from_the_papers(tmp_path, width, heads):
    torch.save(vit_state(width, 2, 4 * width, channels=5, patch=14), tmp_path / "vit.pth")
    config = convert(tmp_path / "vit.pth", image_mean=[0] * 5, image_std=[1] * 5).config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (width, 2, 4 * width)
    assert (config.num_channels, config.patch_size, config.image_size) == (5, 14, 28)
    assert config.num_attention_heads == heads


def test_heads_that_no_paper_tells_have_to_be_given(tmp_path):
    torch.save(vit_state(48, 1, 96), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="num_attention_heads must be given.*hidden_size 48 is none of the papers'"):
        convert(tmp_path / "vit.pth")


def test_a_grid_that_is_not_square_is_told_by_its_sine_cosine_table(tmp_path):
    torch.save(vit_state(48, 1, 96, grid=(2, 8)), tmp_path / "vit.pth")  # 16 places would make a square too
    assert convert(tmp_path / "vit.pth", num_attention_heads=3).config.image_size == (32, 128)
    for grid in ((4, 4), (3, 7), (1, 5)):
        for rescaled in (False, True):
            table = sincos_table(grid, 48, rescaled=rescaled).bfloat16()
            assert find_grid(table, rescaled) == (grid, True)
    learned = torch.randn(21, 48)
    assert find_grid(learned[:16], False) == ((4, 4), False)
    with pytest.raises(ValueError, match="image_size must be given as height,width"):
        find_grid(learned, False)


def test_a_square_grid_of_learned_positions_is_recorded_as_assumed(tmp_path):
    state = vit_state(48, 1, 96, grid=(2, 8))
    told = {}
    for name, positions in (("sincos", state["pos_embed"]), ("learned", torch.randn(1, 17, 48))):
        torch.save(state | {"pos_embed": positions}, tmp_path / "vit.pth")
        record = Conversion.read(tmp_path / "vit.pth", num_attention_heads=3).record
        told[name] = record["told"].get("image_size"), record["assumed"].get("image_size")
    assert told == {"sincos": ((32, 128), None), "learned": (None, 64)}
    given = Conversion.read(tmp_path / "vit.pth", num_attention_heads=3, image_size=(32, 128)).record
    assert "image_size" not in given["told"] | given["assumed"]


def test_settings_go_over_what_is_told_and_assumed(tmp_path):
    state = vit_state(48, 1, 96) | {"pos_embed": torch.randn(1, 7, 48)}  # learned positions of 2×3 patches
    torch.save(state, tmp_path / "vit.pth")
    settings = {"num_attention_heads": 3, "image_size": (32, 48), "layer_norm_eps": 1e-5, "pooling": "cls"}
    config = convert(tmp_path / "vit.pth", **settings).config
    assert config.grid_size == (2, 3) and config.layer_norm_eps == 1e-5 and config.pooling == "cls"


def test_half_precision_becomes_float32_of_the_same_values(tmp_path):
    state = {key: x.half() for key, x in vit_state(48, 1, 96).items()}
    torch.save(state, tmp_path / "vit.pth")
    model = convert(tmp_path / "vit.pth", num_attention_heads=3)
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    back = key_tables.to_theirs(model.state_dict(), key_tables.TIMM_VIT_CLS, (16, 16))
    assert back.keys() == state.keys() and all(torch.equal(back[key], x.float()) for key, x in state.items())


def test_a_model_does_not_change_with_the_file_it_came_from(tmp_path):
    torch.save(vit_state(48, 1, 96), tmp_path / "vit.pth")
    model = convert(tmp_path / "vit.pth", num_attention_heads=3)
    before = model.embeddings.position_embeddings.table.clone()
    with open(tmp_path / "vit.pth", "r+b") as file:
        file.write(b"\xff" * (tmp_path / "vit.pth").stat().st_size)
    assert torch.equal(model.embeddings.position_embeddings.table, before)

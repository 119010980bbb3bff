"""DINOv2 with its LayerScale and its registers, in the files of transformers, of its authors and of timm."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from hf_mim.hub.convert import Conversion, convert
from hf_mim.hub.start import Source

SIZES = dict(image_size=24, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=4)


@pytest.fixture(params=[0, 3], ids="{} registers".format)
def theirs(request):
    """A DINOv2 of transformers in which nothing is 0 or 1."""
    torch.manual_seed(0)
    if request.param:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=request.param))
    else:
        model = Dinov2Model(Dinov2Config(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def images():
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def authors_state(model):
    """The tensors under the names of the authors, which timm has too but for the registers'."""
    state = {}
    for key, value in model.state_dict().items():
        if key.startswith("embeddings."):
            name = {"position_embeddings": "pos_embed"}.get(key.split(".")[1], key.removeprefix("embeddings."))
            state[name.replace("patch_embeddings.projection", "patch_embed.proj")] = value
            continue
        if ".q_proj." in key or ".query." in key:
            parts = [key.replace("q_proj", f"{p}_proj").replace("query", w) for p, w in zip("qkv", NAMES, strict=True)]
            name = key.replace("q_proj", "qkv").replace("attention.query", "qkv")
            value = torch.cat([model.state_dict()[part] for part in parts])
        elif any(word in key for word in ("k_proj", "v_proj", ".key.", ".value.")):
            continue
        else:
            name = key
        for old, new in RENAMED:
            name = name.replace(old, new)
        state[name] = value
    return state


NAMES = ("query", "key", "value")
RENAMED = (
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("attention.o_proj", "attn.proj"),
    ("attention.", "attn."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


def test_a_folder_of_transformers_converts_with_its_features(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    conversion = Conversion.read(tmp_path)
    assert len(conversion.record["folded"]) == 4
    assert conversion.model.config.num_register_tokens == getattr(theirs.config, "num_register_tokens", 0)
    close(conversion.model(images()).last_hidden_state, theirs(images()).last_hidden_state)


@pytest.mark.parametrize("names", ["authors", "timm"])
def test_a_file_of_the_authors_or_of_timm_converts_with_its_features(theirs, tmp_path, names):
    state, size = authors_state(theirs), {}
    if names == "timm":
        del state["mask_token"]
        size = {"image_size": SIZES["image_size"]}  # registers hide the grid
        state = {key.replace("register_tokens", "reg_token"): x for key, x in state.items()}
    torch.save(state, tmp_path / "dinov2.pth")
    model = convert(tmp_path / "dinov2.pth", num_attention_heads=2, **size)
    close(model(images()).last_hidden_state, theirs(images()).last_hidden_state)


def test_a_run_can_start_from_it(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    source = Source.read(str(tmp_path))
    assert source.settings("mae")["num_register_tokens"] == getattr(theirs.config, "num_register_tokens", 0)
    close(source.model(images()).last_hidden_state, theirs(images()).last_hidden_state)


def test_a_layer_scale_whose_linear_is_missing_is_left_and_refused(tmp_path):
    model = Dinov2Model(Dinov2Config(**SIZES))
    state = authors_state(model)
    state["blocks.0.ls1.gamma"] = torch.ones(5)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="left over: .*ls1.gamma"):
        convert(tmp_path / "a.pth", num_attention_heads=2)

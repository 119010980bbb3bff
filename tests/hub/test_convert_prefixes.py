"""The network is found in whatever a training script has saved around it, and the choice is told."""

import collections
import json

import pytest
import torch
from authors import optimizer_state, read, with_module
from safetensors.torch import save_file

from hf_mim.cli import main
from hf_mim.hub.convert import Conversion, convert
from hf_mim.hub.key_tables import TIMM_VIT_CLS, to_theirs

HEADS = {"num_attention_heads": 3}
DECODER = HEADS | {"decoder_num_attention_heads": 4}


def encoder():
    """A ViT under timm's names."""
    return {k: x for k, x in read("mae")[2].items() if not k.startswith("decoder_") and k != "mask_token"}


def beneath(prefix, state):
    return {f"{prefix}{key}": tensor for key, tensor in state.items()}


def other(state):
    return {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def taken(model):
    """The encoder's tensors under timm's names."""
    return to_theirs(model.state_dict(), TIMM_VIT_CLS, (8, 8))


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


PREFIXES = (
    "_orig_mod. module. module._orig_mod. _orig_mod.module. model. backbone. encoder. student. teacher. net.vit. "
    "a.b.c.d. module.model._orig_mod.backbone. 0. 3.encoder.module."
).split()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("around", ["", "model", "state_dict", "module", "model_ema", "state_dict_ema"])
def test_a_network_is_found_under_any_prefix(tmp_path, prefix, around):
    state = beneath(prefix, encoder())
    held = {around: state, "optimizer": optimizer_state(state), "epoch": 3} if around else state
    torch.save(held, tmp_path / "file.pth")
    same(taken(convert(tmp_path / "file.pth", **HEADS)), encoder())


@pytest.mark.parametrize("prefix", ["model.", "module._orig_mod.", "net.mae."])
def test_a_whole_pretraining_model_is_found_under_a_prefix(tmp_path, prefix):
    torch.save({"state_dict": beneath(prefix, read("mae")[2])}, tmp_path / "file.ckpt")
    conversion = Conversion.read(tmp_path / "file.ckpt", **DECODER)
    assert type(conversion.model).__name__ == "MAEForPreTraining"
    assert conversion.record["left"] == {}


def test_a_lightning_file_is_read(tmp_path):
    state = beneath("model.backbone.", encoder()) | {"model.projector.weight": torch.zeros(3, 3)}
    held = {"state_dict": state, "epoch": 1, "global_step": 10, "pytorch-lightning_version": "2.1.0", "loops": {}}
    held |= {"callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}}, "lr_schedulers": []}
    held |= {"optimizer_states": [optimizer_state(state)], "hyper_parameters": collections.OrderedDict(lr=1e-3)}
    torch.save(held, tmp_path / "last.ckpt")
    conversion = Conversion.read(tmp_path / "last.ckpt", **HEADS)
    same(taken(conversion.model), encoder())
    assert conversion.record["prefix"] == "state_dict.model.backbone."
    assert conversion.record["left"] == {"callbacks.ModelCheckpoint": 1, "state_dict.model": 1}


def test_deepspeeds_and_jepas_wrappers_are_seen_through(tmp_path):
    torch.save({"module": beneath("module.", encoder()), "dp_world_size": 8}, tmp_path / "mp_rank_00_model_states.pt")
    same(taken(convert(tmp_path / "mp_rank_00_model_states.pt", **HEADS)), encoder())
    networks = {}
    for key, tensor in read("ijepa")[2].items():
        network, _, name = key.partition(".")
        networks.setdefault(network, {})[f"module._orig_mod.{name}"] = tensor
    torch.save(networks, tmp_path / "jepa.pth.tar")
    assert type(convert(tmp_path / "jepa.pth.tar", **HEADS)).__name__ == "StopJepaForPreTraining"


@pytest.mark.parametrize(
    ("one", "average"),
    [("student", "teacher"), ("model", "model_ema"), ("state_dict", "state_dict_ema"), ("base", "momentum")],
)
def test_of_two_whole_networks_the_average_is_taken_and_the_other_can_be_asked_for(tmp_path, capsys, one, average):
    held = {one: beneath("backbone.", other(encoder())), average: beneath("backbone.", encoder())}
    torch.save(held, tmp_path / "dino.pth")
    conversion = Conversion.read(tmp_path / "dino.pth", **HEADS)
    same(taken(conversion.model), encoder())
    assert conversion.record["other_prefixes"] == [f"{one}.backbone."]
    for prefix in (f"{one}.", f"{one}.backbone."):
        same(taken(convert(tmp_path / "dino.pth", prefix=prefix, **HEADS)), other(encoder()))
    words = ["convert", str(tmp_path / "dino.pth"), str(tmp_path / "out"), "--set", "num_attention_heads=3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"Taken: {average}.backbone., because it is an average" in out and f"--prefix {one}.backbone." in out
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["prefix"] == f"{average}.backbone."


def test_a_prefix_that_ends_another_one_can_be_asked_for(tmp_path):
    torch.save({"model": other(encoder()), "ema": {"model": encoder()}}, tmp_path / "nested.pth")
    same(taken(convert(tmp_path / "nested.pth", prefix="model.", **HEADS)), other(encoder()))


def test_the_network_with_more_of_a_table_wins(tmp_path):
    some = dict(list(encoder().items())[:-3])
    torch.save({"teacher": some, "student": encoder()}, tmp_path / "file.pth")
    assert Conversion.read(tmp_path / "file.pth", **HEADS).record["prefix"] == "student."


def refused(path, **settings):
    with pytest.raises(ValueError) as error:
        convert(path, **HEADS | settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_two_equally_good_prefixes_are_a_choice_of_the_user(tmp_path):
    torch.save({"left": encoder(), "right": other(encoder())}, tmp_path / "file.pth")
    assert "choose one by --prefix left. or --prefix right." in refused(tmp_path / "file.pth")
    same(taken(convert(tmp_path / "file.pth", prefix="right.", **HEADS)), other(encoder()))
    assert "prefix must be one of 'left.', 'right.' in file.pth, not 'top.'" in refused(
        tmp_path / "file.pth", prefix="top."
    )


def test_a_file_in_which_nothing_matches_says_what_was_expected_and_found(tmp_path):
    torch.save(
        {"state_dict": {f"layer{i}.{j}.conv.weight": torch.zeros(1) for i in range(4) for j in range(9)}},
        tmp_path / "a.pth",
    )
    message = refused(tmp_path / "a.pth")
    assert "names such as patch_embed.proj.weight" in message and "state_dict.layer0" in message and len(message) < 400


def test_a_distillation_token_is_named_and_not_taken(tmp_path, capsys):
    state = encoder()
    positions = state["pos_embed"]
    distilled = state | {"dist_token": torch.ones(1, 1, 48)}
    distilled["pos_embed"] = torch.cat([positions[:, :1], torch.ones(1, 1, 48), positions[:, 1:]], dim=1)
    torch.save({"model": distilled}, tmp_path / "dist.pth")
    words = [str(tmp_path / "dist.pth"), str(tmp_path / "dist"), "--set", "num_attention_heads=3"]
    assert main(["convert", *words]) == 0
    assert "Not taken over: dist_token" in capsys.readouterr().out
    same(taken(convert(tmp_path / "dist.pth", **HEADS)), state)


def test_registers_are_taken_with_their_rows_of_the_position_table_added(tmp_path):
    state, tokens = encoder(), torch.randn(1, 4, 48)
    positions, rows = state["pos_embed"], torch.randn(1, 4, 48)
    with_rows = torch.cat([positions[:, :1], rows, positions[:, 1:]], dim=1)
    for table, expected in ((positions, tokens), (with_rows, tokens + rows), (positions[:, 1:], tokens)):
        torch.save({"model": state | {"reg_token": tokens, "pos_embed": table}}, tmp_path / "reg.pth")
        with pytest.raises(ValueError, match=rf"image_size must be given .* 4 registers, the {table.shape[1]} rows"):
            convert(tmp_path / "reg.pth", **HEADS)
        model = convert(tmp_path / "reg.pth", **HEADS, image_size=32)
        assert model.config.num_register_tokens == 4 and model.config.num_prefix_tokens == 5
        assert torch.equal(model.embeddings.register_tokens, expected)
        held = model.embeddings.position_embeddings.table
        assert torch.equal(held[1:], positions[0, 1:]) and held[0].any() == (table.shape[1] > 36)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_are_read_by_their_index_whatever_its_name(tmp_path, form):
    state = encoder()
    names = list(state)
    files = {key: f"part-{1 + (i > 10)}.{form}" for i, key in enumerate(names)}
    for file in set(files.values()):
        part = {key: state[key].contiguous() for key in names if files[key] == file}
        (save_file if form == "safetensors" else torch.save)(part, tmp_path / file)
    (tmp_path / f"vit.{form}.index.json").write_text(json.dumps({"weight_map": files}))
    for source in (tmp_path, tmp_path / f"vit.{form}.index.json"):
        same(taken(convert(source, **HEADS)), state)
    path = tmp_path / f"part-2.{form}"
    path.write_bytes(path.read_bytes()[:200])
    assert f"part-2.{form} is" in refused(tmp_path) and "damaged" in refused(tmp_path)


def test_a_sparse_tensor_of_the_network_is_refused(tmp_path):
    torch.save(encoder() | {"norm.weight": torch.zeros(48).to_sparse()}, tmp_path / "a.pth")
    assert "sparse, quantised or empty: norm.weight" in refused(tmp_path / "a.pth")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    torch.save(encoder() | with_module(encoder()), tmp_path / "a.pth")
    assert "a.pth has two tensors for" in refused(tmp_path / "a.pth")


def test_the_command_prints_what_is_taken_and_what_is_left(tmp_path, capsys):
    torch.save({"model": encoder(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "out"), "--set", "num_attention_heads=3"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert ["taken", "model.blocks", "24", "tensors"] in rows and ["left", "optimizer.state", "1", "tensor"] in rows

"""Files are read without running anything in them, and what is no checkpoint is refused in one line."""

import argparse
import io
import json
import os
import pickle
import random
import tarfile

import numpy as np
import pytest
import torch
from authors import classifier_state, save_jepa, save_mae, with_module
from safetensors.torch import save_file

from hf_mim.hub.reading import load, read_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.arange(2.0)}


class Shell:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Custom:
    """A class that only its author has; unpickling it runs `__setstate__`."""

    def __init__(self):
        self.x = 1

    def __setstate__(self, state):
        raise AssertionError("this code of a checkpoint ran")


def refused(path) -> str:
    with pytest.raises(ValueError) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and str(path.parent) not in str(error.value)
    return str(error.value)


def save_pickle(held, path, form):
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(held, protocol=4))
    else:
        torch.save(held, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_runs_a_command_is_refused_by_name_and_does_not_run(tmp_path, form):
    path = tmp_path / "model.pth"
    save_pickle({"model": STATE, "args": Shell(f"touch {tmp_path}/ran")}, path, form)
    assert f"refused: it holds {os.name}.system" in refused(path)
    assert not (tmp_path / "ran").exists()
    if form == "zip":  # the attack is a real one
        torch.load(path, weights_only=False)
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_pickle_of_a_class_of_its_own_is_refused_by_name_and_does_not_run(tmp_path, form):
    path = tmp_path / "model.pth.tar"
    save_pickle({"model": STATE, "extra": Custom()}, path, form)
    assert "test_reading.Custom" in refused(path)


def test_what_the_authors_save_beside_the_weights_is_read(tmp_path):
    state = classifier_state("cls")
    checkpoint = read_checkpoint(save_mae(tmp_path / "mae.pth", state, norm_pix_loss=True))
    assert checkpoint.arguments["norm_pix_loss"] is True and checkpoint.state.keys() == state.keys()
    extra = {
        "loss": np.float32(0.3),
        "epoch": np.int64(3),
        "best_acc": np.float64(83.6),
        "args": argparse.Namespace(lr=1),
    }
    torch.save({"state_dict": with_module(STATE)} | extra, tmp_path / "other.pth")
    assert read_checkpoint(tmp_path / "other.pth").state.keys() == STATE.keys()


def test_what_holds_no_tensor_at_any_depth_may_lie_beside_the_weights(tmp_path):
    itself = [1, {"a": (2, "b")}]
    itself.append(itself)
    torch.save({"model": STATE, "history": itself}, tmp_path / "model.pth")
    assert read_checkpoint(tmp_path / "model.pth").state.keys() == STATE.keys()


def test_numpys_numbers_among_the_arguments_become_pythons(tmp_path):
    file = save_mae(tmp_path / "mae.pth", STATE, norm_pix_loss=np.True_, mask_ratio=np.float64(0.6))
    arguments = read_checkpoint(file).arguments
    assert arguments["norm_pix_loss"] is True and type(arguments["mask_ratio"]) is float


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_all_forms_of_pytorch_files_give_the_tensors(tmp_path, form):
    save_pickle(STATE, tmp_path / "model.bin", form)
    state = read_checkpoint(tmp_path / "model.bin").state
    assert all(torch.equal(state[key], STATE[key]) for key in STATE) and len(state) == 2


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.7, 0.98])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_truncated_file_is_said_to_be_damaged(tmp_path, kind, keep):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    state = {"a.weight": torch.randn(50, 50)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        save_pickle(state, path, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "damaged" in refused(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_changed_bytes_never_give_another_error_than_one_line(tmp_path, kind):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pth")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        save_pickle({"model": STATE, "args": argparse.Namespace(a=1)}, path, kind)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([1, 2], "must hold tensors by name, not a list"),
        (torch.zeros(3), "must hold tensors by name, not a Tensor"),
        ({1: torch.zeros(3)}, "must hold tensors by name"),
        ({}, "must hold plain tensors by name, and it has none"),
        ({"model": {}}, "it has none"),
        ({"a": torch.zeros(3), "b": "text"}, "these are none: b (str)"),
        ({"a": torch.zeros(3).to_sparse()}, "these are none: a (Tensor)"),
        ({"a": torch.zeros(3, device="meta")}, "these are none: a (Tensor)"),
        ({"model": STATE, "model_ema": STATE}, "several sets of weights: model, model_ema"),
        ({"model": STATE, "model_ema": {"params": STATE}}, "several sets of weights: model, model_ema"),
        ({"model": STATE, "ema": [(1, torch.zeros(2))], "gamma": torch.zeros(2)}, "weights: model, ema, gamma"),
        ({"encoder": STATE, "predictor": [torch.zeros(2)]}, "several sets of weights: encoder, predictor"),
        ({"model": STATE, "state_dict": STATE}, "several sets of weights: model, state_dict"),
        ({"model": STATE, "encoder": STATE}, "several sets of weights: model, encoder"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, held, message):
    torch.save(held, tmp_path / "model.pth")
    assert message in refused(tmp_path / "model.pth")


@pytest.mark.parametrize("text", ["", "hello", '{"a": 1}', "PK\x03\x04", "\x80\x04."])
@pytest.mark.parametrize("name", ["a.pth", "a.bin", "a.safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("latin1"))
    assert "damaged or no" in refused(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_and_a_tar_file_are_named(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "script.pt is a TorchScript archive, which is not read" in refused(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.tar", "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            held = io.BytesIO(pickle.dumps(Shell(f"touch {tmp_path}/ran")))
            info = tarfile.TarInfo(name)
            info.size = len(held.getvalue())
            archive.addfile(info, held)
    assert "old.tar is a tar archive" in refused(tmp_path / "old.tar")
    assert not (tmp_path / "ran").exists()


def test_other_extensions_are_refused(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"1")
    assert "must end in one of .safetensors" in refused(tmp_path / "weights.h5")
    with pytest.raises(ValueError, match="weights.npz must end in"):
        load(tmp_path / "weights.npz")


def test_networks_keep_their_names_as_prefixes(tmp_path):
    path = save_jepa(tmp_path / "jepa.pth.tar", {f"{net}.w": torch.zeros(1) for net in ("encoder", "target_encoder")})
    assert set(read_checkpoint(path).state) == {"encoder.w", "target_encoder.w"}


def test_a_folder_prefers_safetensors_and_asks_where_there_is_no_telling(tmp_path):
    torch.save({"b": torch.ones(1)}, tmp_path / "first.pth")
    assert set(read_checkpoint(tmp_path).state) == {"b"}
    torch.save({"c": torch.ones(1)}, tmp_path / "second.pth")
    assert "give the file itself; there is first.pth, second.pth" in refused(tmp_path)
    torch.save({"d": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(read_checkpoint(tmp_path).state) == {"d"}
    save_file(STATE, tmp_path / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.state.keys() == STATE.keys() and list(checkpoint.files) == ["model.safetensors"]
    assert checkpoint.name == tmp_path.name


def test_an_empty_folder_and_a_missing_source_are_refused(tmp_path):
    assert "there is none with .safetensors" in refused(tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder"):
        read_checkpoint(tmp_path / "missing.pth")


@pytest.mark.parametrize("shard", ["../outside.safetensors", "missing.safetensors", 3])
def test_an_index_names_files_of_its_folder_only(tmp_path, shard):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(STATE, tmp_path / "outside.safetensors")
    index = {"weight_map": {"a.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="which is not in folder|must have a weight_map"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "config.json is no JSON"), ("[1]", "must hold a mapping, not list")]
)
def test_a_damaged_config_is_refused(tmp_path, text, message):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    assert message in refused(tmp_path)

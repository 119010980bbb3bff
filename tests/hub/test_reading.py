"""Files are read without running anything in them, and what is no checkpoint is refused in one line."""

import argparse
import collections
import datetime
import enum
import functools
import io
import json
import os
import pathlib
import pickle
import random
import runpy
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from authors import classifier_state, save_jepa, save_mae, with_module
from safetensors.torch import save_file

from hf_mim.hub.reading import read_checkpoint

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


def names(checkpoint) -> set[str]:
    """The names of the network's tensors, without the dictionary around it."""
    return {key.removeprefix("model.").removeprefix("state_dict.") for key in checkpoint.state}


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_an_object_of_another_class_is_skipped_by_name_and_its_code_does_not_run(tmp_path, form):
    path = tmp_path / "model.pth.tar"
    save_pickle({"model": STATE, "extra": Custom()}, path, form)
    checkpoint = read_checkpoint(path)
    assert names(checkpoint) == STATE.keys() and checkpoint.skipped == ["test_reading.Custom"]


class Colour(enum.Enum):
    RED = 1


class Settings(dict):
    """A dictionary of its own class, as Lightning's."""


BESIDE = {
    "path": pathlib.PurePosixPath("out"),
    "namespace": argparse.Namespace(output_dir=pathlib.PurePosixPath("out"), lr=1e-3),
    "defaultdict": collections.defaultdict(float, loss=1.0),
    "defaultdict of lists": collections.defaultdict(list, loss=[1.0]),
    "OrderedDict": collections.OrderedDict(a=1),
    "Counter": collections.Counter("aab"),
    "scalar": np.float32(1),
    "array": np.zeros(3, dtype=np.uint8),
    "array of text": np.array(["a", "b"]),
    "dtype": np.dtype("int16"),
    "datetime": datetime.datetime(2024, 1, 1),
    "timedelta": datetime.timedelta(1),
    "enum": Colour.RED,
    "dictionary": Settings(lr=1e-3, path=pathlib.PurePosixPath("x")),
    "nested": {Colour.RED: [datetime.date(2024, 1, 1)]},
    "partial": functools.partial(int, 3),
    "set": {1, 2, "a"},
    "complex": complex(1, 2),
    "torch dtype": torch.float16,
    "Size": torch.Size([1, 2]),
    "device": torch.device("cuda:3"),
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_training_scripts_save_lies_beside_the_weights(tmp_path, kind, form):
    save_pickle({"model": STATE, "args": BESIDE[kind], "epoch": 3}, tmp_path / "model.pth", form)
    checkpoint = read_checkpoint(tmp_path / "model.pth")
    assert names(checkpoint) == STATE.keys()
    assert all(torch.equal(checkpoint.state[f"model.{key}"], STATE[key]) for key in STATE)
    assert "output_dir" not in checkpoint.arguments


class Call:
    """Calls anything when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


CALLS = {
    "eval": lambda file: Call(eval, f"open({file!r}, 'w')"),
    "exec": lambda file: Call(exec, f"open({file!r}, 'w')"),
    "open": lambda file: Call(open, file, "w"),
    "subprocess": lambda file: Call(subprocess.check_call, ["touch", file]),
    "shutil": lambda file: Call(shutil.copy, __file__, file),
    "import": lambda file: Call(getattr, Call(__import__, "os"), "system"),
    "runpy": lambda file: Call(runpy.run_path, file),
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("call", CALLS)
def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(tmp_path, call, form):
    save_pickle({"model": STATE, "args": CALLS[call](str(tmp_path / "ran"))}, tmp_path / "model.pth", form)
    assert "is refused: it holds" in refused(tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists()


def touch(path):
    pathlib.Path(path).touch()


def test_a_function_that_is_skipped_does_not_run(tmp_path):
    torch.save({"model": STATE, "args": Call(touch, str(tmp_path / "ran"))}, tmp_path / "model.pth")
    assert read_checkpoint(tmp_path / "model.pth").skipped == ["test_reading.touch"]
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "model.pth", weights_only=False)  # the attack is a real one
    assert (tmp_path / "ran").exists()


def test_what_the_authors_save_beside_the_weights_is_read(tmp_path):
    state = classifier_state("cls")
    checkpoint = read_checkpoint(save_mae(tmp_path / "mae.pth", state, norm_pix_loss=True))
    assert checkpoint.arguments["norm_pix_loss"] is True
    assert {key for key in checkpoint.state if key.startswith("model.")} == {f"model.{key}" for key in state}
    extra = {
        "loss": np.float32(0.3),
        "epoch": np.int64(3),
        "best_acc": np.float64(83.6),
        "args": argparse.Namespace(lr=1),
    }
    torch.save({"state_dict": with_module(STATE)} | extra, tmp_path / "other.pth")
    assert names(read_checkpoint(tmp_path / "other.pth")) == STATE.keys()


def test_what_holds_no_tensor_at_any_depth_may_lie_beside_the_weights(tmp_path):
    itself = [1, {"a": (2, "b")}]
    itself.append(itself)
    torch.save({"model": STATE, "history": itself}, tmp_path / "model.pth")
    assert names(read_checkpoint(tmp_path / "model.pth")) == STATE.keys()


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


@pytest.mark.parametrize("name", ["weights.h5", "weights", "checkpoint-0099", "a.ckpt", "a.safetensors", "a.pth"])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_the_content_of_a_file_and_not_its_name_says_how_it_is_read(tmp_path, name, form):
    if form == "safetensors":
        save_file(STATE, tmp_path / name)
    else:
        save_pickle(STATE, tmp_path / name, form)
    assert read_checkpoint(tmp_path / name).state.keys() == STATE.keys()


def test_a_file_of_another_program_is_refused(tmp_path):
    (tmp_path / "weights.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert "weights.h5 is truncated, damaged or no file of safetensors" in refused(tmp_path / "weights.h5")


def test_networks_keep_their_names_as_prefixes(tmp_path):
    path = save_jepa(tmp_path / "jepa.pth.tar", {f"{net}.w": torch.zeros(1) for net in ("encoder", "target_encoder")})
    found = {key for key in read_checkpoint(path).state if not key.startswith("opt.")}
    assert found == {"encoder.w", "target_encoder.w"}


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

"""Files that strangers could give: each is refused or harmless here, and does its harm to a naive reader.

What pickles of weights, `auto_map`, and names in cards, reports and the demo can do is tested beside their code:
SECURITY.md names the files.
"""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors import SafetensorError, safe_open
from tiny import make_model
from tiny_runs import Images, arguments

from hf_mim.cli import main
from hf_mim.data import load_images
from hf_mim.data.decode import BrokenImage, decoding, open_image
from hf_mim.hub.convert import convert
from hf_mim.models.pixels import ImageFormatError
from hf_mim.pretraining.trainer import MIMTrainer


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def refused(value, num_channels=3):
    """The message about an image that is not opened."""
    with pytest.raises((BrokenImage, ImageFormatError)) as error, decoding("an image"):
        open_image(value, num_channels)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- a run folder


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_no_file_of_a_strangers_run_runs_code_when_the_run_is_resumed(tmp_path, name):
    model, ran = make_model("mae"), tmp_path / "ran"
    args = arguments(tmp_path / "run", save_strategy="steps", save_steps=4, max_steps=4)
    MIMTrainer(model, args, Images(model)).train()
    file = tmp_path / "run" / "checkpoint-4" / name
    assert file.exists()
    torch.save({"state": Touch(ran)}, file)
    again = MIMTrainer(make_model("mae"), arguments(tmp_path / "run", max_steps=6), Images(model))
    try:
        again.train(resume_from_checkpoint=str(file.parent))
    except (pickle.UnpicklingError, ValueError, RuntimeError):
        pass  # refused; or, for what nobody reads, the run went on
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists()


# ---- archives


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("name", ["../outside.png", "/tmp/hf_mim_outside.png", "a/../../outside.png"])
def test_a_tar_writes_nothing_wherever_its_names_lead(tmp_path, name):
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "images.tar", "w") as tar:
        for member in (name, "0.png"):
            about = tarfile.TarInfo(member)
            about.size = len(png())
            tar.addfile(about, io.BytesIO(png()))
    before = sorted(tmp_path.rglob("*"))
    images = load_images(folder)
    assert all(open_image(row[images.column_names[0]]).size == (8, 8) for row in images)
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists("/tmp/hf_mim_outside.png")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_gives_no_file_of_this_machine(tmp_path, kind):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (5, 5), "red").save(secret)
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "images.tar", "w") as tar:
        link = tarfile.TarInfo("0.png")
        link.type, link.linkname = kind, str(secret)
        tar.addfile(link)
        about = tarfile.TarInfo("1.png")
        about.size = len(png())
        tar.addfile(about, io.BytesIO(png()))
    images = load_images(tmp_path / "data")
    sizes = [open_image(row[images.column_names[0]]).size for row in images]
    assert sizes == [(8, 8)]


def test_an_array_of_gigabytes_in_a_few_bytes_is_refused_by_its_header(tmp_path):
    header = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": (60_000, 60_000, 3)}
    np.lib.format.write_array_header_1_0(header, about)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("image.npy", "w", force_zip64=True) as file:
            file.write(header.getvalue())
            file.write(bytes(1 << 20))  # the header alone promises more than an image may have
    assert (tmp_path / "bomb.npz").stat().st_size < 5_000
    message = refused((tmp_path / "bomb.npz").read_bytes())
    assert "pixels are more than max_image_pixels" in message or "ends before" in message


def test_an_array_of_objects_is_never_unpickled(tmp_path):
    ran, file = tmp_path / "ran", io.BytesIO()
    np.save(file, np.array([Touch(ran)], dtype=object), allow_pickle=True)
    refused(file.getvalue())
    np.savez(tmp_path / "a.npz", image=np.array([Touch(ran)], dtype=object))
    refused((tmp_path / "a.npz").read_bytes())
    assert not ran.exists()
    np.load(io.BytesIO(file.getvalue()), allow_pickle=True)
    assert ran.exists()


def test_a_picture_of_billions_of_pixels_is_refused_by_its_header():
    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    picture = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    picture += chunk(b"IEND", b"")
    assert len(picture) < 200
    assert "max_image_pixels" in refused(picture)


def test_postscript_is_not_opened_whatever_its_name():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(touched) (w) file closefile\nshowpage\n"
    assert "not an image" in refused(program)
    assert Image.open(io.BytesIO(program)).format == "EPS"  # Pillow alone would


def test_a_path_in_a_table_that_is_a_device_a_pipe_or_a_url_opens_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for place in (
        "https://127.0.0.1:9/a.png",
        str(tmp_path / "not there.png"),
        "/dev/zero",
        str(tmp_path / "pipe.png"),
    ):
        rows = Dataset.from_dict(
            {"image": [{"bytes": None, "path": place}]}, Features(image=ImageFeature(decode=False))
        )
        with pytest.raises(ValueError, match="holds no image that can be read"):
            load_images(rows)


# ---- weights


def header(text: dict | bytes, length: int | None = None) -> bytes:
    data = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(data) if length is None else length) + data


def tensor(begin, end, shape):
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        header(b"{}", length=1 << 60),
        header({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}) + bytes(12),
        header({"a": tensor(0, 1 << 40, [1 << 38])}) + bytes(16),
        header({"a": tensor(0, 8, [1 << 62, 4])}) + bytes(8),
        header({"a": tensor(8, 0, [2])}) + bytes(8),
        header(b"[" * 100_000),
    ],
    ids=["longer than the file", "overlapping", "beyond the end", "overflow", "backwards", "deeply nested"],
)
def test_a_safetensors_header_that_lies_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)
    with pytest.raises(SafetensorError):  # a naive reader of this format does not exist: its own library checks it
        safe_open(tmp_path / "model.safetensors", "pt").__enter__()


# ---- texts


@pytest.mark.parametrize("command", ["pretrain", "compare.py"])
def test_a_tag_in_yaml_makes_no_object(tmp_path, capsys, command):
    ran, path = tmp_path / "ran", tmp_path / "recipe.yaml"
    path.write_text(f"method: !!python/object/apply:os.system ['touch {ran}']\n")
    if command == "pretrain":
        assert main(["pretrain", str(path), "--output_dir", str(tmp_path / "run")]) == 2
        assert "\n" not in capsys.readouterr().err.strip()
    else:
        from hf_mim.pretraining.settings import read_yaml

        with pytest.raises(ValueError):
            read_yaml(path, "comparison")
    assert not ran.exists() and not (tmp_path / "run").exists()
    yaml.unsafe_load(path.read_text())
    assert ran.exists()


def test_yaml_that_unfolds_to_billions_of_words_is_read_as_the_few_that_it_is(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines))
    assert main(["pretrain", str(path), "--output_dir", str(tmp_path / "run")]) == 2

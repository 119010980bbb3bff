"""`hf-mim embed`: the features of the extractor, in three kinds of files; killed and resumed, the same bytes."""

import csv
import json
import os
import shutil
import sys
import tracemalloc
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from pictures import scenes, tiny_checkpoint

from hf_mim.cli import main
from hf_mim.data import BrokenImagesError, load_images
from hf_mim.data.images import Images
from hf_mim.embeddings import formats, parts
from hf_mim.embeddings.embed import embed
from hf_mim.embeddings.formats import Embeddings
from hf_mim.evaluation import cache, features
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor

KINDS = ["last/mean/norm", "1/cls/raw", "last/tokens/norm"]


@pytest.fixture
def small_parts(monkeypatch):
    for module in (cache, features, parts):
        monkeypatch.setattr(module, "CHUNK", 8)


def of_the_extractor(checkpoint, source, kinds=KINDS):
    split = Images(load_images(source))
    return split, FeatureExtractor(FrozenEncoder.load(checkpoint), progress=False)(split, kinds)


def read(path, kind):
    return torch.cat(list(Embeddings(path).parts(kind)))


def test_parquet_has_every_kind_of_features_with_names_and_labels(checkpoint, photos, small_parts, capsys):
    assert main(["embed", str(checkpoint), "--dataset", "photos", "--features", ",".join(KINDS)]) == 0
    assert (
        "embeddings.parquet holds last/mean/norm, 1/cls/raw, last/tokens/norm of 40 images" in capsys.readouterr().out
    )
    split, expected = of_the_extractor(checkpoint, "photos")
    for kind, tensor in zip(KINDS, expected, strict=True):
        assert torch.equal(read("embeddings.parquet", kind), tensor)
    table = datasets.Dataset.from_parquet("embeddings.parquet", cache_dir="tables")
    assert table.features["label"].names == ["a", "b"]
    assert table.features["last/tokens/norm"] == datasets.List(datasets.List(datasets.Value("float32"), 64), 16)
    assert table["name"][:] == [value["path"].removeprefix("photos/") for value in split.images["image"]]
    assert table["name"][0] == "a/000.png" and table["row"][:] == list(range(40))
    assert table["label"][:] == split.images["label"][:]
    assert not list(photos.parent.glob("_*")) and not list(photos.parent.glob("*.part"))


@pytest.mark.parametrize("output", ["photos.npy", "embedded"])
def test_arrays_and_folders_hold_the_same(output, checkpoint, photos, small_parts):
    embed(checkpoint, dataset="photos", output=output, features=[KINDS[2]])
    (expected,) = of_the_extractor(checkpoint, "photos", [KINDS[2]])[1]
    assert torch.equal(read(output, KINDS[2]), expected)
    rows = Embeddings(output).rows
    assert rows["name"][:2] == ["a/000.png", "a/002.png"] and rows["label"] == ["a"] * 20 + ["b"] * 20
    if output == "photos.npy":
        assert np.array_equal(np.load(output), expected.numpy())
        assert list(csv.DictReader(open("photos.csv")))[39] == {"name": "b/039.png", "row": "39", "label": "b"}
        assert json.loads(open("photos.json").read())["image_size"] == [32, 32]
    else:
        saved = datasets.load_from_disk(output).with_format("torch")
        assert torch.equal(saved[KINDS[2]][:], expected)


@pytest.mark.parametrize("output", ["photos.parquet", "photos.npy", "embedded"])
def test_killed_and_resumed_it_gives_the_same_bytes(output, checkpoint, photos, small_parts, monkeypatch):
    options = dict(dataset="photos", output=output, extract_batch_size=4)
    embed(checkpoint, **options)
    whole = photos.parent / output
    before = {path.name: path.read_bytes() for path in (sorted(whole.iterdir()) if whole.is_dir() else [whole])}
    shutil.rmtree(whole) if whole.is_dir() else [path.unlink() for path in photos.parent.glob("photos.*")]
    encode, seen = FrozenEncoder.extract, []

    def killed(self, pixels, specs):
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(len(pixels))
        return encode(self, pixels, specs)

    monkeypatch.setattr(FrozenEncoder, "extract", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(checkpoint, **options)
    assert not whole.exists()
    seen.clear()
    monkeypatch.setattr(FrozenEncoder, "extract", lambda *args: seen.append(len(args[1])) or encode(*args))
    embed(checkpoint, **options)
    assert sum(seen) == 40 - 16  # two whole parts of eight were kept
    assert {path.name: path.read_bytes() for path in (sorted(whole.iterdir()) if whole.is_dir() else [whole])} == before


@pytest.mark.parametrize("output", ["photos.parquet", "photos.npy", "embedded"])
def test_ended_while_it_takes_its_parts_away_it_is_whole(output, checkpoint, photos, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("hf_mim.embeddings.embed.shutil.rmtree", lambda path: sys.exit())
        embed(checkpoint, dataset="photos", output=output)
    assert list(photos.parent.glob("_*"))
    assert main(["embed", str(checkpoint), "--dataset", "photos", "--output", output]) == 2
    assert "output must be a new" in capsys.readouterr().err and not list(photos.parent.glob("_*"))
    assert len(Embeddings(output)) == 40


def test_ended_between_the_files_of_an_array_it_goes_on(checkpoint, photos, monkeypatch):
    embed(checkpoint, dataset="photos", output="straight.npy")
    replace = os.replace
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(formats.os, "replace", lambda a, b: sys.exit() if str(b) == "photos.npy" else replace(a, b))
        embed(checkpoint, dataset="photos", output="photos.npy")
    assert os.path.exists("photos.csv") and not os.path.exists("photos.npy")
    embed(checkpoint, dataset="photos", output="photos.npy")
    for end in (".npy", ".csv"):
        assert (photos.parent / f"photos{end}").read_bytes() == (photos.parent / f"straight{end}").read_bytes()


def test_an_extraction_that_was_begun_goes_on_with_the_same_settings_only(checkpoint, photos, monkeypatch, capsys):
    with monkeypatch.context() as patched, pytest.raises(pytest.fail.Exception):
        patched.setattr(FeatureExtractor, "fill", lambda *args: pytest.fail("stopped"))
        embed(checkpoint, dataset="photos")
    assert main(["embed", str(checkpoint), "--dataset", str(photos), "--image_size", "16"]) == 2
    error = capsys.readouterr().err
    assert "embeddings.parquet was begun with another dataset and image_size: give the same again, or delete" in error
    (photos / "a" / "000.png").write_bytes((photos / "a" / "002.png").read_bytes())
    with pytest.raises(ValueError, match="was begun with another contents"):
        embed(checkpoint, dataset="photos")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(checkpoint, photos, small_parts):
    peaks = []
    for count in (40, 160):
        scenes(photos, count)
        tracemalloc.start()
        embed(checkpoint, dataset="photos", output=f"{count}.npy", features=[KINDS[2]])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    features_of_more = 120 * 16 * 64 * 4
    assert peaks[1] - peaks[0] < features_of_more / 4


def test_broken_images_are_left_out_up_to_one_in_a_hundred(checkpoint, photos, small_parts):
    scenes(photos, 120)
    (photos / "a" / "010.png").write_bytes(b"no image")
    done = embed(checkpoint, dataset="photos", output="photos.npy")
    assert (done.images, done.broken) == (119, 1)
    rows = Embeddings("photos.npy").rows
    assert "a/010.png" not in rows["name"] and rows["row"] == [row for row in range(120) if row != 5]
    (expected,) = of_the_extractor(checkpoint, "photos", KINDS[:1])[1]
    assert torch.equal(read("photos.npy", KINDS[0]), expected)
    (photos / "a" / "012.png").write_bytes(b"no image")
    (photos / "a" / "014.png").write_bytes(b"no image")
    with pytest.raises(BrokenImagesError, match="3 of 120 images cannot be decoded"):
        embed(checkpoint, dataset="photos", output="more.npy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "dataset must be given: images, as for hf-mim pretrain"),
        ("--dataset photos --output photos.csv", "output must end with .parquet or .npy, or be a new folder"),
        ("--dataset photos --output there.npy", "output must be a new file, and there.npy exists"),
        ("--dataset photos --output photos", "output must be a new folder, and photos holds something already"),
        (f"--dataset photos --output x.npy --features {','.join(KINDS)}", "features must be of one kind for a .npy"),
        ("--dataset photos --features last/max/norm", "features must be layer/pooling/norm"),
        ("--dataset photos --features 7/mean/norm", "features 7/mean/norm need a layer that"),
        ("--dataset nothing", "source 'nothing' does not exist"),
        ("--dataset photos --image_size 30", "image_size must be divisible by the patch size"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, checkpoint, photos, capsys, monkeypatch):
    (photos.parent / "there.npy").write_bytes(b"")
    before = sorted(photos.parent.iterdir())
    monkeypatch.setattr("hf_mim.data.sources._HUB_NAME", SimpleNamespace(fullmatch=lambda name: None))
    assert main(["embed", str(checkpoint), *words.split()]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert sorted(photos.parent.iterdir()) == before


def test_images_of_other_channels_are_refused_before_anything_is_written(checkpoint, photos, capsys):
    (photos.parent / "bands").mkdir()
    np.save(photos.parent / "bands" / "0.npy", np.zeros((16, 16, 5), np.uint8))
    assert main(["embed", str(checkpoint), "--dataset", "bands", "--output", "x.npy"]) == 2
    assert "0.npy: num_channels=3, but the image has 5" in capsys.readouterr().err
    assert not [path for path in photos.parent.iterdir() if "x.npy" in path.name]


def test_a_full_disk_is_found_before_the_work(checkpoint, photos, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda *args: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"output embeddings.parquet needs 0.0 GiB while it is written"):
        embed(checkpoint, dataset="photos")


def test_features_of_another_checkpoint_differ(photos, checkpoint, tmp_path):
    embed(checkpoint, dataset="photos", output="one.npy")
    embed(tiny_checkpoint(tmp_path / "other", seed=1), dataset="photos", output="two.npy")
    assert Embeddings("one.npy").about["encoder"] != Embeddings("two.npy").about["encoder"]
    assert not torch.allclose(read("one.npy", KINDS[0]), read("two.npy", KINDS[0]))

"""The cache of features: kept, resumed, and never wrong."""

import errno
import io
import json
import multiprocessing
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hf_mim.data import BrokenImagesError, CenterCrop, WholeImage, load_images
from hf_mim.data.images import Images
from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation import cache as cache_module
from hf_mim.evaluation import features as features_module
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor

SPECS = ["last/mean/norm", "last/cls/raw", "last/tokens/norm"]


def png(seed, size=(20, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count=10, **changed) -> LabelledImages:
    rows = [{"bytes": changed.get(f"image{i}", png(i)), "path": None} for i in range(count)]
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    features = Features(image=ImageFeature(decode=False), label=Value("int64"))
    return LabelledImages(
        Dataset.from_dict({"image": rows, "label": list(range(count))}, features=features), "pictures"
    )


@pytest.fixture
def counted(tiny_encoder, monkeypatch):
    """The encoder, and how many images it has encoded."""
    seen = []
    extract = tiny_encoder.extract
    monkeypatch.setattr(
        tiny_encoder, "extract", lambda pixels, specs: seen.append(len(pixels)) or extract(pixels, specs)
    )
    return tiny_encoder, seen


@pytest.fixture
def small_chunks(monkeypatch):
    for module in (cache_module, features_module):
        monkeypatch.setattr(module, "CHUNK", 4)


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_one_pass_gives_every_layer_and_pooling_with_and_without_a_cache(counted, tmp_path, small_chunks):
    encoder, seen = counted
    images = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(png(i, (32, 32)))))) for i in range(10)])
    expected = encoder.extract(
        encoder.preprocess(images.permute(0, 3, 1, 2)), [features_module.FeatureSpec.parse(s) for s in SPECS]
    )
    seen.clear()
    split = pictures(10, **{f"image{i}": png(i, (32, 32)) for i in range(10)})
    for cache in (None, tmp_path):
        features = FeatureExtractor(encoder, batch_size=3, cache=cache, progress=False)(split, SPECS)
        for one, two in zip(features, expected, strict=True):
            torch.testing.assert_close(one, two)
    assert sum(seen) == 20


def test_cached_features_are_read_and_not_computed_again(counted, tmp_path):
    encoder, seen = counted
    extract = FeatureExtractor(encoder, cache=tmp_path, progress=False)
    first = extract(pictures(), SPECS)
    again = extract(pictures(), SPECS[::-1])[::-1]
    assert same(first, again) and sum(seen) == 10
    extract(pictures(), ["1/mean/norm", *SPECS])  # a new layer is computed for all, and the others are still right
    assert same(first, extract(pictures(), SPECS)) and sum(seen) == 20


@pytest.mark.parametrize("what", ["weights", "image", "order", "size", "crop", "mean", "dtype"])
def test_whatever_decides_a_feature_is_part_of_the_key(what, tiny_encoder, tmp_path):
    extract, split = FeatureExtractor(tiny_encoder, cache=tmp_path, progress=False), pictures()
    before = extract(split, SPECS[:1])
    options = dict(mean=[0.5] * 3, std=[0.5] * 3)
    if what == "weights":
        tiny_encoder.model.layers[0].mlp.fc1.bias.data[0] += 1
        extract = extract.replace(encoder=FrozenEncoder(tiny_encoder.model, **options))
    elif what == "image":
        split = pictures(image3=png(99))
    elif what == "order":
        split = split.select(range(9, -1, -1))
    elif what == "crop":
        extract = extract.replace(crop=WholeImage())
    else:
        options |= {"size": {"image_size": 16}, "mean": {"mean": [0.4] * 3}, "dtype": {"dtype": torch.bfloat16}}[what]
        extract = extract.replace(encoder=FrozenEncoder(tiny_encoder.model, **options))
    after = extract(split, SPECS[:1])
    assert not same(before, after)
    assert same(after, extract.replace(cache=None)(split, SPECS[:1]))


def test_weights_that_change_give_new_features(tiny_encoder, tmp_path):
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path, progress=False)
    before = extract(pictures(), SPECS)
    tiny_encoder.model.layers[0].mlp.fc1.bias.data[0] += 1
    assert not same(before, extract(pictures(), SPECS))


def test_features_that_are_not_finite_are_an_error(tiny_encoder, tmp_path):
    tiny_encoder.model.norm.weight.data[0] = torch.nan
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path, progress=False)
    for _ in range(2):
        with pytest.raises(ValueError, match="features last/mean/norm of tiny hold numbers that are not finite"):
            extract(pictures(), SPECS)


def test_without_room_on_the_disk_features_stay_in_memory_and_without_both_there_is_an_error(
    tiny_encoder, tmp_path, monkeypatch, caplog
):
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path, progress=False)
    monkeypatch.setattr("shutil.disk_usage", lambda *args: SimpleNamespace(free=100))
    assert same(extract(pictures(), SPECS), extract.replace(cache=None)(pictures(), SPECS))
    assert "features are not kept: the features take 0.0 GiB, and 0.0 GiB are free in" in caplog.text
    assert "--cache FOLDER or the variable HF_MIM_CACHE" in caplog.text
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100))
    for cache in (tmp_path, None):
        with pytest.raises(ValueError, match=r"the features take .* GiB, and 0.0 GiB are free in memory"):
            extract.replace(cache=cache)(pictures(), SPECS)
    assert not list(tmp_path.iterdir())


def files(folder, count=6):
    """Pictures as files, all of one size in bytes."""
    folder.mkdir()
    for i in range(count):
        Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(folder / f"{i}.bmp")
    return Images(load_images(str(folder)))


def test_other_bytes_under_the_same_name_size_and_time_are_noticed(tiny_encoder, tmp_path):
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path / "cache", progress=False)
    split, path = files(tmp_path / "photos"), tmp_path / "photos" / "3.bmp"
    for _ in range(2):  # the second time the cache knows what the files held
        for i in range(6):
            os.utime(tmp_path / "photos" / f"{i}.bmp", (1e9, 1e9))
        with mock.patch.object(cache_module, "SETTLED", -1):
            before = extract(split, SPECS)
        about = path.stat()
        Image.fromarray(np.full((32, 32, 3), 77, np.uint8)).save(path)
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
        after = extract(split, SPECS)
        assert not same(before, after) and same(after, extract.replace(cache=None)(split, SPECS))
        Image.fromarray(np.full((32, 32, 3), 3, np.uint8)).save(path)


def test_a_copy_of_the_files_needs_no_new_features_and_what_they_hold_is_read_once(counted, tmp_path, monkeypatch):
    encoder, seen = counted
    extract = FeatureExtractor(encoder, cache=tmp_path / "cache", progress=False)
    monkeypatch.setattr(cache_module, "SETTLED", -1)
    before = extract(files(tmp_path / "photos"), SPECS)
    assert same(before, extract(files(tmp_path / "copy"), SPECS)) and sum(seen) == 6
    monkeypatch.setattr(cache_module, "digests", lambda images: pytest.fail("the files were read again"))
    extract(Images(load_images(str(tmp_path / "photos"))), SPECS)


def test_a_file_that_was_changed_a_moment_ago_is_read_again(tmp_path):
    split = files(tmp_path / "photos")
    cache_module.image_digests(split.images, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()  # its next change might have the same time


@pytest.mark.parametrize("fails_at", ["the folder", "the features", "the record"])
def test_a_disk_that_is_full_costs_a_warning_and_leaves_no_half_file(
    tiny_encoder, tmp_path, monkeypatch, caplog, fails_at
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    expected = FeatureExtractor(tiny_encoder, progress=False)(pictures(), SPECS)
    place = {"the folder": "pathlib.Path.mkdir", "the features": "os.posix_fallocate", "the record": "os.replace"}
    monkeypatch.setattr(place[fails_at], full)
    cache = tmp_path / "cache"
    found = FeatureExtractor(tiny_encoder, cache=cache, progress=False)(pictures(), SPECS)
    assert same(found, expected) and "features are not kept: [Errno 28] No space left on device" in caplog.text
    assert not list(cache.rglob("*.json")) and len(list(cache.rglob("*.f32"))) == 3 * (fails_at == "the record")
    monkeypatch.undo()
    assert same(FeatureExtractor(tiny_encoder, cache=cache, progress=False)(pictures(), SPECS), expected)


def test_two_extractions_at_once_into_one_cache_are_both_right(tiny_encoder, tmp_path, small_chunks):
    whole = FeatureExtractor(tiny_encoder, progress=False)(pictures(40), SPECS)
    context = multiprocessing.get_context("fork")
    other = context.Process(
        target=lambda: [FeatureExtractor(tiny_encoder, 2, cache=tmp_path, progress=False)(pictures(40), SPECS)]
    )
    other.start()
    here = FeatureExtractor(tiny_encoder, 3, cache=tmp_path, progress=False)(pictures(40), SPECS)
    other.join()
    assert other.exitcode == 0
    for features in (here, FeatureExtractor(tiny_encoder, cache=tmp_path, progress=False)(pictures(40), SPECS)):
        for one, two in zip(features, whole, strict=True):
            torch.testing.assert_close(one, two)


def test_an_image_file_that_is_missing_is_left_out_with_a_cache_too(tiny_encoder, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    images = load_images(tmp_path)
    (tmp_path / "3.png").unlink()
    for cache in (None, tmp_path / "cache"):
        split = Images(images)
        (features,) = FeatureExtractor(tiny_encoder, cache=cache, progress=False)(split, SPECS[:1])
        assert len(features) == len(split) == 4


def test_files_that_change_are_read_again(tiny_encoder, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path / "cache", progress=False)
    before = extract(Images(load_images(tmp_path)), SPECS)
    (tmp_path / "1.png").write_bytes(png(7))
    after = extract(Images(load_images(tmp_path)), SPECS)
    assert not same(before, after) and torch.equal(before[0][0], after[0][0])


def test_an_interrupted_extraction_goes_on_where_it_stopped(counted, tmp_path, small_chunks, monkeypatch):
    encoder, seen = counted
    extract = FeatureExtractor(encoder, batch_size=2, cache=tmp_path, progress=False)
    whole = extract.replace(cache=None)(pictures(), SPECS)
    seen.clear()
    encode = encoder.extract

    def interrupted(pixels, specs):
        if sum(seen) >= 8:
            raise KeyboardInterrupt
        return encode(pixels, specs)

    monkeypatch.setattr(encoder, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(pictures(), SPECS)
    monkeypatch.setattr(encoder, "extract", encode)
    assert same(extract(pictures(), SPECS), whole)
    assert sum(seen) == 8 + 2  # the two chunks of four that were complete are not computed again


def damage(path, how):
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "one bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"1234")
    elif how == "text":
        path.write_text("no record")
    elif how == "other record":
        path.write_text(json.dumps({"0": 5, "x": {"crc32": 1}}))


@pytest.mark.parametrize(
    ("suffix", "how"),
    [(".f32", how) for how in ("deleted", "truncated", "one bit", "zeros", "longer")]
    + [(".json", how) for how in ("deleted", "truncated", "one bit", "text", "other record")],
)
def test_a_damaged_cache_never_gives_a_wrong_number(suffix, how, tiny_encoder, tmp_path, small_chunks):
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path, progress=False)
    whole = [tensor.clone() for tensor in extract(pictures(), SPECS)]
    paths = sorted(tmp_path.rglob(f"*{suffix}"))
    assert len(paths) == 3
    for path in paths:
        damage(path, how)
        assert same(extract(pictures(), SPECS), whole)


def test_writing_into_features_does_not_change_the_cache(tiny_encoder, tmp_path):
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path, progress=False)
    (features,) = extract(pictures(), SPECS[:1])
    kept = features.clone()
    features.zero_()
    assert same(extract(pictures(), SPECS[:1]), [kept])


@pytest.mark.parametrize("cached", [False, True])
def test_a_broken_image_is_left_out_and_counted(cached, tiny_encoder, tmp_path, caplog):
    extract = FeatureExtractor(tiny_encoder, cache=tmp_path if cached else None, progress=False)
    for _ in range(2):  # from the cache, too
        split = pictures(10, image4=b"no image")
        (features,) = extract(split, SPECS[:1])
        assert len(features) == len(split) == 9 and split.read_labels().tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        assert split.describe()["broken_images_left_out"] == 1
    assert "1 of 10 images cannot be decoded: image 4" in caplog.text
    intact = pictures(10).select([0, 1, 2, 3, 5, 6, 7, 8, 9])
    assert same([features], extract.replace(cache=None)(intact, SPECS[:1]))


def test_too_many_broken_images_are_an_error(tiny_encoder):
    split = pictures(10, image4=b"no image", image7=b"")
    with pytest.raises(BrokenImagesError, match="2 of 10 images cannot be decoded: image 4, image 7; repair"):
        FeatureExtractor(tiny_encoder, progress=False)(split, SPECS)


def test_extraction_draws_nothing_from_the_random_numbers_of_a_training(tiny_encoder):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    FeatureExtractor(tiny_encoder, progress=False, crop=CenterCrop())(pictures(), SPECS)
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_change_nothing(tiny_encoder):
    extract = FeatureExtractor(tiny_encoder, batch_size=4, progress=False)
    assert same(extract(pictures(), SPECS), extract.replace(num_workers=2)(pictures(), SPECS))

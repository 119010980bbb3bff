"""Every kind of source is really written, and really loaded."""

import hashlib
import importlib
import io
import sys
import tarfile

import numpy as np
import pytest
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

import hf_mim.data
from hf_mim.data import ImageDataset, ImageStream, WholeImage, digits, load_images, textures
from hf_mim.data.sources import SplitNotFound, first_split, fixed_sample

CLASSES = ["cat", "dog"]


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(picture):
    return [picture(32, 32, seed) for seed in range(6)]


@pytest.fixture
def table(pictures):
    """Six images with the labels 0 1 0 1 0 1."""
    features = Features(image=ImageFeature(), label=ClassLabel(names=CLASSES))
    rows = {"image": [{"bytes": png(image), "path": None} for image in pictures], "label": [0, 1] * 3}
    return Dataset.from_dict(rows, features=features)


def write_table(table, folder, kind):
    if kind == "parquet":
        table.to_parquet(folder / "train.parquet")
        table.select([0]).to_parquet(folder / "test.parquet")
    elif kind == "single parquet":
        table.to_parquet(folder / "my_test_images.parquet")  # a single file is the data, whatever its name
        return folder / "my_test_images.parquet"
    elif kind == "arrow":
        table.save_to_disk(folder / "saved")
        next((folder / "saved").glob("*.arrow")).rename(folder / "train-00000-of-00001.arrow")
        return folder / "train-00000-of-00001.arrow"
    elif kind == "save_to_disk":
        table.save_to_disk(folder / "saved")
        return folder / "saved"
    elif kind == "save_to_disk, splits":
        DatasetDict(train=table, test=table.select([0])).save_to_disk(folder / "saved")
        return folder / "saved"
    return folder


def contents(dataset, labels=True):
    """[(pixels [3, 32, 32], label)], in order."""
    images = ImageStream if isinstance(dataset, IterableDataset) else ImageDataset
    samples = images(dataset, 32, crop=WholeImage(), labels=labels)
    return [(sample["pixel_values"].numpy(), sample.get("labels")) for sample in iter_once(samples)]


def iter_once(samples):
    return samples if isinstance(samples, ImageStream) else [samples[i] for i in range(len(samples))]


def assert_same(found, pictures, labels):
    assert len(found) == len(pictures)
    for (pixels, label), picture, expected in zip(found, pictures, labels, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(picture).transpose(2, 0, 1))
        assert label == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "single parquet", "arrow", "save_to_disk", "save_to_disk, splits"])
def test_tables_give_their_images_and_labels(tmp_path, table, pictures, kind, streaming):
    dataset = load_images(write_table(table, tmp_path, kind), streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert dataset.features["label"].names == CLASSES
    assert_same(contents(dataset), pictures, [0, 1] * 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_tars_give_their_images_and_labels(tmp_path, pictures, streaming):
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard:03d}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                for extension, data in (("png", png(pictures[number])), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number:05d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    assert_same(contents(load_images(tmp_path, streaming=streaming)), pictures, [0, 1] * 3)


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_of_mixed_formats_and_cases_give_labels(tmp_path, pictures, streaming):
    names = ["cat/a.PNG", "cat/deep/er/b.Bmp", "cat/c.tiff", "dog/a.WebP", "dog/b.ppm", "dog/c.npy"]
    for name, image in zip(names, pictures, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("npy"):
            np.save(tmp_path / name, np.asarray(image))
        else:
            image.save(tmp_path / name, **({"lossless": True} if name.endswith("WebP") else {}))
    (tmp_path / "cat" / "._a.PNG").write_bytes(b"what macOS leaves behind")
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = load_images(tmp_path, streaming=streaming)
    assert dataset.features["label"].names == CLASSES
    assert_same(contents(dataset), [pictures[i] for i in (0, 2, 1, 3, 4, 5)], [0, 0, 0, 1, 1, 1])


def test_a_flat_folder_has_no_labels(tmp_path, pictures):
    for number, image in enumerate(pictures):
        image.save(tmp_path / f"{number}.png")
    dataset = load_images(str(tmp_path))
    assert dataset.column_names == ["image"]
    assert_same(contents(dataset, labels=False), pictures, [None] * 6)


def test_classes_have_the_same_ids_in_every_split_of_a_folder(tmp_path, pictures):
    """Here in the folder that an archive unpacked to; the validation split lacks a class."""
    for number, name in enumerate(["train/ant", "train/bee", "train/cat", "val/bee", "val/cat"]):
        (tmp_path / "archive" / name).mkdir(parents=True)
        pictures[number].save(tmp_path / "archive" / name / "1.png")
    train, validation = load_images(tmp_path), load_images(tmp_path, split="validation")
    assert train.features["label"].names == validation.features["label"].names == ["ant", "bee", "cat"]
    assert (train["label"][:], validation["label"][:]) == ([0, 1, 2], [1, 2])
    assert load_images(tmp_path, split="val")["label"][:] == [1, 2]


def test_a_class_named_like_a_split_is_a_class(tmp_path, pictures):
    for name in ("train", "plane"):
        (tmp_path / name).mkdir()
        pictures[0].save(tmp_path / name / "1.png")
    assert load_images(tmp_path).features["label"].names == ["plane", "train"]


def test_images_stay_undecoded(tmp_path, table):
    row = load_images(write_table(table, tmp_path, "parquet"))[0]["image"]
    assert row["bytes"].startswith(b"\x89PNG")


def test_digits_are_embedded_and_always_split_alike():
    (train, test), again = digits(), digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train["image"][:] == again[0]["image"][:]
    assert not {row["bytes"] for row in train["image"]} & {row["bytes"] for row in test["image"]}
    assert np.bincount(test["label"][:], minlength=10).min() >= 25
    assert load_images("digits", split="test")["label"][:] == test["label"][:]
    # Averaged back to 8x8, the first picture is nearest to its own original of all 1,797.
    from sklearn.datasets import load_digits

    originals = load_digits()
    picture = np.asarray(Image.open(io.BytesIO(test[0]["image"]["bytes"])), dtype=float)
    assert picture.shape == (32, 32)
    small = picture.reshape(8, 4, 8, 4).mean((1, 3)) * 16 / 255
    nearest = np.abs(originals.images - small).mean((1, 2)).argmin()
    assert nearest == np.random.RandomState(0).permutation(1797)[0]
    assert originals.target[nearest] == test[0]["label"]


def test_textures_are_the_same_on_every_machine_and_have_the_waves_that_their_classes_say():
    train, test = textures()
    assert (len(train), len(test)) == (2000, 400) and load_images("textures", split="test")[:] == test[:]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in test["image"]])
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:12] == "137eb3d88625"
    # The strongest wave of the spectrum: its period, and the direction in which it runs, 0 to 180 degrees.
    spectrum = np.abs(np.fft.fft2(pixels - pixels.mean((1, 2), keepdims=True), (256, 256)))
    spectrum[:, :12, :12] = spectrum[:, :12, -12:] = spectrum[:, -12:, :12] = spectrum[:, -12:, -12:] = 0  # the light
    rows, columns = np.unravel_index(spectrum.reshape(len(pixels), -1).argmax(1), (256, 256))
    down, right = (np.fft.fftfreq(256)[found] for found in (rows, columns))
    period, angle = 1 / np.hypot(down, right), np.degrees(np.arctan2(down, right))
    names = np.array(test.features["label"].names)[test["label"][:]]
    for name, degrees, length in (("fine vertical", 0, 6), ("coarse falling", 45, 11), ("fine rising", 135, 6)):
        of_class = names == f"{name} stripes"
        off = (angle[of_class] - degrees + 90) % 180 - 90
        as_said = (np.abs(off) < 15) & (np.abs(period[of_class] / length - 1) < 0.25)
        assert as_said.mean() > 0.9, name


def test_scikit_learn_is_imported_only_when_digits_are_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # importing it raises
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setattr(hf_mim, "data", hf_mim.data)  # to be put back
    for name in [name for name in sys.modules if name.startswith("hf_mim.data")]:
        monkeypatch.delitem(sys.modules, name)
    data = importlib.import_module("hf_mim.data")
    with pytest.raises(ImportError):
        data.digits()


def test_the_image_and_label_columns_are_found_whatever_they_are_called(table):
    encoded = load_images(table)["image"][:]
    other = Dataset.from_dict({"photo": encoded[::-1], "mask": encoded, "kind": table["label"][:]}).cast(
        Features(photo=ImageFeature(), mask=ImageFeature(), kind=table.features["label"])
    )
    assert load_images(other)["image"][:] == encoded[::-1]
    assert load_images(other, image_column="mask")["image"][:] == encoded
    assert load_images(other)["label"][:] == [0, 1] * 3
    # Files that datasets did not write: encoded bytes, and names of classes.
    raw = Dataset.from_dict(
        {"id": range(6), "jpg": [row["bytes"] for row in encoded], "class": list("bababa")},
        features=Features(id=Value("int64"), jpg=Value("binary"), **{"class": Value("string")}),
    )
    found = load_images(raw)
    assert found["label"][:] == [1, 0] * 3 and found.features["label"].names == ["a", "b"]
    assert found[0]["image"]["bytes"].startswith(b"\x89PNG")


def test_labels_can_be_left_out_and_may_be_true_or_false(tmp_path, table, pictures):
    assert load_images(table, labels="none").column_names == ["image"]
    for number, name in enumerate(["patient 1/a.png", "patient 2/a.png"]):
        (tmp_path / name).parent.mkdir()
        pictures[number].save(tmp_path / name)
    lines = []
    assert load_images(tmp_path, labels="none", tell=lines.append).column_names == ["image"]
    assert lines[0].endswith("2 images (2 .png); no labels")
    ill = table.remove_columns("label").add_column("label", [True, False] * 3)
    for source in (ill, ill.to_iterable_dataset()):
        assert_same(contents(load_images(source)), pictures, [1, 0] * 3)


def test_arrays_in_a_column_are_images():
    pixels = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 10), dtype=np.uint8)
    dataset = Dataset.from_dict({"bands": pixels}, features=Features(bands=Array3D((32, 32, 10), "uint8")))
    images = ImageDataset(load_images(dataset), 32, num_channels=10, crop=WholeImage())
    np.testing.assert_array_equal(images[1]["pixel_values"], pixels[1].transpose(2, 0, 1))


def test_a_format_that_hides_columns_does_not_matter(tmp_path, table, pictures):
    formatted = table.with_format("numpy", columns=["label"])
    formatted.save_to_disk(tmp_path / "saved")
    for source in (formatted, tmp_path / "saved", table.with_transform(lambda rows: {"other": rows["label"]})):
        assert_same(contents(load_images(source)), pictures, [0, 1] * 3)
    assert_same(contents(load_images(table.with_format("numpy").to_iterable_dataset())), pictures, [0, 1] * 3)


def test_a_dictionary_of_datasets_gives_its_split(table, pictures):
    both = DatasetDict(train=table, validation=table.select([4, 5]))
    lines = []
    assert_same(contents(load_images(both, tell=lines.append)), pictures, [0, 1] * 3)
    assert lines == [
        "source 'a DatasetDict in memory', split train: 6 images; labels by column label, 2 classes: cat, dog (to "
        "leave them out: --labels none); other splits: validation (2)"
    ]
    assert_same(contents(load_images(both, "val")), pictures[4:], [0, 1])
    streams = IterableDatasetDict({name: data.to_iterable_dataset() for name, data in both.items()})
    assert_same(contents(load_images(streams, "validation")), pictures[4:], [0, 1])
    assert raised(load_images, both, "test").endswith("it has train, validation")
    assert "a Dataset or a DatasetDict, not a list" in raised(load_images, [table])


def raised(function, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_bad_sources_are_refused_in_one_line_that_says_why(tmp_path, table, picture):
    assert "does not exist" in raised(load_images, tmp_path / "missing" / "folder")
    assert "holds no images" in raised(load_images, tmp_path)
    assert "empty" in raised(load_images, "")
    assert "Hub" in raised(load_images, "nobody/nothing")
    (tmp_path / "notes.txt").write_text("text")
    assert "must be a folder or a file" in raised(load_images, tmp_path / "notes.txt")
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"not a picture")
    assert "can be read" in raised(load_images, tmp_path)
    DatasetDict(train=table).save_to_disk(tmp_path / "dictionary")
    assert raised(load_images, tmp_path / "dictionary", split="validation").endswith("it has train")
    assert raised(load_images, "digits", split="validation").endswith("it has test, train")
    assert raised(load_images, table, image_column="img").endswith("columns: image, label")
    assert raised(load_images, table, labels="class").endswith("columns: image, label")
    assert raised(load_images, table.remove_columns("image")).endswith("one of label")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    assert "broken.parquet" in raised(load_images, tmp_path / "broken.parquet")


def test_streamed_labels_that_are_names_are_left_out_or_where_asked_for_refused(tmp_path, pictures):
    rows = {"image": [{"bytes": png(image), "path": None} for image in pictures], "label": ["cat", "dog"] * 3}
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    assert load_images(tmp_path, streaming=True).column_names == ["image"]
    assert load_images(tmp_path)["label"] == [0, 1] * 3
    with pytest.raises(ValueError, match="labels='label' holds names.*streaming=False"):
        load_images(tmp_path, streaming=True, labels="label")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_without_rows_and_a_row_group_without_rows_are_no_damage(tmp_path, table, streaming):
    """Programs that write in parallel leave such files."""
    rows = table.data.table
    none = rows.slice(0, 0)
    parquet.write_table(none, tmp_path / "part-0.parquet")
    with parquet.ParquetWriter(tmp_path / "part-1.parquet", rows.schema) as writer:
        for part in (none, rows, none):
            writer.write_table(part)
    assert parquet.ParquetFile(tmp_path / "part-1.parquet").metadata.row_group(0).num_rows == 0
    assert [row["label"] for row in load_images(tmp_path, streaming=streaming, labels="label")] == [0, 1] * 3


def test_the_pictures_of_runs_are_no_data(tmp_path, pictures):
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    pictures[0].save(folder / "loss.png")
    assert len(load_images(tmp_path)) == 7
    for name in ("recipe.yaml", "trainer_state.json"):
        (folder / name).write_text("{}")
    assert len(load_images(tmp_path)) == 6


def test_the_first_split_that_is_there_is_taken_and_other_errors_are_not_swallowed():
    def load(split):
        if split == "damaged":
            raise ValueError("the file is damaged")
        if split not in ("b", "c"):
            raise SplitNotFound(f"no {split}")
        return split.upper()

    assert first_split(["a", "b", "c"], load) == ("B", "b")
    with pytest.raises(SplitNotFound, match="no d"):
        first_split(["a", "d"], load)
    with pytest.raises(ValueError, match="the file is damaged"):
        first_split(["a", "damaged", "b"], load)


def test_a_fixed_sample_is_always_the_same_and_two_do_not_overlap():
    images = Dataset.from_dict({"image": list(range(100))})
    first = fixed_sample(images, 30)["image"][:]
    assert first == fixed_sample(images, 30)["image"][:] != sorted(first)
    assert sorted(first) == fixed_sample(images, 30, in_order=True)["image"][:]
    assert not set(first) & set(fixed_sample(images, 30, start=30)["image"])
    assert fixed_sample(images.to_iterable_dataset(), 3, start=2)["image"][:] == [2, 3, 4]
    assert len(fixed_sample(images, 200)) == 100

"""Labels are declared, not guessed: by a column, by class folders, by a table beside the images; and their groups."""

import numpy as np
import pytest
from datasets import Array3D, ClassLabel, Dataset, Features, LargeList, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.data import ImageDataset, ImageStream, WholeImage, load_images
from hf_mim.data.embedded import png
from hf_mim.data.labelled import load_labelled
from hf_mim.data.sources import fixed_sample


def draw(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / name)
    return folder


def table(count: int, **columns) -> Dataset:
    """`count` images with further columns: name → (values, feature)."""
    image = {"bytes": png(Image.new("L", (8, 8))), "path": None}
    features = Features(image=ImageFeature(decode=False), **{name: feature for name, (_, feature) in columns.items()})
    rows = {"image": [image] * count} | {name: values for name, (values, _) in columns.items()}
    return Dataset.from_dict(rows, features=features)


def line_of(source, **options) -> str:
    lines = []
    load_images(source, tell=lines.append, **options)
    return lines[0]


INT, TEXT = Value("int64"), Value("string")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            {"kind": ([0, 1] * 20, ClassLabel(names=["a", "b"]))},
            "labels by column kind, 2 classes: a, b (to",
        ),
        ({"label": ([0, 1] * 20, INT)}, "labels by column label, numbers (to leave them out: --labels none)"),
        ({"class": (["a", "b"] * 20, TEXT)}, "labels by column class, 2 classes: a, b"),
        ({"label": ([0.5] * 40, Value("float32"))}, "no labels"),
        ({"label": ([str(i) for i in range(40)], TEXT)}, "column label holds 40 values for 40 images and is not taken"),
        ({"category": (["a", "b"] * 20, TEXT)}, "no labels; column category may hold labels; if it does: --labels cat"),
        ({"age": ([1, 2] * 20, INT)}, "no labels"),
        (
            {name: ([0, 1] * 20, ClassLabel(names=["a", "b"])) for name in ("fine_label", "coarse_label")},
            "labels by column fine_label, 2 classes: a, b (to leave them out: --labels none); column coarse_label "
            "holds classes too; to take it: --labels coarse_label",
        ),
        (
            {name: ([0, 1] * 20, ClassLabel(names=["a", "b"])) for name in ("one", "two")},
            "no labels; columns one and two hold classes; choose one, such as --labels one",
        ),
    ],
)
def test_a_column_is_taken_only_if_it_declares_itself(columns, told):
    assert told in line_of(table(40, **columns))


def test_the_option_overrules_what_declares_itself():
    data = table(40, label=([0, 1] * 20, INT), y=(["p", "q"] * 20, TEXT), none=([3, 4] * 20, INT))
    assert load_images(data, labels="y").features["label"].names == ["p", "q"]
    assert line_of(data, labels="y").endswith("40 images; labels by column y, 2 classes: p, q")
    assert load_images(data, labels="none")["label"][:2] == [3, 4], "a column that is called so"
    assert load_images(data.remove_columns("none"), labels="none").column_names == ["image"]
    for option in ("folder", "z"):
        with pytest.raises(ValueError, match=f"labels='{option}' is not a column; columns: image, label, y, none"):
            load_images(data, labels=option)


def test_class_folders_are_taken_against_the_rule_only_if_the_user_says_so(tmp_path):
    patients = draw(tmp_path / "scans", *(f"P{i:03}/{j}.png" for i in range(12) for j in range(3)))
    assert load_images(patients).column_names == ["image"]
    assert "--labels folder" in line_of(patients) and "P000, P001, P002 and 9 more" in line_of(patients)
    assert len(load_images(patients, labels="folder").features["label"].names) == 12
    with pytest.raises(ValueError, match="taken for groups such as patients.*if they are classes: --labels folder"):
        load_labelled(patients)
    with pytest.raises(ValueError, match="labels='folder' needs a folder for each of two classes"):
        load_images(draw(tmp_path / "flat", "1.png", "2.png"), labels="folder")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_beside_images_gives_their_labels_and_groups(tmp_path, kind):
    draw(tmp_path, "a/1.png", "a/2.png", "b/3.png", "b/4.png", "5.png")
    rows = {"file_name": ["b/3.png", "a/1.png", "a/2.png", "b/4.png"], "kind": list("xyxy"), "patient": [7, 7, 8, 8]}
    data = Dataset.from_dict(rows)
    path = str(tmp_path / f"metadata.{kind}")
    {"csv": data.to_csv, "jsonl": data.to_json, "parquet": data.to_parquet}[kind](path)
    images = load_images(tmp_path, labels="kind", group="patient")
    found = {
        row["image"]["path"].rpartition("/")[2]: (row["label"], row["group"])
        for row in images.with_format(None).to_list()
    }
    assert images.features["label"].names == ["x", "y"]
    assert found == {"1.png": (1, "7"), "2.png": (0, "8"), "3.png": (0, "7"), "4.png": (1, "8"), "5.png": (None, None)}
    line = line_of(tmp_path, labels="kind", group="patient")
    assert f"2 groups by column patient: 7, 8; 1 images have no row in metadata.{kind}" in line
    assert "left out" not in line


def test_a_table_lies_in_the_folder_of_each_split_and_a_label_comes_before_class_folders(tmp_path):
    draw(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/1.png", "test/dog/2.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\ncat/1.png,old\ndog/2.png,new\n")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\ncat/1.png,new\ndog/2.png,new\n")
    train, test = load_labelled(tmp_path)
    assert train.class_names == ["new", "old"] and train.read_labels().tolist() == [1, 0]
    assert test.read_labels().tolist() == [0, 0]
    assert "the 2 folders may be classes too; to take them: --labels folder" in line_of(tmp_path)
    assert load_images(tmp_path, labels="folder").features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\n1.png,a\n9.png,b\n", "metadata.csv names 1 files that do not exist: 9.png"),
        ("file_name,label\n1.png,a\n1.png,b\n", "metadata.csv has a second row for 1.png"),
        ("file_name,label\n1.png\n", "metadata.csv cannot be read: CSV parse error"),
        ("file_name,label\n../secret.png,a\n", "metadata.csv names 1 files that do not exist: ../secret.png"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_in_one_line(tmp_path, text, message):
    draw(tmp_path / "d", "1.png", "2.png")
    (tmp_path / "d" / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_images(tmp_path / "d")
    assert "\n" not in str(error.value)


def test_a_table_of_another_kind_is_only_named(tmp_path):
    draw(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("camera,year\nleica,1999\n")
    assert line_of(tmp_path).endswith("no labels; metadata.csv has no column file_name and is not read")
    with pytest.raises(ValueError, match="columns: image.*; metadata.csv has no column file_name and is not read"):
        load_images(tmp_path, labels="diagnosis")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\nnotes.txt,c\n")
    assert "1 rows of metadata name files that are no images" in line_of(tmp_path)


def test_groups_are_the_folders_that_hold_the_images(tmp_path):
    draw(tmp_path, "ill/P1/1.png", "ill/P2/images/1.png", "well/P1/1.png", "well/2.png", "train/3.png")
    images = load_images(tmp_path, labels="none", group="folder")
    names = {row["image"]["path"].removeprefix(f"{tmp_path}/"): row["group"] for row in images}
    assert names == {
        "ill/P1/1.png": "P1",
        "ill/P2/images/1.png": "P2",
        "well/P1/1.png": "P1",
        "well/2.png": "well",
        "train/3.png": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(group="age"), "group='age' is not a column; columns: image, label"),
        (
            dict(group="file"),
            "group='file' is not a column; .*; a folder has file where some files",
        ),
        (dict(group="label", labels="label"), "group must be another column than labels, not 'label' for both"),
        (dict(group="image"), "group='image' must hold ids or names"),
        (dict(group="label", labels="none", streaming=True), "group='label' needs the images as a whole, not a stream"),
    ],
)
def test_a_group_that_cannot_be_one_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_images(table(4, label=([0, 1] * 2, INT)), **options)


def scans(tmp_path, patients=20, each=4):
    """Images of patients, half of them ill, each with a few images; a table says who is who."""
    rows = ["file_name,ill,patient"]
    for patient in range(patients):
        draw(tmp_path, *(f"{patient}_{i}.png" for i in range(each)))
        rows += [f"{patient}_{i}.png,{patient % 2},p{patient}" for i in range(each)]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    return tmp_path


def test_no_group_is_on_both_sides_of_the_held_out_fifth(tmp_path):
    train, test = load_labelled(scans(tmp_path), labels="ill", group="patient")
    groups = [set(part.images["group"]) for part in (train, test)]
    assert not groups[0] & groups[1] and len(train) == 64 and len(test) == 16
    assert test.read_labels().bincount().tolist() == [8, 8], "a fifth of each class"
    again = load_labelled(tmp_path, labels="ill", group="patient")[1]
    assert again.images["group"][:] == test.images["group"][:]
    loose = load_labelled(tmp_path, labels="ill")
    names = [{row["image"]["path"].rpartition("/")[2].split("_")[0] for row in part.images} for part in loose]
    assert names[0] & names[1], "without groups they are on both sides: the test would be too easy"
    assert (train.labels, train.group) == ("column ill", "column patient")


def test_groups_on_both_sides_of_a_sources_own_splits_are_told(tmp_path, caplog):
    for split, patients in (("train", "ppqq"), ("test", "qqrr")):
        table(4, label=([0, 1] * 2, INT), patient=(list(patients), TEXT)).to_parquet(tmp_path / f"{split}.parquet")
    train, test = load_labelled(tmp_path, group="patient")
    assert (len(train), len(test)) == (4, 4)
    assert "1 groups are both in the training and in the test images: q; the splits of the source" in caplog.text


PIXELS = np.random.RandomState(0).randint(0, 4096, (4, 12, 10, 2)).astype(np.uint16)
LISTS = List(List(List(Value("uint16"))))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("feature", [Array3D((12, 10, 2), "uint16"), LISTS, LargeList(LISTS.feature)])
def test_arrays_and_lists_of_lists_keep_their_type_in_a_stream_too(feature, streaming):
    data = Dataset.from_dict({"image": PIXELS.tolist()}, features=Features(image=feature))
    images = load_images(data, streaming=streaming)
    if streaming:
        samples = list(ImageStream(images, (12, 10), 2, WholeImage(), own_depth=True))
    else:
        dataset = ImageDataset(images, (12, 10), 2, WholeImage(), own_depth=True)
        samples = [dataset[i] for i in range(4)]
    for sample, expected in zip(samples, PIXELS, strict=True):
        assert str(sample["pixel_values"].dtype) == "torch.uint16"
        np.testing.assert_array_equal(sample["pixel_values"].numpy(), expected.transpose(2, 0, 1))
    (one,) = fixed_sample(images, 1)["image"]
    assert np.asarray(one).dtype == np.uint16


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_different_sizes_and_bytes_as_lists_are_images(streaming):
    lists = [np.full((5 + i, 6), 0.25 + i, np.float32).tolist() for i in range(3)]
    data = Dataset.from_dict({"image": lists}, features=Features(image=List(List(Value("float32")))))
    view = ImageStream if streaming else ImageDataset
    samples = view(load_images(data, streaming=streaming), 4, 1, WholeImage(), own_depth=True)
    samples = list(samples) if streaming else [samples[i] for i in range(3)]
    assert [sample["pixel_values"].unique().tolist() for sample in samples] == [[0.25], [1.25], [2.25]]
    encoded = [list(png(Image.new("L", (8, 8), level))) for level in (3, 4)]
    data = Dataset.from_dict({"bytes": encoded}, features=Features(bytes=List(Value("uint8"))))
    samples = view(load_images(data, streaming=streaming), 8, 1, WholeImage())
    samples = list(samples) if streaming else [samples[i] for i in range(2)]
    assert [int(sample["pixel_values"].max()) for sample in samples] == [3, 4]

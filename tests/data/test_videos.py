"""Videos and their masks, from folders and tables, and what is wrong with them."""

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.data.masks import MaskedImages
from hf_mim.data.videos import Videos, load_videos


def save_frame(path: Path, shade: int, size=(24, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (shade, shade, shade)).save(path)


def save_mask(path: Path, ids: np.ndarray, palette: bool = False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8))
    if palette:
        image = image.convert("P")  # grey values become indices of the same number
        image.putpalette([7, 99, 200] * 256)
    image.save(path)


def object_at(left: int, value: int = 1, size=(24, 32)) -> np.ndarray:
    ids = np.zeros(size, np.uint8)
    ids[4:12, left : left + 8] = value
    return ids


def davis(folder: Path, sequences=("bear", "car"), frames=3, resolution="480p", value=1) -> Path:
    for number, sequence in enumerate(sequences):
        for frame in range(frames):
            name = f"{resolution}/{sequence}/{frame:05d}"
            save_frame(folder / "JPEGImages" / f"{name}.jpg", 40 * number + 10 * frame)
            save_mask(folder / "Annotations" / f"{name}.png", object_at(frame, value), palette=value != 255)
    return folder


def png(array: np.ndarray) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def shades(videos: Videos, sequence: str) -> list[int]:
    values = videos.frames(sequence)["image"]
    return [np.asarray(Image.open(value["path"] or io.BytesIO(value["bytes"])))[0, 0, 0].item() for value in values]


def test_a_davis_folder_with_palette_masks_gives_ids_and_not_colours(tmp_path):
    videos = load_videos(davis(tmp_path, value=3))
    assert videos.names == ["bear", "car"] and videos.size("car") == (24, 32)
    assert shades(videos, "car") == pytest.approx([40, 50, 60], abs=1)
    assert (videos.read_masks("bear") == np.stack([object_at(i, 3) for i in range(3)])).all()
    assert (videos.read_first_mask("bear") == object_at(0, 3)).all()
    assert videos.object_ids("bear").tolist() == [3]


def test_of_several_resolutions_480p_is_read_and_its_masks(tmp_path):
    davis(tmp_path, resolution="1080p", value=2)
    assert load_videos(tmp_path).object_ids("bear").tolist() == [2]
    davis(tmp_path, resolution="480p", value=1)
    assert load_videos(tmp_path).object_ids("bear").tolist() == [1]


def test_a_split_is_one_of_davis_lists(tmp_path):
    davis(tmp_path)
    for split, name in (("val", "car"), ("train", "bear")):
        path = tmp_path / "ImageSets" / "2017" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name}\n")
    assert load_videos(tmp_path).names == ["car"]
    assert load_videos(tmp_path, split="train").names == ["bear"]
    with pytest.raises(ValueError, match="it has train, val"):
        load_videos(tmp_path, split="test")


def test_the_lists_of_davis_2016_are_pairs_of_paths(tmp_path):
    davis(tmp_path)
    path = tmp_path / "ImageSets" / "480p" / "val.txt"
    path.parent.mkdir(parents=True)
    names = [f"480p/car/{frame:05d}" for frame in range(3)]
    path.write_text("".join(f"/JPEGImages/{name}.jpg /Annotations/{name}.png \n" for name in names) + "\n")
    assert load_videos(tmp_path).names == ["car"]
    with pytest.raises(ValueError, match="it has val"):
        load_videos(tmp_path, split="train")


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for frame in range(12):  # frame10 stands before frame9 in the alphabet
        save_frame(tmp_path / "frames" / "walk" / f"frame{frame}.png", frame)
        save_mask(tmp_path / "masks" / "walk" / f"frame{frame}.png", object_at(frame))
    videos = load_videos(tmp_path)
    assert shades(videos, "walk") == list(range(12))
    assert (videos.read_masks("walk")[10] == object_at(10)).all()


def test_a_table_is_grouped_by_sequence_and_sorted_by_frame():
    order = [("b", 1), ("a", 2), ("a", 0), ("b", 0), ("a", 1)]
    columns = {
        "image": [png(np.full((24, 32, 3), 10 * frame, np.uint8)) for _, frame in order],
        "mask": [png(object_at(frame, 1 + (name == "b"))) for name, frame in order],
        "frame": [frame for _, frame in order],
        "label": ["ab".index(name) for name, _ in order],
    }
    features = {
        "image": ImageFeature(),
        "mask": ImageFeature(),
        "frame": Value("int32"),
        "label": ClassLabel(names=["a", "b"]),
    }
    videos = load_videos(Dataset.from_dict(columns, Features(features)))
    assert videos.names == ["a", "b"]
    assert shades(videos, "a") == [0, 10, 20]
    assert (videos.read_masks("b") == np.stack([object_at(0, 2), object_at(1, 2)])).all()


def test_without_a_split_a_table_is_tested_on_its_test_split(tmp_path):
    for split, shade in (("train", 10), ("validation", 20), ("test", 30)):
        frames = [np.full((24, 32, 3), shade, np.uint8)] * 2
        columns = {"image": [png(frame) for frame in frames], "mask": [png(object_at(i)) for i in range(2)]}
        features = Features(image=ImageFeature(), mask=ImageFeature(), video=Value("string"))
        Dataset.from_dict(columns | {"video": ["a", "a"]}, features).to_parquet(tmp_path / f"{split}.parquet")
    assert shades(load_videos(tmp_path), "a") == [30, 30]
    assert shades(load_videos(tmp_path, split="val"), "a") == [20, 20]
    (tmp_path / "test.parquet").unlink()
    assert shades(load_videos(tmp_path), "a") == [20, 20]
    (tmp_path / "validation.parquet").unlink()
    assert load_videos(tmp_path).name == f"{tmp_path.name}, split train"


def test_255_is_the_object_where_there_is_no_other_and_void_where_there_is(tmp_path):
    binary = load_videos(davis(tmp_path / "binary", value=255))
    assert (binary.read_masks("bear")[2] == object_at(2, 1)).all()
    davis(tmp_path / "void", sequences=["bear"])
    first = object_at(0)
    first[20:] = 255
    save_mask(tmp_path / "void" / "Annotations" / "480p" / "bear" / "00000.png", first, palette=True)
    save_mask(tmp_path / "void" / "Annotations" / "480p" / "bear" / "00001.png", object_at(1, 255), palette=True)
    videos = load_videos(tmp_path / "void")
    assert videos.object_ids("bear").tolist() == [1]
    assert (videos.read_masks("bear")[1] == object_at(1, 255)).all()  # the first mask tells for all


def test_the_first_mask_alone_tells_what_255_is(tmp_path):
    """An id that comes later changes nothing: what the task gives away is the first mask."""
    later = davis(tmp_path, value=255) / "Annotations" / "480p" / "bear" / "00001.png"
    save_mask(later, object_at(1, 255) + object_at(20, 7))
    videos = load_videos(tmp_path)
    assert videos.object_ids("bear").tolist() == [1]
    assert (videos.read_masks("bear") == np.stack([object_at(i) for i in range(3)])).all()


def test_only_first_masks_are_decoded_in_loading(tmp_path, monkeypatch):
    read = []
    read_mask = MaskedImages.read_mask
    monkeypatch.setattr(MaskedImages, "read_mask", lambda self, row: read.append(row) or read_mask(self, row))
    videos = load_videos(davis(tmp_path))
    videos.read_first_mask("car")
    assert set(read) == {0, 3}


def test_sequences_are_picked_by_number_or_name(tmp_path):
    videos = load_videos(davis(tmp_path, sequences=["a", "b", "c"]))
    assert videos.pick(None) == ["a", "b", "c"]
    assert videos.pick(2) == ["a", "b"]
    assert videos.pick(["c", "a"]) == ["c", "a"]
    assert videos.describe(["c"])["frames"] == 3
    for wrong in (0, 4, ["d"], []):
        with pytest.raises(ValueError, match="sequences must be"):
            videos.pick(wrong)


def no_masks(folder):
    save_frame(folder / "JPEGImages" / "480p" / "bear" / "00000.jpg", 0)


def mask_of_another_size(folder):
    save_mask(davis(folder) / "Annotations" / "480p" / "bear" / "00001.png", np.ones((12, 16)))


def one_frame(folder):
    davis(folder, frames=1)


def first_mask_empty(folder):
    save_mask(davis(folder) / "Annotations" / "480p" / "bear" / "00000.png", np.zeros((24, 32)))


def frames_without_first_mask(folder):
    (davis(folder) / "Annotations" / "480p" / "bear" / "00000.png").unlink()


def frames_of_two_sizes(folder):
    save_frame(davis(folder) / "JPEGImages" / "480p" / "bear" / "00001.jpg", 0, (12, 16))
    save_mask(folder / "Annotations" / "480p" / "bear" / "00001.png", np.ones((12, 16)))


def coloured_mask(folder):
    Image.new("RGB", (32, 24)).save(davis(folder) / "Annotations" / "480p" / "bear" / "00000.png")


def no_such_split(folder):
    (davis(folder) / "ImageSets" / "2017").mkdir(parents=True)


@pytest.mark.parametrize(
    "prepare, message",
    [
        (no_masks, "has JPEGImages, but no folder Annotations or masks"),
        (mask_of_another_size, "bear/00001.jpg .* is 24×32 .* but its mask 12×16"),
        (one_frame, "sequence bear .* has one frame"),
        (first_mask_empty, "first mask of sequence bear .* must hold an object, not none"),
        (frames_without_first_mask, "bear/00000.jpg .* has no mask"),
        (frames_of_two_sizes, "frames of sequence bear .* not 12×16, 24×32"),
        (coloured_mask, "bear/00000.png.* not colours .RGB."),
        (no_such_split, "split 'val' is not in .* it has none"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_videos(tmp_path)
    assert "\n" not in str(error.value)


def test_a_table_without_sequences_or_masks_is_refused():
    images = {"image": [png(np.zeros((24, 32, 3), np.uint8))] * 2}
    with pytest.raises(ValueError, match="sequence_column must be one of image"):
        load_videos(Dataset.from_dict(images, Features(image=ImageFeature())))
    named = Dataset.from_dict(images | {"video": ["a", "a"]}, Features(image=ImageFeature(), video=Value("string")))
    with pytest.raises(ValueError, match="has no masks"):
        load_videos(named)


def test_davis_2016_of_the_shared_data(shared_data):
    videos = load_videos(shared_data / "davis2016_val")
    assert len(videos) == 10 and len(videos.frames("drift-straight")) == 50
    assert videos.size("blackswan") == (240, 427)
    masks = videos.read_masks("blackswan")
    assert masks.shape == (50, 240, 427) and set(np.unique(masks)) == {0, 1}

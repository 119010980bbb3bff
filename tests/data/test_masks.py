"""Masks are ids, whatever file they come in."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageFile, ImageOps

from hf_mim.data.masks import MaskedImages, load_masks, read_mask_ids

IDS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def encoded(image, kind="PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def palette_image():
    image = Image.frombytes("P", (4, 3), IDS.tobytes())
    image.putpalette(np.random.RandomState(0).randint(0, 256, 768, dtype=np.uint8).tobytes())
    return image


def test_grey_and_palette_files_give_ids_not_colours():
    grey = read_mask_ids(encoded(Image.fromarray(IDS)))
    palette = read_mask_ids(encoded(palette_image()))
    assert grey.dtype == palette.dtype == np.uint8
    assert (grey == IDS).all() and (palette == IDS).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_ids_of_16_bits_are_kept(kind):
    ids = IDS.astype(np.uint16) * 1000
    found = read_mask_ids(encoded(Image.fromarray(ids), kind))
    assert found.dtype == np.int64 and (found == ids).all()


def test_one_bit_and_arrays_are_ids_too():
    assert (read_mask_ids(Image.fromarray(IDS > 5)) == (IDS > 5)).all()
    assert (read_mask_ids(IDS.astype(np.int32)[..., None]) == IDS).all()
    assert read_mask_ids(IDS > 5).dtype == np.uint8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_mask_as_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    value = encoded(Image.fromarray(IDS), exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(value["bytes"]))))
    assert (read_mask_ids(value) == upright).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (encoded(Image.fromarray(IDS).convert("RGB")), "cats/1.png: a mask must hold ids, not colours .RGB."),
        (encoded(Image.fromarray(IDS), "JPEG"), "cats/1.png: a mask must not be a JPEG"),
        ({"bytes": b"junk", "path": None}, "cats/1.png: not an image"),
        (IDS.astype(np.float32), r"cats/1.png: a mask must be integers \[h, w\], not float32 \[3, 4\]"),
    ],
)
def test_what_holds_no_ids_is_refused_in_one_line_that_names_it(value, message):
    with pytest.raises(ValueError, match=message) as error:
        read_mask_ids(value, "cats/1.png")
    assert "\n" not in str(error.value)


@pytest.fixture
def pairs():
    """Four images of 6×8 with masks: image i has the ids i, i + 1."""
    images = [Image.fromarray(np.full((6, 8, 3), 40 * i, np.uint8)) for i in range(4)]
    masks = [Image.fromarray(np.tile(np.array([i, i + 1], np.uint8), (6, 4))) for i in range(4)]
    return images, masks


def table(images, masks, mask_column="mask", image_column="image") -> Dataset:
    rows = {image_column: [encoded(image) for image in images], mask_column: [m and encoded(m) for m in masks]}
    return Dataset.from_dict(rows, features=Features({name: ImageFeature() for name in rows}))


def first_ids(data: MaskedImages) -> list[int]:
    return [int(mask[0, 0]) for mask in data.read_masks()]


def write_folders(root, images, masks, layout):
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        split = "val" if i == 3 else "train"
        for kind, picture in (("images", image), ("annotations", mask)):
            path = root / layout.format(kind=kind, split=split) / f"{i}.{'jpg' if kind == 'images' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


@pytest.mark.parametrize("layout", ["{kind}/{split}", "{split}/{kind}", "data/{kind}/{split}/city", "{kind}"])
def test_folders_of_images_and_masks_pair_by_name(tmp_path, pairs, layout):
    write_folders(tmp_path, *pairs, layout)
    if layout == "{kind}":
        assert first_ids(load_masks(tmp_path)) == [0, 1, 2, 3]
    else:
        assert first_ids(load_masks(tmp_path, "train")) == [0, 1, 2]
        assert first_ids(load_masks(tmp_path, "validation")) == [3]
        with pytest.raises(ValueError, match="split 'test' is not in source .*; it has train, validation"):
            load_masks(tmp_path, "test")


@pytest.mark.parametrize("column", ["mask", "label", "annotation"])
def test_a_mask_column_is_found_by_its_name(tmp_path, pairs, column):
    table(*pairs, column).to_parquet(tmp_path / "train.parquet")
    data = load_masks(tmp_path / "train.parquet")
    assert first_ids(data) == [0, 1, 2, 3] and len(data) == 4
    assert data.images.column_names == ["image"] and data.images[0]["image"]["bytes"].startswith(b"\x89PNG")
    assert data.sizes == [(6, 8)] * 4


def test_columns_can_be_named(pairs):
    data = load_masks(table(*pairs, "ids", "view"), image_column="view", mask_column="ids")
    assert first_ids(data) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="mask_column='masks' is not a column; there are view, ids"):
        load_masks(table(*pairs, "ids", "view"), image_column="view", mask_column="masks")
    with pytest.raises(ValueError, match="has no masks: .* set mask_column to one of view, ids"):
        load_masks(table(*pairs, "ids", "view"), image_column="view")


def test_a_label_that_names_a_class_is_no_mask(pairs):
    labelled = table(*pairs).remove_columns("mask").add_column("label", ["cat"] * 4)
    with pytest.raises(ValueError, match="has no masks"):
        load_masks(labelled)


def test_images_are_selected_and_left_out_with_their_masks(pairs):
    data = load_masks(table(*pairs))
    part = data.select([3, 1])
    assert first_ids(part) == [3, 1] and part.sizes == [(6, 8)] * 2
    part.leave_out([0])
    assert first_ids(part) == [1] and part.describe()["broken_images_left_out"] == 1
    assert first_ids(data) == [0, 1, 2, 3]
    assert data.describe() == {"source": "a Dataset in memory, split train", "images": 4}


def test_sizes_are_those_of_the_upright_image(pairs):
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = {"image": [encoded(pairs[0][0], exif=exif)], "mask": [encoded(pairs[1][0].transpose(Image.ROTATE_270))]}
    data = load_masks(Dataset.from_dict(rows, features=Features({name: ImageFeature() for name in rows})))
    assert data.sizes == [(8, 6)] and data.read_mask(0).shape == (8, 6)


def test_pairs_that_do_not_fit_are_named_before_any_work(tmp_path, pairs):
    images, masks = pairs
    small = masks[:2] + [Image.fromarray(np.zeros((3, 4), np.uint8))] + masks[3:]
    colour = masks[:3] + [images[0]]
    for wrong, message in [
        (small, r"image 2 of .* is 6×8 \(height×width\) but its mask 3×4; each mask must have the size"),
        (masks[:1] + [None] + masks[2:], "image 1 of .* has no mask; add it, or leave the image out"),
        (colour, "the mask of image 3: a mask must hold ids, not colours .RGB."),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            load_masks(table(images, wrong))
        assert "\n" not in str(error.value)
    write_folders(tmp_path, images, masks, "{kind}")
    (tmp_path / "annotations" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"images/2\.jpg of .* has no mask"):
        load_masks(tmp_path)


def test_pairs_are_checked_by_their_headers_alone(pairs, monkeypatch):
    images, masks = table(*pairs).select_columns("image"), table(*pairs).select_columns("mask")
    images, masks = (data.cast_column(data.column_names[0], ImageFeature(decode=False)) for data in (images, masks))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("an image was decoded"))
    assert MaskedImages(images, masks).sizes == [(6, 8)] * 4


def test_camvid_loads_with_the_ids_of_its_readme(shared_data):
    data = load_masks(shared_data / "camvid", "val")
    assert len(data) == 101 and set(data.sizes) == {(360, 480)}
    assert set(np.unique(data.read_mask(0))) <= set(range(12))

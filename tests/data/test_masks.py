"""Masks are ids, whatever file they come in."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageFile, ImageOps

from hf_mim.data import WholeImage, load_images
from hf_mim.data.crop import load_crop
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


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{split}/{i}.jpg", "{split}annot/{i}.png"),
        ("{split}/{i}.jpg", "{split}_masks/{i}.png"),
        ("VOC/JPEGImages/{split}/{i}.jpg", "VOC/SegmentationClass/{split}/{i}.png"),
        ("{split}2017/{i}.jpg", "annotations/{split}2017/{i}.png"),
        ("{split}/{i}.png", "{split}/{i}_mask.png"),
    ],
)
def test_masks_are_found_in_the_layouts_in_which_pretraining_leaves_them_out(tmp_path, pairs, image, mask):
    for i, pictures in enumerate(zip(*pairs, strict=True)):
        for layout, picture in zip((image, mask), pictures, strict=True):
            path = tmp_path / layout.format(split="val" if i == 3 else "train", i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    assert first_ids(load_masks(tmp_path, "train")) == [0, 1, 2] and first_ids(load_masks(tmp_path, "val")) == [3]
    assert len(load_images(tmp_path)) == 3


def test_an_image_with_masks_in_two_folders_needs_a_choice(tmp_path, pairs):
    for kind, pictures in zip(
        ("JPEGImages", "SegmentationClass", "SegmentationObject"), (*pairs, pairs[1]), strict=True
    ):
        (tmp_path / kind).mkdir()
        pictures[2].save(tmp_path / kind / "2.png")
    with pytest.raises(ValueError, match="masks of one image; choose their folder, such as --mask_column Segmentation"):
        load_masks(tmp_path)
    assert first_ids(load_masks(tmp_path, mask_column="SegmentationObject")) == [2]
    with pytest.raises(ValueError, match="mask_column='x' is no folder of masks"):
        load_masks(tmp_path, mask_column="x")


def test_groups_of_masked_images_are_their_folders_or_a_column(tmp_path, pairs):
    for i, pictures in enumerate(zip(*pairs, strict=True)):
        for kind, picture in zip(("images", "masks"), pictures, strict=True):
            (tmp_path / kind / f"scene{i // 2}").mkdir(parents=True, exist_ok=True)
            picture.save(tmp_path / kind / f"scene{i // 2}" / f"{i}.png")
    data = load_masks(tmp_path, group="folder")
    assert data.read_groups().tolist() == [0, 0, 1, 1] and data.select([3, 0]).read_groups().tolist() == [1, 0]
    rows = table(*pairs).add_column("scene", ["a", "b", "a", "b"])
    assert load_masks(rows, group="scene").read_groups().tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="group of a folder of masks must be 'folder', not 'scene'"):
        load_masks(tmp_path, group="scene")


@pytest.mark.parametrize("kind", ["uint16 PNG", "turned", "alpha"])
def test_images_of_16_bits_turned_or_with_alpha_have_masks_of_their_size(tmp_path, kind):
    """The image is 6 × 8 when upright; its mask is stored upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(48, dtype=np.uint16).reshape(6, 8) * 1000
    stored = {
        "uint16 PNG": Image.fromarray(pixels),
        "turned": Image.fromarray(np.rot90((pixels >> 8).astype(np.uint8)).copy()),
        "alpha": Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGBA"),
    }[kind]
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    stored.save(tmp_path / "images" / "1.png", **({"exif": exif} if kind == "turned" else {}))
    Image.fromarray(np.tile(np.array([0, 1], np.uint8), (6, 4))).save(tmp_path / "masks" / "1.png")
    data = load_masks(tmp_path)
    assert data.sizes == [(6, 8)]
    found = load_crop(data.images[0]["image"], WholeImage(), (6, 8), 1, None)[0].numpy()
    np.testing.assert_array_equal(found, pixels if kind == "uint16 PNG" else pixels >> 8)


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
    with pytest.raises(ValueError, match="mask_column='masks' is not a column; columns: view, ids"):
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

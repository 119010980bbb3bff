import io
import math
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hf_mim.data import load_images
from hf_mim.data.scenes import COUNTS, DISTANCES, MIN_VISIBLE, RADII, SHAPES, SceneObject, draw, place_objects, scenes


def outline(item: SceneObject, side: int) -> list[tuple[float, float]]:
    """The corners, tips and notches by turns, in pixels: how the tests draw a shape, by PIL."""
    tips, notch = SHAPES[item.shape]
    corners = []
    for k in range(2 * tips):
        radius, angle = item.reach * (notch if k % 2 else 1), item.angle + k * math.pi / tips
        x, y = item.centre[0] + radius * math.cos(angle), item.centre[1] + radius * math.sin(angle)
        corners.append((x * side - 0.5, y * side - 0.5))  # PIL counts from the middle of the first pixel
    return corners


def filled(item: SceneObject, side: int) -> np.ndarray:
    mask = Image.new("1", (side, side))
    ImageDraw.Draw(mask).polygon(outline(item, side), fill=1)
    return np.asarray(mask)


def rng(index, seed=0):
    return random.Random(f"{seed}/{index}")


def test_a_scene_depends_on_seed_split_and_index_alone():
    few, many = scenes(3, size=32), scenes(6, size=32)
    assert few[:] == many[:3]
    others = scenes(6, size=32, seed=1), scenes(6, size=32, split="test")
    pictures = [row["bytes"] for dataset in (many, *others) for row in dataset["image"]]
    assert len(set(pictures)) == 18
    larger = scenes(3, size=48)
    assert larger["positions"][:] == few["positions"][:] and larger["distance"][:] == few["distance"][:]


def test_the_same_scene_at_another_size_looks_the_same():
    small, large = (draw(place_objects(generator := rng(1)), size, generator) for size in (64, 256))
    shrunk = Image.fromarray(large).resize((64, 64), Image.Resampling.BOX)
    assert np.abs(np.asarray(shrunk, np.float32) - small).mean() < 4


def test_labels_follow_from_the_positions():
    for row in scenes(20, size=32):
        points = np.array(row["positions"])
        between = np.linalg.norm(points[:, None] - points, axis=-1)[~np.eye(len(points), dtype=bool)]
        assert row["num_objects"] == len(points)
        assert row["distance"] == pytest.approx(between.min(), abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_filled_up_to_their_outline(shape):
    item = SceneObject(shape, centre=(0.52, 0.47), reach=0.3, angle=0.7, color=(1, 0, 0))
    box, edge = item.signed_distance(500)
    inside = np.zeros((500, 500), dtype=bool)
    inside[box] = edge < 0
    reference = filled(item, 500)
    assert (inside != reference).sum() < 0.03 * reference.sum()  # PIL fills the pixels on the edge too


def test_objects_of_one_radius_are_equally_large():
    areas = []
    for index in range(200):
        item = place_objects(rng(index))[0]
        areas.append(filled(SceneObject(item.shape, (0.5, 0.5), 2 * item.reach, 0, item.color), 256).mean() / 4)
    low, high = (math.pi * radius**2 for radius in RADII)
    assert min(areas) > 0.95 * low and max(areas) < 1.05 * high


def test_every_object_lies_inside_and_stays_visible():
    hidden = 0
    for index in range(60):
        objects = place_objects(rng(index))
        masks = [filled(item, 256) for item in objects]
        for k, (item, mask) in enumerate(zip(objects, masks, strict=True)):
            assert all(item.reach <= place <= 1 - item.reach for place in item.centre)
            visible = (mask & ~np.any([*masks[k + 1 :], np.zeros_like(mask)], axis=0)).sum() / mask.sum()
            assert visible > MIN_VISIBLE - 0.05  # it is judged on 64 pixels, and PIL fills the edges
            hidden += visible < 0.9
    assert hidden > 30  # of about 390: there is occlusion


def test_the_nearest_distance_says_nothing_of_the_number():
    placed = [place_objects(rng(index)) for index in range(600)]
    counts = np.array([len(objects) for objects in placed])
    distances = np.array(
        [min(math.dist(a.centre, b.centre) for a in objects for b in objects if a is not b) for objects in placed]
    )
    assert abs(np.corrcoef(counts, distances)[0, 1]) < 0.1
    shares = np.bincount(counts, minlength=COUNTS[1] + 1)[COUNTS[0] :] / 600
    assert np.abs(shares - 1 / 8).max() < 0.05  # 600 draws: standard deviation .0135
    assert DISTANCES[0] - 1e-9 <= distances.min() and distances.max() <= DISTANCES[1] + 1e-9
    assert distances.mean() == pytest.approx(sum(DISTANCES) / 2, abs=0.01)


def test_the_fullest_scene_finds_its_place(monkeypatch):
    monkeypatch.setitem(place_objects.__globals__, "COUNTS", (10, 10))
    monkeypatch.setitem(place_objects.__globals__, "DISTANCES", (DISTANCES[1], DISTANCES[1]))
    assert all(len(place_objects(rng(index))) == 10 for index in range(30))


def test_objects_stand_out_from_the_ground():
    contrasts = []
    for index in range(20):
        objects = place_objects(rng(index))
        picture = draw(objects, 64, rng(index, seed=1)).astype(np.float32)
        ground = draw([], 64, rng(index, seed=1)).astype(np.float32)
        for item in objects[-1:]:  # the one that nothing hides
            mask = filled(item, 64)
            contrasts.append(np.abs(picture - ground).max(axis=-1)[mask].mean())
    assert min(contrasts) > 30


def test_pretraining_reads_scenes_like_any_source():
    dataset = scenes(4, size=40)
    assert not dataset.features["image"].decode
    assert Image.open(io.BytesIO(dataset[0]["image"]["bytes"])).size == (40, 40)
    assert load_images(dataset).column_names == ["image"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"count": 0}, "count must be at least 1, not 0"),
        ({"count": 1, "size": 8}, "size must lie in [16, 1024], not 8"),
        ({"count": 1, "seed": -1}, "seed must be at least 0, not -1"),
        ({"count": 1, "split": "val"}, "split must be one of train, test, not 'val'"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        scenes(**arguments)
    assert str(error.value) == message

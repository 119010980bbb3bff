"""Scenes that the package draws, to ask features what CLEVR asks: how many objects are there, and how far apart?

Coloured shapes lie on textured ground, partly in front of each other. Every shape is a star with n tips, whose notches
lie at a share of the tips' radius. If the share is cos(π / n), the star is the regular polygon with n sides. So one
signed distance draws all shapes, antialiased. All lengths are shares of the side: a scene is the same at any size.
"""

import math
import random
from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.checks import least, one_of, share

from .embedded import png

COUNTS = (3, 10)  # objects in a scene, as in CLEVR
DISTANCES = (0.06, 0.24)  # of the nearest pair, centre to centre, in shares of the side
RADII = (0.055, 0.11)  # of the disc that has the object's area, in shares of the side
MIN_VISIBLE = 0.4  # of an object's area, when all objects are drawn
SHAPES = {  # (tips, radius of the notches as a share of the tips')
    "circle": (48, math.cos(math.pi / 48)),  # within .2 % of the radius
    "triangle": (3, math.cos(math.pi / 3)),
    "square": (4, math.cos(math.pi / 4)),
    "hexagon": (6, math.cos(math.pi / 6)),
    "star": (5, 0.5),
    "cross": (4, 0.42),
}
SPLITS = ("train", "test")
_MASK_SIDE = 64  # of the raster on which visibility is measured, whatever the size of the picture
_RIM = 0.012  # width of the dark rim, in shares of the side
_MAX_TRIES = 100  # places tried for one object before the scene starts again


def scenes(count: int, size: int = 96, seed: int = 0, split: str = "train") -> Dataset:
    """Draw `count` scenes of `size`×`size` pixels.

    Scene i depends on (seed, split, i) alone: a longer dataset begins with the shorter one, train and test share no
    scene, and another size shows the same scenes. Numbers of objects are uniform in 3..10. The distance of the nearest
    pair is drawn uniformly and independently of the number, so that one answer does not tell the other. One pair is
    placed at this distance; all other pairs are further apart. Objects lie wholly inside the picture and may overlap:
    at least 40 % of each object's area stays visible.

    Returns:
        A dataset with the columns `image` (undecoded RGB PNG), `num_objects` (int), `distance` (float: between the
        centres of the two nearest objects, as a share of the side), `positions` (the objects' centres `[x, y]` from
        the top left corner, as shares of the side; objects in front come last), `boxes` (`[x, y, width, height]` of
        each object with its hidden parts, in the same shares) and `shapes` (the place of its shape in `SHAPES`).

    Raises:
        ValueError: count is below 1, size is outside 16..1024, seed is negative, or the split is unknown.
    """
    least(1, count=count)
    check_size(size)
    least(0, seed=seed)
    one_of(SPLITS, split=split)
    columns = {"image": [], "num_objects": [], "distance": [], "positions": [], "boxes": [], "shapes": []}
    numbers = {name: number for number, name in enumerate(SHAPES)}
    for index in range(count):
        # Seeding by a string is the same in every process and version.
        rng = random.Random(f"scene/{seed}/{split}/{index}")
        objects = place_objects(rng)
        picture = Image.fromarray(draw(objects, size, rng))
        columns["image"].append({"bytes": png(picture, compress_level=1), "path": None})
        columns["num_objects"].append(len(objects))
        columns["distance"].append(min(math.dist(a.centre, b.centre) for a in objects for b in objects if a is not b))
        columns["positions"].append([list(item.centre) for item in objects])
        columns["boxes"].append([list(item.box) for item in objects])
        columns["shapes"].append([numbers[item.shape] for item in objects])
    features = Features(
        image=ImageFeature(decode=False),
        num_objects=Value("int64"),
        distance=Value("float64"),
        positions=List(List(Value("float64"))),
        boxes=List(List(Value("float64"))),
        shapes=List(ClassLabel(names=list(SHAPES))),
    )
    return Dataset.from_dict(columns, features=features)


def check_size(size: int | None):
    """Raise ValueError for a side, in pixels, at which scenes cannot be drawn."""
    share("[16, 1024]", size=size)


@dataclass(frozen=True)
class SceneObject:
    """One shape. Lengths are shares of the side, the angle is in radians, the colour in 0..1."""

    shape: str
    centre: tuple[float, float]
    reach: float  # from the centre to the tips
    angle: float
    color: tuple[float, float, float]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x and y of the top left corner, width, height: of the tips, because the notches lie between them."""
        tips = SHAPES[self.shape][0]
        angles = [self.angle + 2 * math.pi * number / tips for number in range(tips)]
        xs = [self.centre[0] + self.reach * math.cos(angle) for angle in angles]
        ys = [self.centre[1] + self.reach * math.sin(angle) for angle in angles]
        return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)

    def signed_distance(self, side: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """((rows, columns) of the box that holds the object, distance of each pixel there from the edge, in pixels).

        The distance is negative inside. In one half of a tip's sector the edge is a straight line from tip to notch;
        all other sectors are turned and mirrored onto this half.
        """
        tips, notch = SHAPES[self.shape]
        x, y = self.centre
        box = tuple(
            slice(max(0, int((place - self.reach) * side) - 1), min(side, int((place + self.reach) * side) + 2))
            for place in (y, x)
        )
        rows = (np.arange(box[0].start, box[0].stop, dtype=np.float32) + 0.5) / side - y
        columns = (np.arange(box[1].start, box[1].stop, dtype=np.float32) + 0.5) / side - x
        half = math.pi / tips
        angle = np.arctan2(rows[:, None], columns) - self.angle
        angle = np.abs((angle + half) % (2 * half) - half)
        radius = np.hypot(rows[:, None], columns)
        # The line's outward normal, for a tip at (1, 0) and its notch at (across, up).
        across, up = notch * math.cos(half), notch * math.sin(half)
        normal = math.hypot(up, 1 - across)
        distance = (up * (radius * np.cos(angle) - self.reach) + (1 - across) * radius * np.sin(angle)) / normal
        return box, distance * side


def place_objects(rng: random.Random) -> list[SceneObject]:
    """The objects of one scene, by the rules of `scenes`. Later ones lie in front."""
    count, distance = rng.randint(*COUNTS), rng.uniform(*DISTANCES)
    while True:
        if objects := _try_to_place(rng, count, distance):
            return objects


def _try_to_place(rng: random.Random, count: int, distance: float) -> list[SceneObject] | None:
    """Place `count` objects one after the other; None if there is no place for one of them."""
    objects, areas = [], []
    owner = np.full((_MASK_SIDE, _MASK_SIDE), -1)  # which object is in front
    closest = rng.randrange(1, count)  # this object is put at `distance` from an earlier one
    for index in range(count):
        for _ in range(_MAX_TRIES):
            item = _random_object(rng, rng.choice(objects) if index == closest else None, distance)
            inside = all(item.reach <= place <= 1 - item.reach for place in item.centre)
            nearest = min((math.dist(item.centre, other.centre) for other in objects), default=1)
            if not inside or nearest < distance * (1 - 1e-9):
                continue
            box, edge = item.signed_distance(_MASK_SIDE)
            attempt = owner.copy()
            attempt[box][edge < 0] = index
            visible = np.bincount(attempt.ravel() + 1, minlength=index + 2)[1:]
            if np.all(visible[:index] >= MIN_VISIBLE * np.array(areas)):
                owner = attempt
                areas.append(visible[index])
                objects.append(item)
                break
        else:
            return None
    return objects


def _random_object(rng: random.Random, neighbour: SceneObject | None, distance: float) -> SceneObject:
    """An object anywhere, or at `distance` from its neighbour."""
    shape = rng.choice(list(SHAPES))
    tips, notch = SHAPES[shape]
    # The area of the star is divided out, so that all shapes of one radius in RADII are equally large.
    reach = rng.uniform(*RADII) * math.sqrt(math.pi / (tips * notch * math.sin(math.pi / tips)))
    if neighbour is None:
        centre = (rng.uniform(reach, 1 - reach), rng.uniform(reach, 1 - reach))
    else:
        direction = rng.uniform(0, 2 * math.pi)
        x, y = neighbour.centre
        centre = (x + distance * math.cos(direction), y + distance * math.sin(direction))
    color = hsv_to_rgb(rng.random(), rng.uniform(0.6, 0.95), rng.uniform(0.75, 1.0))
    return SceneObject(shape, centre, reach, rng.uniform(0, 2 * math.pi), color)


def draw(objects: list[SceneObject], size: int, rng: random.Random) -> np.ndarray:
    """The picture, uint8 [size, size, 3]: the ground, then each object with its rim and shading."""
    picture = _ground(size, rng)
    for item in objects:
        box, edge = item.signed_distance(size)
        inside = np.clip(0.5 - edge, 0, 1)[..., None]
        filling = np.clip(0.5 - edge - _RIM * size, 0, 1)[..., None]
        # The light comes from the top left: across the object, the colour falls from 1.1 to .8 of itself.
        light = np.linspace(1.1, 0.8, edge.shape[0] + edge.shape[1] - 1, dtype=np.float32)
        light = light[np.add.outer(np.arange(edge.shape[0]), np.arange(edge.shape[1]))][..., None]
        color = np.asarray(item.color, dtype=np.float32) * light * (0.35 + 0.65 * filling)
        picture[box] += inside * (color - picture[box])
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _ground(size: int, rng: random.Random) -> np.ndarray:
    """Two muted colours, mixed by coarse (at times streaked), middle and fine noise: float [size, size, 3]."""
    hue, value = rng.random(), rng.uniform(0.3, 0.6)
    colors = [
        hsv_to_rgb((hue + shift) % 1, rng.uniform(0.05, 0.3), value + change)
        for shift, change in ((0, -rng.uniform(0.08, 0.2)), (rng.uniform(-0.15, 0.15), rng.uniform(0.08, 0.2)))
    ]
    mixture = np.full((size, size), 0.5, dtype=np.float32)
    for weight, sides in ((0.9, (rng.choice((3, 5, 16)), rng.choice((3, 5, 16)))), (0.4, (14, 14)), (0.35, (48, 48))):
        noise = Image.frombytes("L", sides, rng.randbytes(sides[0] * sides[1]))
        noise = np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        mixture += weight * (noise / 255 - 0.5)
    dark, bright = np.asarray(colors, dtype=np.float32)
    return dark + mixture[..., None] * (bright - dark)

"""Pictures of a set of images by their features: the nearest ones of an image, and a map of all of them."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.visualize.style import COLORS, INK, MUTED, SMALL, TEXT, Picture, Row, draw_rows
from hf_mim.visualize.viewer import View, Viewer

BATCH = 64
CELLS = 18  # of the map's longer side: one thumbnail at most in each


def pooled(viewer: Viewer, images: Iterable) -> tuple[Tensor, View]:
    """The mean of the patch features of each image, `[n, D]`, and the images."""
    spec = FeatureSpec(norm=viewer.encoder.norm is not None)
    view = viewer.read(images)
    parts = view.pixels.split(BATCH)
    return torch.cat([viewer.encoder.extract(viewer.encoder.preprocess(x), [spec])[0].cpu() for x in parts]), view


def plot_nearest(model, images, gallery: Iterable | None = None, count: int = 6) -> Picture:
    """For each image the nearest ones of a gallery, by the cosine of the mean patch features.

    Args:
        model: a `Viewer`, or a checkpoint.
        images: files, PIL images, arrays or rows of a dataset.
        gallery: where to search; default: the images themselves, without the one that is searched for.
        count: nearest images to show.
    """
    viewer = Viewer.of(model)
    features, view = pooled(viewer, images)
    found, shelf = (features, view) if gallery is None else pooled(viewer, gallery)
    if len(found) < 2:
        raise ValueError("nearest needs two images at least, or a gallery")
    cosine = F.normalize(features, dim=-1) @ F.normalize(found, dim=-1).T
    if gallery is None:
        cosine.fill_diagonal_(-torch.inf)
    best = cosine.topk(min(count, len(found) - (gallery is None)), dim=1)
    pictures, asked = shelf.shown(), view.shown()
    rows = [
        Row(
            f"image {number}",
            [asked[number - 1], *(pictures[index] for index in indices)],
            below=["", *(f"{value:.2f}" for value in values)],
        )
        for number, (indices, values) in enumerate(
            zip(best.indices.tolist(), best.values.tolist(), strict=True), start=1
        )
    ]
    shelf_size = f"the other {len(found) - 1:,}" if gallery is None else f"{len(found):,}"
    note = f"At the left the image, then the nearest of {shelf_size}, with the cosine of the mean patch features."
    return draw_rows("Nearest images", rows, note + view.note)


def plot_map(
    features: Tensor | np.ndarray,
    pictures: Sequence[np.ndarray] | None = None,
    labels: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Picture:
    """A map of images on which neighbours have like features: t-SNE of the features, with thumbnails.

    Args:
        features: `[n, D]`, such as the rows of an embeddings file, 5 at least.
        pictures: RGB `[h, w, 3]` in 0..1, one for each row; default: only points.
        labels: the class of each row, from 0; those of up to 7 classes give colours.
        names: of the classes.
        seed: of t-SNE.
    """
    from sklearn.manifold import TSNE

    features = np.asarray(features, dtype=np.float32)
    if features.ndim != 2 or len(features) < 5:
        given = f"those of {len(features)}" if features.ndim == 2 else list(features.shape)
        raise ValueError(f"map needs the features of 5 images at least, [n, D], not {given}")
    perplexity = min(30, (len(features) - 1) / 3)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.maximum(high - low, 1e-9)
    figure = Picture(figsize=(9, 9.4), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[call-arg]  # those of "constrained"
    axes = figure.add_subplot()
    classes = [] if labels is None else sorted(set(labels) - {-1})
    colored = 2 <= len(classes) <= len(COLORS)
    colors = [COLORS[classes.index(x)] if colored and x in classes else MUTED for x in (labels or [-1] * len(places))]
    placed = [] if pictures is None else _thumbnails(axes, places, pictures, colors if colored else None)
    rest = [index for index in range(len(places)) if index not in placed]  # a thumbnail stands for its point
    alpha = 1.0 if pictures is None or colored else 0.3
    axes.scatter(*places[rest].T, s=8, c=[colors[index] for index in rest], linewidths=0, alpha=alpha)
    if colored:
        for index, label in enumerate(classes):
            name = names[label] if names is not None else str(label)
            axes.scatter([], [], s=30, c=COLORS[index], label=name.replace("$", r"\$"))
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.01), ncols=4, frameon=False, fontsize=SMALL, labelcolor=INK)
    axes.set(xticks=[], yticks=[], aspect="equal", xlim=(-0.04, 1.04), ylim=(-0.04, 1.04))
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"Map of {len(places)} images by their features", loc="left", weight="bold", fontsize=TEXT + 2, color=INK
    )
    note = "t-SNE of the features: neighbours are alike; distances across the map and its axes mean nothing."
    figure.supxlabel(note, fontsize=SMALL, color=MUTED)
    return figure


def _thumbnails(axes, places: np.ndarray, pictures: Sequence[np.ndarray], colors: Sequence[str] | None) -> set[int]:
    """The pictures at their places, at most one in each cell of a grid, so that none hides another. Returns which."""
    from matplotlib.patches import Rectangle

    cells = np.minimum((places * CELLS).astype(int), CELLS - 1)
    distance = np.abs(places * CELLS - cells - 0.5).max(axis=1)
    taken = {}
    for index in np.argsort(distance, kind="stable"):
        taken.setdefault(tuple(cells[index]), index)
    for cell, index in sorted(taken.items()):
        picture = pictures[index]
        height, width = (side / max(picture.shape[:2]) * 0.9 / CELLS for side in picture.shape[:2])
        x, y = (np.array(cell) + 0.5) / CELLS
        extent = x - width / 2, x + width / 2, y - height / 2, y + height / 2
        axes.imshow(picture, extent=extent, zorder=2)
        if colors is not None:
            frame = dict(fill=False, edgecolor=colors[index], linewidth=2, zorder=3)
            axes.add_patch(Rectangle((extent[0], extent[2]), width, height, **frame))
    return set(taken.values())

"""Pictures of features: what an encoder makes of each patch. They need no decoder, and work for any encoder."""

import inspect

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.evaluation.inputs import forward_arguments, unmasked
from hf_mim.visualize.style import COLORS, Picture, Row, Scale, draw_rows
from hf_mim.visualize.task import on_patches
from hf_mim.visualize.viewer import View, Viewer

ENDS = 1.0, 99.0  # percentiles of a component that become 0 and 1
MAX_HEADS = 6


def pca_colors(tokens: Tensor, foreground: float | None = None) -> Tensor:
    """Tokens `[B, N, D]` → RGB `[B, N, 3]` in 0..1 by their first three principal components, one basis for all images.

    foreground: in (0, 1): tokens whose first component, scaled to 0..1, lies above it are the foreground. Only they get
        colours, by components of their own; the others are NaN. The sign of a component means nothing, so 1 is the end
        that has fewer tokens.
    """
    flat = tokens.float().flatten(0, 1)
    if foreground is None:
        return _scaled(_components(flat)).unflatten(0, tokens.shape[:2])
    first = _scaled(_components(flat)[:, :1])[:, 0]
    if first.mean() > 0.5:
        first = 1 - first
    chosen = first > foreground
    if chosen.sum() < 4:
        raise ValueError(f"foreground {foreground:g} leaves {int(chosen.sum())} patches; take a smaller one")
    colors = torch.full((len(flat), 3), torch.nan)
    colors[chosen] = _scaled(_components(flat[chosen]))
    return colors.unflatten(0, tokens.shape[:2])


def _components(tokens: Tensor, count: int = 3) -> Tensor:
    """`[n, D]` → `[n, count]`: projections on the first principal directions, each with its largest weight above 0."""
    centred = (tokens - tokens.mean(dim=0)).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    directions = directions.flip(1)[:, :count]
    signs = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    found = centred @ (directions * signs)
    return F.pad(found, (0, count - found.shape[1]))


def _scaled(components: Tensor) -> Tensor:
    """Each component `[n, k]` in 0..1, by `ENDS`; a constant one is .5."""
    low, high = np.percentile(components.numpy(), ENDS, axis=0)
    span = np.where(high - low < 1e-6, np.inf, high - low)
    return torch.from_numpy(((components.numpy() - (low + high) / 2) / span + 0.5).clip(0, 1)).float()


def place_share(tokens: Tensor) -> float:
    """The share of the variance of tokens `[B, N, D]` that their place in the image explains, in 0..1.

    As in an analysis of variance, what the means of B images would explain by chance is taken off.
    """
    images = len(tokens)
    varying = (tokens - tokens.mean(dim=(0, 1))).square().sum().clamp(min=1e-12)
    within = (tokens - tokens.mean(dim=0)).square().sum() * images / (images - 1)
    return (1 - within / varying).clamp(0, 1).item()


def about_place(tokens: Tensor) -> str:
    """A sentence on how much of a picture of the tokens `[B, N, D]` is the place of the patches."""
    if len(tokens) > 1:
        return f" The place of a patch alone explains {place_share(tokens):.0%} of what differs between patches."
    return (
        " Features also know where a patch is, and one image cannot tell how much of the picture that explains: "
        "what changes smoothly from edge to edge may be the place alone."
    )


def plot_pca(model, images, foreground: float | None = None, position: bool = True) -> Picture:
    """The features of each patch as a colour: like colours, like features. One basis for all images.

    Args:
        model: a `Viewer`, or a checkpoint.
        images: files, PIL images, arrays or rows of a dataset.
        foreground: show the foreground alone: see `pca_colors`.
        position: False takes off what the features of all images have in common at a place. Where patches know above
            all where they are, the picture then shows what else they know. It needs several images.
    """
    viewer, view = _view(model, images)
    tokens = viewer.tokens(view)
    if foreground is not None and not 0 < foreground < 1:
        raise ValueError(f"foreground must lie in (0, 1), not {foreground:g}")
    if not position and len(view) < 2:
        raise ValueError("position false needs two images at least, to see what they have in common")
    colors = (
        pca_colors(tokens if position else tokens - tokens.mean(dim=0), foreground).unflatten(1, viewer.grid).numpy()
    )
    pictures = [np.dstack([np.nan_to_num(image), ~np.isnan(image[..., 0])]) for image in colors]
    rows = [Row("image", view.shown()), Row("principal components", [_enlarged(image, viewer) for image in pictures])]
    where = ", over all these images" if len(view) > 1 else " of this image"
    note = (
        f"Red, green and blue are the first three principal components of the patch features{where}: patches of like "
        "colours have like features."
    )
    if not position:
        note += " What all images have in common at a place was taken off."
    else:
        note += about_place(tokens)
    note += "" if foreground is None else " Stripes: background."
    return draw_rows("Patch features in colours", rows, note + view.note)


def plot_similarity(model, images, patch: tuple[int, int] | None = None) -> Picture:
    """The cosine of one patch of the first image with every patch of all images.

    patch: (row, column) from 1; default: the middle. The other arguments are those of `plot_pca`.
    """
    viewer, view = _view(model, images)
    row, column = place(viewer, patch)
    tokens = F.normalize(found := viewer.tokens(view), dim=-1)
    cosine = tokens @ tokens[0, row * viewer.grid[1] + column]
    scale = Scale("cosine with the marked patch", cosine.min().item(), 1.0)
    boxes = [[patch_box(viewer, row, column)], *[[]] * (len(view) - 1)]
    maps = on_patches(cosine, viewer.grid, viewer.encoder.patch_size, scale)
    rows = [Row("image", view.shown(), boxes), Row("similarity to the marked patch", maps, boxes)]
    whose, others = (" of the first image", "all patches of all images") if len(view) > 1 else ("", "all others")
    note = f"The marked patch{whose} is compared with {others}.{about_place(found)}{view.note}"
    return draw_rows("Which patches are like this one", rows, note, [scale])


def plot_clusters(model, images, clusters: int = 6) -> Picture:
    """The patches of all images in groups of like features: k-means on their directions.

    clusters: how many groups, 2 to 7. The other arguments are those of `plot_pca`.
    """
    from sklearn.cluster import KMeans

    viewer, view = _view(model, images)
    tokens = F.normalize(found := viewer.tokens(view), dim=-1)
    if not 2 <= clusters <= min(len(COLORS), tokens.shape[0] * tokens.shape[1]):
        raise ValueError(f"clusters must lie in 2..{len(COLORS)}, and not above the number of patches, not {clusters}")
    groups = KMeans(clusters, n_init=4, random_state=0).fit_predict(tokens.flatten(0, 1).numpy())
    sizes = np.bincount(groups, minlength=clusters)
    groups = np.argsort(np.argsort(-sizes, kind="stable"))[groups]  # the largest is the first colour
    palette = np.array([[int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)] for color in COLORS])
    maps = [_enlarged(image, viewer) for image in palette[groups].reshape(len(view), *viewer.grid, 3)]
    mixed = [
        0.5 * colors + 0.5 * picture.mean(axis=2, keepdims=True)
        for colors, picture in zip(maps, view.shown(), strict=True)
    ]
    whose = "all these images together" if len(view) > 1 else "this image"
    note = f"{clusters} groups, found by k-means on the patch features of {whose}.{about_place(found)}{view.note}"
    rows = [Row("image", view.shown()), Row("group of each patch", maps), Row("on the image", mixed)]
    return draw_rows("Groups of like patches", rows, note)


def plot_attention(model, images, patch: tuple[int, int] | None = None) -> Picture:
    """What the last layer attends to, from the CLS token or a patch: the mean over heads, and each of the first heads.

    patch: (row, column) from 1; default: the CLS token, or the middle patch of a model without one. The other arguments
    are those of `plot_pca`.

    Raises ValueError for a model that gives no attention between tokens.
    """
    viewer, view = _view(model, images)
    weights, query = _attention(viewer, view), None
    prefix = viewer.encoder.num_prefix_tokens
    if patch is not None or not prefix:
        row, column = place(viewer, patch)
        query = row * viewer.grid[1] + column
    weights = weights[:, :, 0 if query is None else prefix + query, prefix:]  # [B, heads, N]
    heads = min(MAX_HEADS, weights.shape[1])
    maps = torch.stack([weights.mean(dim=1), *weights[:, :heads].unbind(1)])
    boxes = [[] if query is None else [patch_box(viewer, row, column)]] * len(view)
    cell, rows = viewer.encoder.patch_size, [Row("image", view.shown(), boxes)]
    for name, map_ in zip(
        ["mean over heads", *(f"head {number}" for number in range(1, heads + 1))], maps, strict=True
    ):
        relative = map_ / map_.amax(dim=1, keepdim=True)
        rows.append(Row(name, on_patches(relative, viewer.grid, cell, Scale("", 0.0, 1.0)), boxes))
    where = "the CLS token" if query is None else "the marked patch"
    note = (
        f"Attention of {where} in the last of {viewer.encoder.num_layers} layers, {heads} of {weights.shape[1]} heads. "
    )
    note += f"Each map is scaled by its own largest value.{view.note}"
    scale = Scale("attention / largest attention in the map", 0.0, 1.0)
    return draw_rows(f"What {where} attends to", rows, note, [scale])


@torch.no_grad()
def _attention(viewer: Viewer, view: View) -> Tensor:
    """Weights of the last layer `[B, heads, tokens, tokens]`."""
    model, encoder = viewer.encoder.model, viewer.encoder
    before = model.config._attn_implementation
    unusable = f"attention needs a vision transformer that returns its attentions, and {viewer.name} is none"
    if "output_attentions" not in str(inspect.signature(model.forward)) and not hasattr(model, "_can_record_outputs"):
        raise ValueError(unusable)
    model.set_attn_implementation("eager")
    try:
        with unmasked(model):
            output = model(**forward_arguments(model, encoder.preprocess(view.pixels)), output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    weights = (getattr(output, "attentions", None) or [None])[-1]
    tokens = encoder.num_prefix_tokens + viewer.num_patches
    if weights is None or weights.shape[-2:] != (tokens, tokens):
        raise ValueError(unusable)
    return weights.float().cpu()


def place(viewer: Viewer, patch: tuple[int, int] | None) -> tuple[int, int]:
    """(row, column) from 0 of a patch that is named from 1; default: the middle."""
    rows, columns = viewer.grid
    if patch is None:
        return rows // 2, columns // 2
    if len(patch) != 2 or not (1 <= patch[0] <= rows and 1 <= patch[1] <= columns):
        named = ",".join(map(str, patch))
        raise ValueError(f"patch must be row,column in 1..{rows} and 1..{columns}, not {named}")
    return patch[0] - 1, patch[1] - 1


def _view(model, images) -> tuple[Viewer, View]:
    viewer = Viewer.of(model)
    return viewer, viewer.read(images)


def patch_box(viewer: Viewer, row: int, column: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of a patch, by its row and column from 0."""
    height, width = viewer.encoder.patch_size
    return column * width, row * height, width, height


def _enlarged(picture: np.ndarray, viewer: Viewer) -> np.ndarray:
    """A colour for each patch `[rows, columns, c]` → `[h, w, c]`."""
    return np.kron(picture, np.ones((*viewer.encoder.patch_size, 1)))

"""Pictures of a pretraining task: what is hidden, and what the model says about it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.models.vit import patchify, unpatchify
from hf_mim.visualize.style import Picture, Row, Scale, draw_rows
from hf_mim.visualize.task import Task, masked, on_patches
from hf_mim.visualize.viewer import NO_DATA_NOTE, Viewer

NUM_MASKS = 512  # on which the frequency of a patch is measured
STRIPES = "Stripes: hidden from the encoder."


def plot_reconstructions(model, images, seed: int = 0, hidden: Tensor | None = None) -> Picture:
    """What a model that predicts pixels (MAE, SymMIM, Interactive MIM) sees of images, and its prediction of the rest.

    Args:
        model: a `Viewer`, or a checkpoint.
        images: files, PIL images, arrays or rows of a dataset.
        seed: of the masks.
        hidden: bool [rows, columns], the patches to hide; default: masks as the method draws them.

    Raises ValueError for a model that predicts no pixels.
    """
    viewer = Viewer.of(model)
    if viewer.pretraining is not None and not viewer.predicts_pixels:
        raise ValueError(f"reconstructions needs a method that predicts pixels, and {viewer.name} does not")
    task = Task.make("reconstructions", viewer, images, seed, hidden)
    pixels, gone = task.reconstruct()
    pixels[task.view.pixels.isnan() & ~gone] = torch.nan
    if len(getattr(viewer.pretraining.config, "modality_channels", ())) > 1:
        rows, note = _rows_of_modalities(task, pixels, gone)
    else:
        rows, note = _rows_of_images(task, pixels, gone[:, 0]), STRIPES + task.view.note
    if getattr(viewer.pretraining.config, "norm_pix_loss", False):
        note += (
            " This model predicts patches without their mean and contrast (norm_pix_loss). The picture takes both from "
            "the true patch: the brightness and colour of a hidden patch are given, its structure is predicted."
        )
    shown = task.context() if task.visible() is None else task.visible()
    return draw_rows(f"Reconstructions, with {1 - shown.float().mean():.0%} of the patches hidden", rows, note)


def _rows_of_images(task: Task, pixels: Tensor, gone: Tensor) -> list[Row]:
    """Rows for reconstructed `pixels` `[B, C, h, w]`, which were hidden where `gone`, bool [B, h, w]."""
    restored = task.view.shown(pixels)
    return [
        Row("original", task.view.shown()),
        Row("what the encoder sees", task.seen()),
        Row("prediction of hidden patches", masked(restored, gone)),
        Row("prediction and visible patches", masked(restored, gone | task.pixels_of(task.context()))),
    ]


def _rows_of_modalities(task: Task, pixels: Tensor, gone: Tensor) -> tuple[list[Row], str]:
    """As `_rows_of_images`, for each modality by itself; gone: bool [B, C, h, w]. Also a note on them."""
    visible, rows, told, lacking = task.visible(), [], [], ""
    for number, (name, part) in enumerate(task.viewer.pretraining.config.channels_of_modalities.items()):
        own = range(part.start + 1, part.stop + 1)
        bands = [band for band in task.viewer.bands or own if band in own] or own
        view = task.view.of_bands(bands[:3] if len(bands) >= 3 else bands[:1])
        seen = task.pixels_of(task.context() if visible is None else visible[:, number])
        restored = view.shown(pixels)
        rows += [
            Row(name, view.shown()),
            Row(f"{name} that the encoder sees", masked(view.shown(), seen)),
            Row(f"{name}, predicted and seen", masked(restored, gone[:, part.start] | seen)),
        ]
        told.append(f"{name} {', '.join(str(band + 1) for band in view.displays[0].bands)}")
        lacking = NO_DATA_NOTE if view.lacks_data() else lacking
    own_masks = "" if visible is None else " Each modality has a mask of its own."
    return rows, f"{STRIPES}{own_masks} Shown bands: {'; '.join(told)}.{lacking}"


def plot_prediction(model, images, seed: int = 0, hidden: Tensor | None = None) -> Picture:
    """How well a model that predicts features (Latent MIM, I-JEPA, StoP-JEPA) predicts those of each target patch.

    For each image: the cosine of prediction and target; and in place of each target patch the one, among the target
    patches of all images, whose features are nearest to the prediction. A patch itself is not offered in its place.

    The arguments are those of `plot_reconstructions`. Raises ValueError for a model that predicts pixels, and for
    one hidden patch alone.
    """
    viewer = Viewer.of(model)
    if viewer.pretraining is not None and viewer.predicts_pixels:
        raise ValueError(f"prediction needs a method that predicts features, and {viewer.name} predicts pixels")
    task = Task.make("prediction", viewer, images, seed, hidden)
    output = task.predict()
    predictions, targets = task.by_patch(output.predictions), task.by_patch(output.targets)
    found = task.targets().flatten(1)
    if found.sum() < 2:
        raise ValueError("prediction needs two hidden patches at least, because the mean of all targets is taken off")
    mean = targets[found].mean(dim=0)  # targets have much in common, so that any prediction has a large cosine
    cosine = F.cosine_similarity(predictions - mean, targets - mean, dim=-1)
    plain = F.cosine_similarity(predictions, targets, dim=-1)[found].mean()
    scale = Scale("cosine of prediction and target, without the mean target", min(0.0, cosine[found].min().item()), 1.0)
    means = [f"mean {values[own].mean():.2f}" for values, own in zip(cosine, found, strict=True)]
    rows = [
        Row("image", task.view.shown()),
        Row("what the encoder sees", task.seen()),
        Row("cosine of prediction and target", task.maps(cosine, scale), below=means),
        Row("nearest patch to each prediction", _nearest_patches(task, predictions, targets, found)),
    ]
    note = (
        f"{STRIPES} The mean target is taken off before the cosine, so that a constant prediction has 0 and a perfect "
        f"one has 1; with it, the mean cosine is {plain:.2f}. Nearest patch: each target patch is replaced by the "
        f"other target patch, of any of these images, whose features are nearest to the prediction.{task.view.note}"
    )
    return draw_rows("Predicted features of target patches", rows, note, [scale])


def plot_noise(model, images, seed: int = 0, draws: int = 16) -> Picture:
    """How much the predictions of StoP-JEPA for each target patch differ between draws of the noise on positions.

    draws: how often the noise is drawn. The other arguments are those of `plot_reconstructions`.
    """
    task = Task.make("noise", model, images, seed)
    viewer, ids = task.viewer, {name: task.masks[name].cpu() for name in ("context_ids", "target_ids")}
    if not any(name.endswith("_noise") for name in task.masks):
        raise ValueError(f"noise needs a model with noise on positions (StoP-JEPA), and {viewer.name} has none")
    masks = (viewer.draw_masks(len(task.view), 1000 * seed + draw, **ids) for draw in range(draws))
    predictions = torch.stack([task.by_patch(Task(viewer, task.view, x).predict().predictions) for x in masks])
    found = task.targets().flatten(1)
    spread = predictions.var(dim=0).sum(dim=-1).sqrt() / predictions.mean(dim=0).norm(dim=-1).clamp(min=1e-6)
    scale = Scale("spread of the predictions / length of their mean", 0.0, spread[found].max().item())
    rows = [
        Row("image", task.view.shown()),
        Row("what the encoder sees", task.seen()),
        Row("spread over the noise", task.maps(spread, scale)),
    ]
    note = f"{STRIPES} The same masks each time, and {draws} draws of the noise on positions.{task.view.note}"
    return draw_rows("Predictions under noisy positions", rows, note, [scale])


def plot_masks(model, images, seed: int = 0, draws: int = 6) -> Picture:
    """Masks as the method draws them, on the first image, and how often each patch is seen and predicted.

    draws: how many masks are shown. The other arguments are those of `plot_reconstructions`.
    """
    task = Task.make("masks", model, [*images][:1] * draws, seed)
    viewer, counts = task.viewer, torch.zeros(2, *task.viewer.grid)
    for batch in range(NUM_MASKS // 8):  # a method may draw sizes once for a batch
        masks = viewer.draw_masks(8, 1000 * (seed + 1) + batch)
        counts += torch.stack([task.patches(masks[name]).sum(dim=0) for name in ("context_ids", "target_ids")])
    scale = Scale(f"share of {NUM_MASKS} masks", 0.0, 1.0)
    rows = [
        Row("seen by the encoder", task.seen()),
        Row("to be predicted", masked(task.view.shown(), task.pixels_of(task.targets()))),
        Row("how often, by place", on_patches((counts / NUM_MASKS).flatten(1), viewer.grid, task.cell, scale)),
    ]
    rows[-1].below = ["seen", "to be predicted"]
    note = f"Each column of the upper rows is one mask. Stripes: the rest of the image.{task.view.note}"
    return draw_rows("Masks as they are drawn", rows, note, [scale])


def _nearest_patches(task: Task, predictions: Tensor, targets: Tensor, found: Tensor) -> list[np.ndarray]:
    """The images with each target patch replaced, and transparent where a patch is neither target nor context."""
    pictures = torch.from_numpy(np.stack(task.view.shown())).permute(0, 3, 1, 2)
    patches = patchify(pictures, task.cell)
    queries, keys = (F.normalize(features[found], dim=-1) for features in (predictions, targets))
    if len(keys) > 1:
        nearest = (queries @ keys.T).fill_diagonal_(-torch.inf).argmax(dim=1)
        patches[found] = patches[found][nearest]
    replaced = unpatchify(patches, task.cell, task.viewer.grid).permute(0, 2, 3, 1).numpy()
    known = (task.targets() | task.context()).numpy()
    return masked(replaced, torch.from_numpy(np.kron(known, np.ones((1, *task.cell)))) > 0)

"""One pass of a pretraining model over images: what is hidden, and what was predicted where."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_mim.visualize.style import Scale
from hf_mim.visualize.viewer import View, Viewer, check_finite


@dataclass
class Task:
    """Images, and the masks (ids, noise, offsets) by which the pretraining model sees them."""

    viewer: Viewer
    view: View
    masks: dict[str, Tensor]

    @classmethod
    def make(cls, what: str, model, images: Iterable, seed: int = 0, hidden: Tensor | None = None) -> "Task":
        """The task of a `Viewer`, or a checkpoint.

        what: the picture that needs it, for messages.
        hidden: bool [rows, columns]: the patches to predict, in every image; default: masks as the method draws them.

        Raises ValueError if the checkpoint has no pretraining model, or if `hidden` has another shape, or hides all or
        nothing.
        """
        viewer = Viewer.of(model)
        if viewer.pretraining is None:
            raise ValueError(f"{what} needs the whole pretraining model, and {viewer.name} is an encoder alone")
        config, grid = viewer.pretraining.config, viewer.grid
        cell = (length // count for length, count in zip(config.training_size, config.grid_size, strict=True))
        view = viewer.read(images, tuple(count * side for count, side in zip(grid, cell, strict=True)))
        masks = viewer.draw_masks(len(view), seed)
        if hidden is not None:
            blocks = [1] * (masks["target_ids"].ndim - 2)  # all hidden patches in one block, where a method has blocks
            masks = viewer.draw_masks(len(view), seed, **_ids_of(hidden, grid, len(view), blocks))
        return cls(viewer, view, masks)

    def inputs(self) -> dict[str, Tensor]:
        """The arguments of the model's `forward`."""
        encoder = self.viewer.encoder
        inputs = {"pixel_values": encoder.preprocess(self.view.pixels).nan_to_num(nan=0.0)} | self.masks
        if encoder.has_nodata:
            inputs["valid_pixels"] = ~self.view.pixels.isnan().to(encoder.device)
        return inputs

    @torch.no_grad()
    def predict(self):
        """What the model returns."""
        output = self.viewer.pretraining(**self.inputs())
        check_finite(output.predictions, self.viewer.name)
        return output

    def reconstruct(self) -> tuple[Tensor, Tensor]:
        """(pixels in 0..255 with the hidden patches predicted, bool [B, C, h, w] or [B, 1, h, w] of what was hidden),
        on the CPU."""
        pixels, hidden = self.viewer.pretraining.reconstruct(**self.inputs())
        check_finite(pixels, self.viewer.name)
        return self.viewer.encoder.normalize.denormalize(pixels).cpu(), hidden.cpu()

    def context(self) -> Tensor:
        """bool [B, rows, columns]: the patches that the encoder sees."""
        return self.patches(self.masks["context_ids"])

    def visible(self) -> Tensor | None:
        """bool [B, M, rows, columns]: the patches of each modality that the encoder sees; None: the same of each."""
        if "visible" not in self.masks:
            return None
        ids, visible = self.masks["context_ids"].cpu(), self.masks["visible"].cpu()
        found = torch.zeros(len(ids), self.viewer.num_patches, visible.shape[-1], dtype=torch.bool)
        found.scatter_(1, ids[..., None].expand_as(visible), visible)
        return found.transpose(1, 2).unflatten(2, self.viewer.grid)

    def targets(self) -> Tensor:
        """bool [B, rows, columns]: the patches that are to be predicted."""
        return self.patches(self.masks["target_ids"])

    def patches(self, ids: Tensor) -> Tensor:
        """bool [B, rows, columns]: those with the ids `[B, ...]`."""
        found = torch.zeros(len(ids), self.viewer.num_patches, dtype=torch.bool)
        return found.scatter_(1, ids.flatten(1).cpu(), True).unflatten(1, self.viewer.grid)

    def pixels_of(self, patches: Tensor) -> Tensor:
        """bool [B, h, w]: the pixels of patches, bool [B, rows, columns]. Gaps between patches belong to none."""
        height, width = self.viewer.pretraining.config.patch_height_width
        offsets = self.masks.get("patch_offsets")
        offsets = torch.zeros(*patches.shape, 2, dtype=torch.int64) if offsets is None else offsets.cpu()
        pixels = torch.zeros(len(patches), *self.view.size, dtype=torch.bool)
        for image, row, column in patches.nonzero().tolist():
            top, left = (torch.tensor([row, column]) * torch.tensor(self.cell) + offsets[image, row, column]).tolist()
            pixels[image, top : top + height, left : left + width] = True
        return pixels

    @property
    def cell(self) -> tuple[int, int]:
        """(height, width) in pixels of a patch with the gap beside it."""
        return tuple(side // count for side, count in zip(self.view.size, self.viewer.grid, strict=True))

    def seen(self) -> list[np.ndarray]:
        """RGBA of the images. What the encoder does not see is transparent."""
        return masked(self.view.shown(), self.pixels_of(self.context()))

    def by_patch(self, values: Tensor) -> Tensor:
        """Values at the target ids, `[B, ..., D]` → for each patch their mean, `[B, N, D]`; 0 where there are none."""
        ids, values = self.masks["target_ids"].flatten(1).cpu(), values.float().cpu().flatten(1, -2)
        sums = torch.zeros(len(ids), self.viewer.num_patches, values.shape[-1])
        counts = torch.zeros(*sums.shape[:2], 1)
        counts.scatter_add_(1, ids[..., None], torch.ones(*ids.shape, 1))
        return sums.scatter_add_(1, ids[..., None].expand_as(values), values) / counts.clamp(min=1)

    def maps(self, values: Tensor, scale: Scale) -> list[np.ndarray]:
        """Values of the patches `[B, N]` in colours, over the pale images where a patch is no target."""
        return [
            np.where(np.kron(target.numpy(), np.ones(self.cell))[..., None] > 0, colors, pale(picture))
            for target, colors, picture in zip(
                self.targets(), on_patches(values, self.viewer.grid, self.cell, scale), self.view.shown(), strict=True
            )
        ]


def on_patches(values: Tensor, grid, cell, scale: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """A value for each patch `[B, N]` → RGB `[h, w, 3]` of each image."""
    maps = values.unflatten(1, tuple(grid)).cpu().numpy()
    return [scale(np.kron(image, np.ones(cell)))[..., :3] for image in maps]


def masked(pictures: Sequence[np.ndarray], shown: Tensor) -> list[np.ndarray]:
    """RGB `[h, w, 3]` → RGBA, transparent where `shown`, bool [B, h, w], is False."""
    pairs = zip(pictures, shown.cpu().numpy(), strict=True)
    return [np.dstack([picture, opaque.astype(picture.dtype)]) for picture, opaque in pairs]


def pale(picture: np.ndarray) -> np.ndarray:
    """A picture in light grey, on which colours stand out."""
    return np.repeat(0.65 + 0.35 * picture.mean(axis=2, keepdims=True), 3, axis=2)


def _ids_of(hidden: Tensor, grid: tuple[int, int], count: int, blocks: list[int]) -> dict[str, Tensor]:
    """The ids that hide exactly the patches where `hidden` is True."""
    hidden = torch.as_tensor(hidden, dtype=torch.bool, device="cpu")
    if tuple(hidden.shape) != tuple(grid):
        raise ValueError(f"hidden must be [{grid[0]}, {grid[1]}], a value for each patch, not {list(hidden.shape)}")
    if hidden.all() or not hidden.any():
        raise ValueError(f"hidden must hide some patches and leave some, and it hides {int(hidden.sum())}")
    context, targets = ((hidden == value).flatten().nonzero()[:, 0] for value in (False, True))
    return {"context_ids": context.expand(count, -1), "target_ids": targets.expand(count, *blocks, -1)}

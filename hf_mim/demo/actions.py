"""What the demo does with a checkpoint, between an event of the page and a picture. No gradio here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from hf_mim.data import EMBEDDED
from hf_mim.data.decode import BrokenImage, as_stored, image_name, open_image, stored
from hf_mim.data.stacks import ERROR, image_parts
from hf_mim.demo.markup import enlarged, figure_html, message, panel, picture_of, section
from hf_mim.embeddings.search import Search
from hf_mim.methods import of_config
from hf_mim.models.configuration_vit import MIMConfig
from hf_mim.models.pixel_types import ImageFormatError
from hf_mim.pretraining.layers import layered, settings_in
from hf_mim.visualize.features import patch_box, place, plot_pca, plot_similarity
from hf_mim.visualize.pictures import PICTURES, chosen_images, fitting_pictures
from hf_mim.visualize.task import Task, masked
from hf_mim.visualize.viewer import Viewer

NUM_EXAMPLES, NUM_NEAREST = 8, 12
# What an upload can be refused for. Everything else is a bug of ours.
REFUSED = (BrokenImage, ValueError)


@dataclass(frozen=True)
class Picked:
    """The image that a visitor looks at.

    image: {"bytes", "path"}, as in an image column.
    hidden: bool [rows, columns]: the patches to predict; None: masks as the method draws them.
    seed: of these masks.
    patch: (row, column) from 1 of the patch that is compared with the others.
    """

    image: dict
    patch: tuple[int, int]
    hidden: Tensor | None = None
    seed: int = 0


def told(action: Callable[..., str]) -> Callable[..., str]:
    """The action, with a message in place of what cannot be shown. Without an image, it gives nothing."""

    @wraps(action)
    def safe(self, picked: Picked | None) -> str:
        if picked is None:
            return ""
        try:
            return action(self, picked)
        except REFUSED as error:
            return message(reason(error, picked.image))

    return safe


def reason(error: Exception, image: dict) -> str:
    """Why an image was refused. The message names the file, without the folder of the server that it lies in."""
    path = image_name(image, "")
    if stored(image) == path and not Path(path).exists():
        return "The image is no longer here. Choose it again."
    return str(error).replace(path, Path(path).name) if path else str(error)


class Demo:
    """A checkpoint, examples, and maybe a collection in which the nearest images are searched."""

    def __init__(self, viewer: Viewer, examples: list | None = None, search: Search | None = None):
        self.viewer, self.search = viewer, search
        self.examples = [as_stored(row["image"] if isinstance(row, dict) else row) for row in examples or ()]

    @classmethod
    def load(
        cls, checkpoint: str | Path, examples: str | None = None, where: str | None = None, image_size=None, bands=None
    ) -> "Demo":
        """From a checkpoint.

        Args:
            examples: a source of images; default: what the run was trained on, if that is on this machine.
            where: embeddings, or a source of images, to search in.
            image_size, bands: see `Viewer`. The default of the bands is what the checkpoint's recipe says.

        Raises ValueError, in one line, for what cannot be loaded.
        """
        run = layered(*settings_in(Path(checkpoint)))
        viewer = Viewer.load(checkpoint, image_size, bands=run.get("bands") if bands is None else bands)
        trained_on, column = run.get("dataset"), None
        if examples is None and trained_on and (trained_on in EMBEDDED or Path(trained_on).exists()):
            parts = run.get("image_column"), run.get("missing_modality", ERROR)
            examples, column = trained_on, image_parts(*parts)
        shown, search = [], None
        if examples:
            shown = chosen_images(viewer, [examples], NUM_EXAMPLES, image_column=column)
        if where is not None:
            search = Search(checkpoint, where)
            search.source.k = min(NUM_NEAREST, len(search.collection))
            search.collection.images([0])  # raises, if they are not where they were embedded
            next(search.collection.parts())  # extracts the features now, not when a visitor waits for them
        return cls(viewer, shown, search)

    @property
    def title(self) -> str:
        """What is shown, in one line."""
        config, (rows, columns) = self.viewer.encoder.model.config, self.viewer.grid
        kind = of_config(config).title if isinstance(config, MIMConfig) else config.model_type
        height, width = self.viewer.encoder.image_size
        return f"{self.viewer.name}: {kind}, {height} × {width} pixels, {rows} × {columns} patches"

    @property
    def has_task(self) -> bool:
        """Whether there is something to predict: an encoder alone predicts nothing."""
        return self.viewer.pretraining is not None

    @property
    def usual_share(self) -> float:
        """The share of the patches that the method hides."""
        return 1 - self.viewer.draw_masks(1)["context_ids"].shape[1] / self.viewer.num_patches

    def thumbnails(self) -> list[PIL.Image.Image]:
        """The examples as the model sees them."""
        return [picture_of(image) for image in self.viewer.read(self.examples).shown()] if self.examples else []

    def pick(self, image: str | dict) -> tuple[Picked | None, str]:
        """An image to look at, a file or a value of an image column; and a message, why it is None, or what to know."""
        image = as_stored(image)
        try:
            self.viewer.read([image])
            frames = getattr(open_image(image, self.viewer.encoder.num_channels), "n_frames", 1)
        except REFUSED as error:
            modalities = getattr(self.viewer.encoder.model.config, "modality_channels", {})
            parts = f". This model takes one file with the channels of {' and '.join(modalities)}."
            several = isinstance(error, ImageFormatError) and len(modalities) > 1
            return None, message(reason(error, image) + parts * several)
        rows, columns = self.viewer.grid
        note = message(f"The file holds {frames} pictures. The first is taken.") if frames > 1 else ""
        return Picked(image, (rows // 2 + 1, columns // 2 + 1)), note

    # The mask

    def shown_task(self, picked: Picked) -> Task:
        """The image as the pretraining model takes it, with the mask if it leaves something to predict."""
        hidden = picked.hidden if is_task(picked.hidden) else None
        return Task.make("the demo", self.viewer, [picked.image], picked.seed, hidden)

    def hidden(self, picked: Picked, task: Task) -> Tensor:
        """bool [rows, columns]: the patches that the encoder does not see."""
        return ~task.context()[0] if picked.hidden is None else picked.hidden

    def drawn(self, picked: Picked) -> Picked:
        """With the next mask as the method draws them."""
        return replace(picked, hidden=None, seed=picked.seed + 1)

    def at_random(self, picked: Picked, share: float) -> Picked:
        """With this share of the patches hidden, at random. At least one is hidden and one stays."""
        seed, count = picked.seed + 1, self.viewer.num_patches
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        hidden = torch.zeros(count, dtype=torch.bool)
        hidden[order[: min(max(round(share * count), 1), count - 1)]] = True
        return replace(picked, hidden=hidden.unflatten(0, self.viewer.grid), seed=seed)

    def cleared(self, picked: Picked) -> Picked:
        """With no patch hidden."""
        return replace(picked, hidden=torch.zeros(self.viewer.grid, dtype=torch.bool))

    def painted(self, picked: Picked, x: int, y: int, brush: int = 1) -> Picked:
        """After a click on `mask_picture`: the patch there is hidden, or seen if it was hidden, with all below a
        brush of so many patches in height and width."""
        task = self.shown_task(picked)
        row, column = self.patch_at(task.view.size, x, y)
        hidden, reach = self.hidden(picked, task).clone(), brush // 2
        below = slice(max(row - reach, 0), row + reach + 1), slice(max(column - reach, 0), column + reach + 1)
        hidden[below] = not hidden[row, column]
        return replace(picked, hidden=hidden)

    def compared(self, picked: Picked, x: int, y: int) -> Picked:
        """After a click on `patch_picture`: with the patch there."""
        row, column = self.patch_at(self.viewer.encoder.image_size, x, y)
        return replace(picked, patch=(row + 1, column + 1))

    def patch_at(self, size: tuple[int, int], x: int, y: int) -> tuple[int, int]:
        """(row, column) from 0 of the patch below a pixel of an image that is shown enlarged; the nearest beside it."""
        counts = zip((y, x), self.viewer.grid, enlarged(size), strict=True)
        return tuple(min(max(int(pixel * count / side), 0), count - 1) for pixel, count, side in counts)

    # Pictures

    def mask_picture(self, picked: Picked) -> PIL.Image.Image:
        """What the encoder sees of the image. The rest has stripes."""
        task = self.shown_task(picked)
        seen = ~self.hidden(picked, task)[None]
        return picture_of(masked(task.view.shown(), task.pixels_of(seen))[0])

    def patch_picture(self, picked: Picked) -> PIL.Image.Image:
        """The image with the patch that is compared."""
        row, column = place(self.viewer, picked.patch)
        return picture_of(self.viewer.read([picked.image]).shown()[0], [patch_box(self.viewer, row, column)])

    @told
    def prediction(self, picked: Picked) -> str:
        """What the model predicts for the hidden patches: pixels or features, by its method."""
        if not is_task(picked.hidden):
            return message("Some patches have to be hidden and some seen: click on the picture.")
        plot = PICTURES[fitting_pictures(self.viewer)[0]].plot
        return figure_html(plot(self.viewer, [picked.image], seed=picked.seed, hidden=picked.hidden))

    @told
    def features(self, picked: Picked) -> str:
        """Which patches are like the chosen one, and the features of all in colours."""
        similar = plot_similarity(self.viewer, [picked.image], picked.patch)
        return figure_html(similar, first=1) + figure_html(plot_pca(self.viewer, [picked.image]), first=1)

    @told
    def nearest(self, picked: Picked) -> str:
        """The images of the collection that are nearest to this one."""
        (found,) = self.search.nearest([picked.image])
        images = self.search.collection.images([image.row for image in found])
        panels = []
        for image in found:
            (shown,) = self.viewer.read([images[image.row]["image"]]).shown()
            lines = [image.name, *([image.label] if image.label else []), f"cosine {image.cosine:.2f}"]
            panels.append(panel(picture_of(shown), lines, image.name))
        note = (
            f"By the cosine of the features {self.search.features}, after what all images have in common was taken "
            "off: images that have nothing to do with each other have about 0."
        )
        return section(f"The nearest of {len(self.search.collection):,} images", panels, note)


def is_task(hidden: Tensor | None) -> bool:
    """Whether some patches are hidden and some are seen. Masks of a method always leave both."""
    return hidden is None or bool(hidden.any()) and not bool(hidden.all())

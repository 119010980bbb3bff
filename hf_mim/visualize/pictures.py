"""Every picture by name, with the options that it has."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_mim.checks import least
from hf_mim.data import load_images
from hf_mim.data.decode import BrokenImage
from hf_mim.data.dicom import split_frame
from hf_mim.data.folders import IMAGE_EXTENSIONS, file_type
from hf_mim.data.sources import first_split, fixed_sample
from hf_mim.files import check_writable
from hf_mim.run_folder import picture_path, read_recipe
from hf_mim.visualize.features import plot_attention, plot_clusters, plot_pca, plot_similarity
from hf_mim.visualize.neighbours import plot_map, plot_nearest, pooled
from hf_mim.visualize.predictions import plot_masks, plot_noise, plot_prediction, plot_reconstructions
from hf_mim.visualize.style import Picture, draw_rows
from hf_mim.visualize.viewer import Viewer


def plot_map_of_images(model, images, seed: int = 0) -> Picture:
    """A map of images by their features, with thumbnails: see `plot_map`."""
    viewer, rows = Viewer.of(model), list(images)
    features, view = pooled(viewer, rows)
    labels = [row.get("label", -1) if isinstance(row, dict) else -1 for row in rows]
    return plot_map(features, view.shown(), [-1 if label is None else label for label in labels], seed=seed)


def plot_overview(model, images, seed: int = 0, position: bool = True) -> Picture:
    """What a model predicts of images, and below it the features of their patches in colours, on one page.

    The arguments are those of `plot_reconstructions` and `plot_pca`. Raises ValueError for an encoder alone.
    """
    viewer, images = Viewer.of(model), list(images)
    if viewer.pretraining is None:
        raise ValueError(f"overview needs the whole pretraining model, and {viewer.name} is an encoder alone")
    plot_task = plot_reconstructions if viewer.predicts_pixels else plot_prediction
    _, task, note, scales = plot_task(viewer, images, seed).drawn
    _, features, about, _ = plot_pca(viewer, images, position=position).drawn
    note = f"{note} Last row: {about[0].lower()}{about[1:]}"
    return draw_rows(f"What {viewer.name} predicts, and its features", [*task, features[-1]], note, scales)


@dataclass(frozen=True)
class Kind:
    """A picture.

    plot: (viewer, images, options) → figure.
    text: what it shows, in a few words.
    options: those that `plot` takes.
    """

    plot: Callable[..., Picture]
    text: str
    options: tuple[str, ...] = ()


PICTURES = {
    "overview": Kind(plot_overview, "predictions and patch features on one page", ("seed", "position")),
    "reconstructions": Kind(plot_reconstructions, "pixels that MAE, SymMIM and Interactive MIM predict", ("seed",)),
    "prediction": Kind(plot_prediction, "how well the others predict features, and the nearest patches", ("seed",)),
    "noise": Kind(plot_noise, "how predictions of StoP-JEPA differ under its noise", ("seed",)),
    "masks": Kind(plot_masks, "masks as they are drawn, and how often each patch is hidden", ("seed",)),
    "pca": Kind(plot_pca, "patch features in colours", ("foreground", "position")),
    "attention": Kind(plot_attention, "what the CLS token or a patch attends to", ("patch",)),
    "similarity": Kind(plot_similarity, "patches that are like one patch", ("patch",)),
    "clusters": Kind(plot_clusters, "groups of like patches", ("clusters",)),
    "nearest": Kind(plot_nearest, "the nearest images of each image", ("gallery",)),
    "map": Kind(plot_map_of_images, "all images on a map, like ones beside each other", ("seed",)),
}


def fitting_pictures(viewer: Viewer) -> list[str]:
    """The pictures that tell most about a model: its task, if it has the parts for it, and its features."""
    if viewer.pretraining is None:
        return ["pca"]
    return ["reconstructions" if viewer.predicts_pixels else "prediction", "pca"]


NUM_IMAGES, NUM_ON_MAP, NUM_IN_GALLERY = 8, 300, 500


def draw_pictures(
    checkpoint: str,
    images: Sequence[str],
    what: Sequence[str] | None = None,
    output: str = "pictures",
    count: int | None = None,
    split: str | None = None,
    image_column: str | None = None,
    image_size=None,
    bands: Sequence[int] | None = None,
    **options,
) -> Iterator[Path]:
    """Write pictures of a checkpoint as PNG files, and give the path of each as soon as it is there.

    Args:
        images: files, or one source as for `load_images`.
        what: names in `PICTURES`; default: `fitting_pictures`.
        output: the folder.
        count, split, image_column: of a source: how many images, from which split, in which column.
        image_size, bands: see `Viewer`. The default of the bands is what the checkpoint's recipe says.
        options: of the pictures.

    Raises ValueError, in one line, before anything is written, for what no picture can be made of.
    """
    if unknown := [name for name in what or () if name not in PICTURES]:
        raise ValueError(f"what must be of {', '.join(PICTURES)}, not {unknown[0] or 'nothing'}")
    least(1, count=count)
    check_writable(output, "output")
    if bands is None and Path(checkpoint).is_dir():
        bands = read_recipe(checkpoint).get("bands")
    viewer = Viewer.load(checkpoint, image_size, bands=bands)
    what = what or fitting_pictures(viewer)
    if unused := [name for name in options if not any(name in PICTURES[one].options for one in what)]:
        takers = [name for name, kind in PICTURES.items() if unused[0] in kind.options]
        raise ValueError(f"{unused[0]} is an option of {' and '.join(takers)}, and what is {','.join(what)}")
    if "gallery" in options:
        options["gallery"] = _of_source(viewer, options["gallery"], NUM_IN_GALLERY, None, image_column)
    figures = {}
    for name in what:
        kind, number = PICTURES[name], count or (NUM_ON_MAP if name == "map" else NUM_IMAGES)
        try:
            chosen = chosen_images(viewer, images, number, split, image_column)
            own = {key: value for key, value in options.items() if key in kind.options}
            figures[name] = kind.plot(viewer, chosen, **own)
        except BrokenImage as error:
            raise ValueError(f"an image cannot be decoded: {error}") from error
    Path(output).mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.save(path := picture_path(output, name))
        yield path


def chosen_images(
    viewer: Viewer, images: Sequence[str], count: int, split: str | None = None, image_column: str | None = None
) -> list:
    """All of these image files; or `count` images of one source, the same each time.

    Raises ValueError for several words that are no image files, and for a source that cannot be read.
    """
    return list(images) if _are_files(images) else _of_source(viewer, images[0], count, split, image_column)


def _are_files(images: Sequence[str]) -> bool:
    """Whether all are image files. Raises ValueError for several words that are not."""
    paths = [split_frame(image)[0] for image in images]
    files = [Path(path).is_file() and file_type(path) in IMAGE_EXTENSIONS for path in paths]
    if len(images) > 1 and not all(files):
        wrong = images[files.index(False)]
        raise ValueError(f"images must be image files, or one source such as a folder; {wrong} is no image file")
    return all(files)


def _of_source(viewer: Viewer, source: str, count: int, split: str | None, image_column: str | None) -> list[dict]:
    splits = ("test", "validation", "train") if split is None else (split,)
    column = {"image_column": image_column}
    images, _ = first_split(splits, lambda name: load_images(source, name, tell=lambda line: None, **column))
    return viewer.readable(fixed_sample(images, 2 * count), count)

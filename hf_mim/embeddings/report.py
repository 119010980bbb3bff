"""What a search has found, as rows of a table and as a contact sheet."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hf_mim.embeddings.collection import Found
from hf_mim.embeddings.search import Search
from hf_mim.files import check_writable, replacing
from hf_mim.visualize.contact_sheet import Tile, contact_sheet
from hf_mim.visualize.neighbours import plot_map

MOST_LINES, MOST_TILES = 20, 10  # of the picture
MOST_MAPPED = 2000  # images on a map: t-SNE of more takes minutes


def check_picture(output: str | Path) -> Path:
    """Raise ValueError, in one line, unless a picture and a table beside it can be written there."""
    output = Path(output)
    if output.suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise ValueError(f"output must be a picture, .png, .jpg, .pdf or .svg, not {output}")
    for path in (output, output.with_suffix(".csv")):
        check_writable(path, "output", "file")
    return output


def nearest_rows(queries: Sequence[str], nearest: Sequence[Sequence[Found]]) -> list[dict]:
    """A row for each query and image: query, rank, image, label, cosine."""
    return [
        {"query": query, "rank": rank, **_about(image)}
        for query, images in zip(queries, nearest, strict=True)
        for rank, image in enumerate(images, start=1)
    ]


def duplicate_rows(groups: Sequence[Sequence[Found]]) -> list[dict]:
    """A row for each image that has a near-duplicate: group, image, label, cosine."""
    return [{"group": number, **_about(x)} for number, images in enumerate(groups, start=1) for x in images]


def write(search: Search, found: Sequence[Sequence[Found]], rows: list[dict], queries: Sequence[str] = ()) -> Path:
    """Write the rows as CSV, and draw a line of pictures for each query, or each group. Returns the picture's path.

    The pictures of embeddings come from the source that was embedded. If it is not where it was, none is drawn.
    """
    output = Path(search.source.output)
    with replacing(output.with_suffix(".csv")) as aside, aside.open("w", newline="") as file:
        lines = csv.DictWriter(file, list(rows[0]))
        lines.writeheader()
        lines.writerows(rows)
    shown = [group[:MOST_TILES] for group in found[:MOST_LINES]]
    images = search.collection.images([image.row for group in shown for image in group])
    tiles = []
    for number, group in enumerate(shown):
        line = []
        if queries:
            query = queries[number]
            line.append(Tile(search.picture(search.query(query)), ["query", Path(query).name], True))
        for image in group:
            caption = [image.name, *([image.label] if image.label else []), f"cosine {image.cosine:.3f}"]
            line.append(Tile(search.picture(images[image.row]["image"]), caption))
        tiles.append(line)
    left = f"; the first {MOST_LINES} of {len(found):,}" if len(found) > MOST_LINES else ""
    title = f"{'Nearest images' if queries else 'Near-duplicates'} by {search.features}{left}"
    with replacing(output) as aside:
        contact_sheet(tiles, title).savefig(aside, dpi=120, format=output.suffix.removeprefix("."))
    return output


class Thumbnails(Sequence):
    """The pictures of some images of a collection, opened when they are asked for."""

    def __init__(self, search: Search, rows: Sequence[int]):
        self.search, self.rows, self.images = search, rows, search.collection.images(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:  # type: ignore[override]  # nothing asks for a slice
        picture = self.search.picture(self.images[self.rows[index]]["image"])
        return (picture if picture.ndim == 3 else np.stack([picture] * 3, axis=2)) / 255


def write_map(search: Search) -> Path:
    """Draw a map of the collection, or of a fixed sample of it, on which like images lie beside each other."""
    rows, count = search.collection.rows, len(search.collection)
    chosen = sorted(torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MOST_MAPPED].tolist())
    features = torch.cat([*search.collection.parts()])[chosen]
    labels = [rows["label"][place] for place in chosen] if "label" in rows else [None] * len(chosen)
    names = sorted({label for label in labels if label is not None})
    ids = [-1 if label is None else names.index(label) for label in labels]
    pictures = Thumbnails(search, [rows["row"][place] for place in chosen])
    figure = plot_map(features, pictures, ids, [str(name) for name in names])
    figure.save(search.source.output)
    return Path(search.source.output)


def _about(image: Found) -> dict:
    return {"image": image.name, "label": image.label or "", "cosine": round(image.cosine, 4)}

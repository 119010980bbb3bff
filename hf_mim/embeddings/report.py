"""What a search has found, as rows of a table and as a contact sheet."""

import csv
from collections.abc import Sequence
from pathlib import Path

from hf_mim.embeddings.collection import Found
from hf_mim.embeddings.search import Search
from hf_mim.files import check_writable, replacing
from hf_mim.visualize.contact_sheet import Tile, contact_sheet

MOST_LINES, MOST_TILES = 20, 10  # of the picture


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
    images = search.collection.images()
    tiles = []
    for number, group in enumerate(found[:MOST_LINES]):
        line = [Tile(search.picture(queries[number]), ["query", Path(queries[number]).name], True)] if queries else []
        for image in group[:MOST_TILES]:
            caption = [image.name, *([image.label] if image.label else []), f"cosine {image.cosine:.3f}"]
            line.append(Tile(search.picture(images[image.row]["image"]), caption))
        tiles.append(line)
    left = f"; the first {MOST_LINES} of {len(found):,}" if len(found) > MOST_LINES else ""
    title = f"{'Nearest images' if queries else 'Near-duplicates'} by {search.features}{left}"
    with replacing(output) as aside:
        contact_sheet(tiles, title).savefig(aside, dpi=120, format=output.suffix.removeprefix("."))
    return output


def _about(image: Found) -> dict:
    return {"image": image.name, "label": image.label or "", "cosine": round(image.cosine, 4)}

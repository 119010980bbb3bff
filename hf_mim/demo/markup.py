"""Pictures and messages as a page shows them. All text is escaped here: a name with HTML in it stays text."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import PIL.Image
from matplotlib.colors import to_hex

from hf_mim.visualize.style import DPI, Picture, Scale, show_picture

SIDE = 512  # pixels of the longer side of a picture, about

CSS = """
.mim h1 { margin: .2rem 0; font-size: 1.4rem; font-weight: 600; overflow-wrap: anywhere }
.mim h2 { margin: .6rem 0 .2rem; font-size: 1.05rem }
.mim p { margin: .2rem 0; max-width: 75ch; color: var(--body-text-color) }
.mim .note { font-size: .85rem; color: var(--body-text-color); opacity: .8 }
.mim .panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(140px, 45%), 1fr)); gap: .7rem }
.mim figure { margin: 0; min-width: 0; max-width: 340px }
.mim figure img { width: 100%; display: block; image-rendering: pixelated; border-radius: 4px }
.mim figcaption { font-size: .85rem; overflow-wrap: anywhere; color: var(--body-text-color) }
.mim .scale { max-width: 26rem; margin-top: .7rem; font-size: .85rem; color: var(--body-text-color) }
.mim .scale .colors { height: .7rem; border-radius: 2px }
.mim .scale .ends { display: flex; justify-content: space-between; gap: 1rem }
.mim .message { border-left: 4px solid #d55e00; padding: .3rem .7rem; overflow-wrap: anywhere }
.mim-examples .grid-wrap { height: auto; max-height: none; min-height: 0 }
.mim-examples .grid-container { grid-template-columns: repeat(4, 1fr); grid-auto-rows: auto }
"""


def enlarged(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in which an image of this size is shown."""
    factor = max(1, round(SIDE / max(size)))
    return size[0] * factor, size[1] * factor


def picture_of(image: np.ndarray, boxes: Sequence[tuple[float, float, float, float]] = ()) -> PIL.Image.Image:
    """RGB or RGBA `[h, w, 3 or 4]` in 0..1, enlarged to about `SIDE`, without a margin: a click on the picture is at
    the same share of its width and height as on the image. What is transparent has stripes, `boxes` are marked."""
    height, width = enlarged(image.shape[:2])
    figure = Picture(figsize=(width / DPI, height / DPI))
    show_picture(figure.add_axes((0, 0, 1, 1)), image, boxes)
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png")
    return PIL.Image.open(file).convert("RGB")


def heading(title: str, text: str) -> str:
    """The top of the page."""
    return f'<div class="mim"><h1>{escape(title)}</h1><p>{escape(text)}</p></div>'


def hint(text: str) -> str:
    """A line above a picture."""
    return f'<div class="mim"><p>{escape(text)}</p></div>'


def message(text: str) -> str:
    """A message about what cannot be shown."""
    return f'<div class="mim"><p class="message" role="alert">{escape(text)}</p></div>'


def figure_html(figure: Picture, first: int = 0) -> str:
    """A figure of `draw_rows` for one image: its pictures side by side, as many as the window has room for.

    first: leave out those before.
    """
    title, rows, note, scales = figure.drawn
    panels = [
        panel(picture_of(row.pictures[0], row.boxes[0] if row.boxes else ()), [row.label, *row.below[:1]], row.label)
        for row in rows[first:]
    ]
    return section(title, panels, note, scales)


def panel(picture: PIL.Image.Image, caption: Iterable[str], alt: str) -> str:
    """A picture with lines of text below."""
    file = io.BytesIO()
    picture.save(file, format="png")
    source = base64.b64encode(file.getvalue()).decode()
    lines = "<br>".join(map(escape, caption))
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt="{escape(alt)}">'
        f"<figcaption>{lines}</figcaption></figure>"
    )


def section(title: str, panels: Iterable[str], note: str = "", scales: Iterable[Scale] = ()) -> str:
    """A heading, panels, what the colours mean, and a note."""
    return (
        f'<div class="mim"><h2>{escape(title)}</h2><div class="panels">{"".join(panels)}</div>'
        f'{"".join(map(_scale, scales))}<p class="note">{escape(note)}</p></div>'
    )


def _scale(scale: Scale) -> str:
    colors = ", ".join(to_hex(color) for color in scale(np.linspace(scale.low, scale.high, 9)))
    return (
        f'<div class="scale"><div class="colors" style="background: linear-gradient(to right, {colors})"></div>'
        f'<div class="ends"><span>{scale.low:.2g}</span><span>{escape(scale.meaning)}</span>'
        f"<span>{scale.high:.2g}</span></div></div>"
    )

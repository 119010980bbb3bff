"""The page of `page.html` and `page.css`, filled with what is in the run folders, and written."""

import base64
import io
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from hf_mim.files import check_writable, replacing
from hf_mim.hub.card_text import plain, words
from hf_mim.report.run import Shown, describe
from hf_mim.run_folder import REPORT
from hf_mim.runs import Run, RunComparison, compare

HERE = Path(__file__).parent
MARK = '<meta name="generator" content="hf-mim report">'
DPI = 120


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of one or several runs.

    Args:
        folders: run folders, also of runs that still train or have stopped.
        output: the file; its folder is made. Default: report.html, in the run's folder or, for several runs, here.

    Raises:
        ValueError: in one line, before anything is written: a folder holds no run, a file in it is damaged, or
            `output` is something else than a new file or an older report.
        OSError: the file cannot be written.
    """
    path = Path(output) if output is not None else Path(folders[0] if len(folders) == 1 else ".") / REPORT
    runs = [Run.read(folder) for folder in folders]
    check_output(path)
    page = report(runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def check_output(path: Path) -> None:
    """Raise ValueError unless a report may be written there: to a new file, or over a report."""
    check_writable(path, "output", "file")
    if os.path.lexists(path) and not is_report(path):
        raise ValueError(f"output must be a new file or a report to replace, and {path} is neither")


def is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return MARK.encode() in file.read(1000)


def report(runs: Sequence[Run]) -> str:
    """The page as text."""
    comparison = compare(runs) if len(runs) > 1 else None
    names = comparison.names if comparison else [runs[0].folder.absolute().name]
    environment = jinja2.Environment(
        autoescape=True, finalize=_tight, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"embed": embed, "words": words}
    environment.filters["number"] = in_table
    return environment.from_string((HERE / "page.html").read_text(encoding="utf-8")).render(
        mark=Markup(MARK),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        title=plain(names[0]) if len(runs) == 1 else f"{len(runs)} runs side by side",
        runs=[describe(run, plain(name)) for run, name in zip(runs, names, strict=True)],
        comparison=comparison and _compared(comparison),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("hf-mim"),
    )


def _compared(comparison: RunComparison) -> dict:
    """The parts of a comparison: a table for each, and the picture of the curves."""
    parts = {
        "Results": comparison.results,
        "Training": comparison.training,
        "Settings that differ": comparison.settings,
    }
    names = [plain(name) for name in comparison.names]
    tables = {
        title: [{"": x} | dict(zip(names, map(in_table, values), strict=True)) for x, values in rows.items()]
        for title, rows in parts.items()
    }
    alt = f"Loss and probe over the images seen, a curve for each of {', '.join(names)}; the table has the values"
    return {"tables": tables, "picture": Shown("", comparison.figure(), alt)}


def _tight(value: Any) -> Any:
    """No line is broken before a percent sign."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if isinstance(value, str) else value


def in_table(value: Any) -> str:
    """A value in a cell, as `words`: large numbers with commas, others with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else words(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def embed(picture: Figure | Path) -> dict | None:
    """Address and size of a picture that lies in the page; None for a file that is no picture."""
    if isinstance(picture, Figure):
        file = io.BytesIO()
        picture.savefig(file, dpi=DPI, format="png")
        content = file.getvalue()
    else:
        content = picture.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except OSError:
        return None
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return {"src": source, "width": width, "height": height}

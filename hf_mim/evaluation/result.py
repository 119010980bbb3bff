"""What a protocol returns: a number, the protocol in full, and what it was measured on."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from hf_mim.files import replacing

LONGEST_TABLE = 16  # rows that are printed


def installed_versions() -> dict[str, str]:
    """Of the packages that decide a number."""
    found = {}
    for name in ("hf-mim", "torch", "transformers", "scikit-learn", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its folder, not installed
            continue
    return found


@dataclass
class Result:
    """One measurement. Model cards are made of these files and of nothing else.

    protocol, metric, value: the headline; accuracies and other shares are in 0..1.
    settings: the protocol in full: features (layer, pooling, norm), hyper-parameters, seed.
    data: what was measured on: source, split, number of images.
    scores: every other number, by name. table: rows of equal keys, such as one for each head or class.
    notes: sentences that a reader of the number needs.
    checkpoint, checkpoint_sha256 (of its weight files), versions, device, seconds: filled in by `evaluate`.
    """

    protocol: str
    metric: str
    value: float
    settings: dict
    data: dict
    scores: dict[str, float] = field(default_factory=dict)
    table: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=installed_versions)
    device: str | None = None
    seconds: float | None = None

    def save(self, path: str | Path) -> Path:
        """Write as JSON, whole or not at all; makes the folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(json.dumps(_finite(asdict(self)), indent=2, default=str, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read what `save` wrote. Raises ValueError for another file."""
        try:
            values = json.loads(Path(path).read_text())
            types = {f.name: f.type for f in fields(cls)}
            known = {name: value for name, value in values.items() if name in types}
            for name, value in known.items():
                if not _is_a(value, types[name]):
                    raise ValueError(f"{name} is {str(value)[:100]!r}")
            data = known.get("data", {})
            if not all(isinstance(data[part], dict) for part in ("train", "test") if part in data):
                raise ValueError(f"data is {str(data)[:100]!r}")
            return cls(**known)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no result: {error}") from error

    def headline(self) -> str:
        """One line: protocol, value, and what it was measured on."""
        measured = self.data.get("test", self.data)
        on = (
            f" on {measured['images']:,} images of {measured['source']}"
            if {"images", "source"} <= measured.keys()
            else ""
        )
        return f"{self.protocol}: {self.metric} {format_number(self.value)}{on}"

    def __str__(self) -> str:
        """The headline, a small table and the notes."""
        parts = [self.headline()]
        if self.scores:
            width = max(map(len, self.scores))
            parts.append("\n".join(f"  {name:<{width}}  {format_number(x)}" for name, x in self.scores.items()))
        if 0 < len(self.table) <= LONGEST_TABLE:
            parts.append(format_table(self.table))
        elif self.table:
            parts.append(f"The table of {len(self.table)} rows is in the file.")
        parts += self.notes
        return "\n\n".join(parts)


def _is_a(value, kind) -> bool:
    """Whether a value from JSON is of a field's type. A number that was not finite is None there."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if kind is float:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(x, get_args(kind)[0]) for x in value)
    return isinstance(value, get_origin(kind) or kind)


def _finite(value):
    """The same with None for numbers that JSON does not know: NaN and infinities."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_number(value) -> str:
    """Four significant digits; whole numbers, texts and None as they are."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.4g}"


def format_table(rows: list[dict], indent: str = "  ") -> str:
    """Rows of equal keys as aligned columns, numbers to the right."""
    columns = list(rows[0])
    cells = [[format_number(row[name]) for name in columns] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(columns)]
    right = [all(isinstance(row[name], int | float) or row[name] is None for row in rows) for name in columns]
    lines = [
        "  ".join(f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(line, widths, right, strict=True))
        for line in (columns, *cells)
    ]
    return "\n".join((indent + line).rstrip() for line in lines)

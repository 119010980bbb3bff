"""What a protocol returns: a number, all settings of the protocol, and the data it was measured on."""

import functools
import json
import math
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, cast, get_args, get_origin

from hf_mim.files import check_writable, replacing
from hf_mim.scrub import scrubbed_all

LONGEST_TABLE = 16  # rows that are printed
LARGEST_FILE = 2**26  # bytes; a larger file is no result


def installed_versions() -> dict[str, str]:
    """The versions of the packages that a number may depend on."""
    found = {}
    for name in ("hf-mim", "torch", "transformers", "scikit-learn", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # hf-mim may run from its folder without being installed
            continue
    return found


@functools.cache
def git_state() -> dict | None:
    """The commit of hf_mim, and whether its files have changes, if it runs from a git checkout.

    None if it is installed as a package, or without git. The first call decides, because code that changes while a
    process runs is not what it runs.
    """
    root = Path(__file__).absolute().parents[2]
    if not (root / ".git").exists():  # a package may lie in an environment within the user's own checkout
        return None
    command = ["git", "-c", "safe.directory=*", "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    elsewhere = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run([*command, "--", "hf_mim"], cwd=root, env=elsewhere, capture_output=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    about, *lines = done.stdout.decode(errors="replace").splitlines() or [""]
    if not about.startswith("# branch.oid "):
        return None
    return {"commit": about.split()[-1], "changes": any(not line.startswith("#") for line in lines)}


@dataclass
class Result:
    """One measurement. Model cards take their numbers from files of these, and from nowhere else.

    protocol, metric, value: the headline; accuracies and other shares are in 0..1.
    settings: all settings of the protocol: features (layer, pooling, norm), hyper-parameters, seed.
    data: what it was measured on: source, split, number of images.
    scores: every other number, by name. table: rows with equal keys, such as one for each head.
    classes: rows about the classes, of protocols that classify.
    notes: sentences that a reader of the number needs.
    checkpoint, checkpoint_sha256 (of its weight files), device, seconds: `measure` fills them in.
    versions: of the packages that a number may depend on. git: the commit of hf_mim (`git_state`).
    """

    protocol: str
    metric: str
    value: float
    settings: dict
    data: dict
    scores: dict[str, float] = field(default_factory=dict)
    table: list[dict] = field(default_factory=list)
    classes: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=installed_versions)
    git: dict | None = field(default_factory=git_state)
    device: str | None = None
    seconds: float | None = None
    # No fields, because the file does not have them: the predicted classes `[n]` or `[draws, n]` of the test images,
    # the fold in which each was tested, and what `measure` makes of them (`predictions.Predictions`).
    predicted = fold_numbers = predictions = cast(Any, None)
    path, beside = cast(Path | None, None), cast(Sequence[Path], ())  # where `hf_mim.evaluate` has saved it, and beside

    def add_predictions(self, predictions: Any) -> None:
        """Take over what `predictions.Predictions` say: the interval of the accuracy, chance, the classes."""
        self.predictions = predictions
        self.scores |= predictions.scores()
        self.classes = predictions.by_class()

    def save(self, path: str | Path) -> Path:
        """Write the result as JSON, completely or not at all. The folder is made if it is missing.

        Results travel, so folders of this machine and tokens are left out (`hf_mim.scrub`).
        """
        path = Path(path)
        values = scrubbed_all(_finite(asdict(self)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            aside.write_text(json.dumps(values, indent=2, default=str, allow_nan=False) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Result":
        """Read a file that `save` wrote. Raises ValueError for any other file."""
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
            return cls(**{"git": None} | known)  # older files do not say it
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no result: {error}") from error

    def headline(self) -> str:
        """One line: protocol, value, and what it was measured on."""
        line, measured = f"{self.protocol}: {self.metric} {format_number(self.value)}", self.data.get("test", self.data)
        if {"images", "source"} <= measured.keys():
            line += f" on {measured['images']:,} images of {measured['source']}"
        return line

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
        if 0 < len(self.classes) <= LONGEST_TABLE:
            parts.append(format_table(self.classes))
        parts += self.notes
        return "\n\n".join(parts)


class NotKept(OSError):
    """What a protocol made beside the number could not be written. `result` is the measurement, and is whole."""

    def __init__(self, message: str, result: Result):
        super().__init__(message)
        self.result = result


def check_result_path(path: Path, argument: str) -> None:
    """Raise ValueError, before any work, unless a result may be written there: to a new file, or over a result."""
    check_writable(path, argument, "file")
    if not os.path.lexists(path):
        return
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            raise ValueError
        Result.load(path)
    except ValueError:
        raise ValueError(f"{argument} must be a new file or a result to replace, and {path} is neither") from None


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has the type of a field. JSON has None for a number that was not finite."""
    if isinstance(kind, UnionType):
        return any(_is_a(value, one) for one in get_args(kind))
    if kind is float:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(isinstance(x, get_args(kind)[0]) for x in value)
    return isinstance(value, get_origin(kind) or kind)


def _finite(value: Any) -> Any:
    """The same value, with None for the numbers that JSON does not have: NaN and infinities."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def format_number(value: Any) -> str:
    """A float with four significant digits, None as an empty text, other values as they are."""
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.4f}" if 1e-3 <= abs(value) < 10 else f"{value:.4g}"


def format_table(rows: list[dict], indent: str = "  ") -> str:
    """Rows with equal keys as aligned columns. Numbers are aligned to the right."""
    columns = list(rows[0])
    cells = [[format_number(row[name]) for name in columns] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(columns)]
    right = [all(isinstance(row[name], int | float) or row[name] is None for row in rows) for name in columns]
    lines = [
        "  ".join(f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(line, widths, right, strict=True))
        for line in (columns, *cells)
    ]
    return "\n".join((indent + line).rstrip() for line in lines)

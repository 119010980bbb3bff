"""Files of embeddings: Parquet, a `.npy` array, or a folder of `datasets`. Each is written and read in small parts.

All have a row for each image, in the order of the source: `name`, `row` (its place in the source), `label` if there are
labels, and a column for each kind of features. A `.npy` file holds the features alone; the other columns are in a
`.csv` file of the same name. What the features are of (`about`) is in the metadata of the Parquet file, in `FILE.json`
beside the array, and in `embeddings.json` in the folder.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetInfo
from datasets.table import MemoryMappedTable
from torch import Tensor

from hf_mim.files import check_destination, check_parent, check_writable, one_line, replacing

KEY = b"hf_mim"  # of `about` in the metadata of Parquet
ABOUT = "embeddings.json"
READ = 1024  # rows of a part that is read
PARQUET, ARRAY, FOLDER = ".parquet", ".npy", ""


def partial_of(output: Path) -> Path:
    """The folder with the parts of an extraction that is under way."""
    return output.with_name(f"_{output.name}.partial")


def remove_leftovers(output: Path):
    """Take away the parts of an output that is whole: its extraction was ended while it did so."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        shutil.rmtree(partial_of(output), ignore_errors=True)


def check_output(output: str | Path, features: list[str]) -> Path:
    """Raise ValueError, in one line, unless embeddings of these features can be written to this new file or folder."""
    output = Path(output)
    if output.suffix not in (PARQUET, ARRAY, FOLDER):
        raise ValueError(f"output must end with .parquet or .npy, or be a new folder without such an end, not {output}")
    check_parent(output, "output")
    if output.suffix == FOLDER:
        return check_destination(output, "output")
    if output.suffix == ARRAY and len(features) > 1:
        raise ValueError(f"features must be of one kind for a .npy file, not {', '.join(features)}; .parquet takes all")
    ends = (".csv", ".json") if output.suffix == ARRAY and not partial_of(output).is_dir() else ()
    for path in (output, *map(output.with_suffix, ends)):  # what stands beside an array is written before it
        if os.path.lexists(path):
            raise ValueError(f"output must be a new file, and {path} exists")
    check_writable(output, "output", "file")
    return output


def write(output: Path, tables: Iterable[pa.Table], features: datasets.Features, about: dict[str, Any], aside: Path):
    """Write tables of these columns, one after the other. The output gets its name when it is whole.

    aside: a folder on the same disk, for files that are not whole yet.
    """
    writers = {PARQUET: _write_parquet, ARRAY: _write_array, FOLDER: _write_folder}
    writers[output.suffix](output, tables, features, about, aside)


def _write_parquet(output, tables, features, about, aside):
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, KEY: json.dumps(about).encode()})
    with pq.ParquetWriter(aside / "whole", schema, use_dictionary=False) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    os.replace(aside / "whole", output)


def _write_array(output, tables, features, about, aside):
    name = about["features"][0]
    labels = getattr(features.get("label"), "names", None)
    with (aside / "whole").open("wb") as array, (aside / "csv").open("w", newline="") as rows:
        columns = [column for column in features if column != name]
        lines = csv.writer(rows)
        lines.writerow(columns)
        shape = about["images"], *about["shapes"][name]
        np.lib.format.write_array_header_1_0(array, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for table in tables:
            array.write(_flat(table[name]).astype("<f4", copy=False).tobytes())
            for row in table.select(columns).to_pylist():
                if labels and row["label"] is not None:
                    row["label"] = labels[row["label"]]
                lines.writerow(row.values())
    os.replace(aside / "csv", output.with_suffix(".csv"))
    with replacing(output.with_suffix(".json")) as path:
        path.write_text(json.dumps(about, indent=2) + "\n")
    os.replace(aside / "whole", output)


def _write_folder(output, tables, features, about, aside):
    with pa.ipc.new_stream(aside / "whole", features.arrow_schema) as writer:
        for table in tables:
            writer.write_table(table)
    # The fingerprint is given, because a random one would make equal embeddings different files.
    table, info = MemoryMappedTable.from_file(str(aside / "whole")), DatasetInfo(features=features)
    dataset = Dataset(table, info, fingerprint=about["encoder"][:16])
    dataset.save_to_disk(aside / "folder")
    (aside / "folder" / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    if output.is_dir():
        output.rmdir()
    os.replace(aside / "folder", output)


def _flat(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The numbers of a column of lists of one length, one after the other."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while pa.types.is_fixed_size_list(values.type) or pa.types.is_list(values.type):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)


class Embeddings:
    """A file or folder that `write` has made.

    Attributes: `path`; `about`: what the features are of (see `embed.describe`).

    Raises:
        ValueError: it is none, or damaged.
    """

    def __init__(self, path: str | Path):
        self.path, about = Path(path), read_about(path)
        if about is None:
            raise ValueError(f"{path} holds no embeddings of hf-mim embed")
        self.about: dict[str, Any] = about

    def __len__(self) -> int:
        return self.about["images"]

    @cached_property
    def rows(self) -> dict[str, list]:
        """The columns beside the features: `name`, `row`, and maybe `label` (the name of the class, if it has one)."""
        if self.path.suffix == ARRAY:
            with self.path.with_suffix(".csv").open(newline="") as file:
                lines = list(csv.DictReader(file))
            texts = {name: [line[name] for line in lines] for name in lines[0]}
            return texts | {"row": [int(row) for row in texts["row"]]}
        rows: dict[str, list] = {}
        for table in self._tables(None):
            for name in table.column_names:
                rows.setdefault(name, []).extend(table[name].to_pylist())
        if names := self.about.get("classes"):
            rows["label"] = [None if label is None else names[label] for label in rows["label"]]
        return rows

    def check(self, features: str):
        """Raise ValueError unless there are features of this kind."""
        if features not in (kinds := self.about["features"]):
            raise ValueError(f"features must be among those in {self.path}: {', '.join(kinds)}, not {features}")

    def parts(self, features: str) -> Iterator[Tensor]:
        """Features of one kind, float32 `[b, ...]`, in the order of the rows."""
        self.check(features)
        if self.path.suffix == ARRAY:
            array = np.load(self.path, mmap_mode="r")
            for start in range(0, len(array), READ):
                yield torch.from_numpy(np.array(array[start : start + READ]))
            return
        for table in self._tables(features):
            yield torch.from_numpy(_flat(table[features]).reshape(-1, *self.about["shapes"][features]).copy())

    def _tables(self, features: str | None) -> Iterator[pa.Table]:
        """Parts of the column of these features, or of all columns without features."""
        if self.path.suffix == PARQUET:
            with pq.ParquetFile(self.path) as file:
                names = [name for name in file.schema_arrow.names if name not in self.about["features"]]
                for batch in file.iter_batches(READ, columns=names if features is None else [features]):
                    yield pa.Table.from_batches([batch])
            return
        dataset = datasets.load_from_disk(str(self.path)).with_format("arrow")
        names = [name for name in dataset.column_names if name not in self.about["features"]]
        yield from dataset.select_columns(names if features is None else [features]).iter(READ)


def read_about(path: str | Path) -> dict[str, Any] | None:
    """What the embeddings in a file or folder are of; None if it holds none. Raises ValueError for damaged ones."""
    path = Path(path)
    place = {PARQUET: path, ARRAY: path.with_suffix(".json")}.get(path.suffix, path / ABOUT)
    if not place.is_file():
        return None
    try:
        text = pq.read_schema(path).metadata.get(KEY) if path.suffix == PARQUET else place.read_text()
        about = None if text is None else json.loads(text)
    except (OSError, ValueError, AttributeError, pa.ArrowException) as error:
        raise ValueError(f"{place} cannot be read: {one_line(error)}") from error
    return about if isinstance(about, dict) and {"encoder", "features", "shapes"} <= about.keys() else None

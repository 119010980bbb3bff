"""`hf-mim evaluate PROTOCOL CHECKPOINT --dataset SOURCE [--test SOURCE] [--option value ...]`.

What a protocol can be told is said by three dataclasses: the encoder's (`EncoderArguments`), those of the images that
it needs (`NEEDS`), and its own. Anything else is an error.
"""

import dataclasses
import difflib
import inspect
import textwrap
import time
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from hf_mim.cli.help import section
from hf_mim.data.sources import source_name
from hf_mim.evaluation import PROTOCOLS, load_protocol
from hf_mim.evaluation.data_arguments import NEEDS
from hf_mim.files import check_writable
from hf_mim.pretraining.settings import split_options, to_type

USAGE = """\
usage: hf-mim evaluate PROTOCOL CHECKPOINT [--dataset SOURCE] [--test SOURCE] [--option value]

CHECKPOINT is a folder, or a name on the Hub, of any vision transformer that transformers' AutoModel loads. The result
goes to CHECKPOINT/results/. hf-mim evaluate PROTOCOL --help lists its options."""


@dataclass
class EncoderArguments:
    """How the encoder is loaded and run."""

    image_size: int | list[int] | None = field(
        default=None,
        metadata={"help": "side, or height,width, that the encoder is to see; default: its own"},
    )
    image_mean: list[float] | None = field(default=None, metadata={"help": "default: the image processor's"})
    image_std: list[float] | None = field(default=None, metadata={"help": "default: the image processor's"})
    untrained: bool = field(default=False, metadata={"help": "the same architecture with random weights, to compare"})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "bfloat16: autocast"})
    device: str | None = field(default=None, metadata={"help": "default: the accelerator, or else the CPU"})
    extract_batch_size: int = field(default=64, metadata={"help": "images at a time; changes no feature"})
    num_workers: int = field(default=0, metadata={"help": "processes that decode"})
    cache: str = field(
        default="default",
        metadata={"help": "folder that keeps features (default: ~/.cache/hf_mim/features), or none"},
    )
    output: str | None = field(default=None, metadata={"help": "file of the result; default: in CHECKPOINT/results"})

    def __post_init__(self):
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise ValueError(f"image_size must be a side or height,width, not {self.image_size}")
        for name, least in (("extract_batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std must be given together")

        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError):  # unknown to torch, or not in this machine
                raise ValueError(f"device must be one that this machine has, such as cpu, not {self.device}") from None

    def extractor(self, checkpoint: str, crop):
        """A `FeatureExtractor` of the checkpoint's encoder."""
        from hf_mim.evaluation.cache import default_cache
        from hf_mim.evaluation.encoder import FrozenEncoder
        from hf_mim.evaluation.features import FeatureExtractor

        size = tuple(self.image_size) if isinstance(self.image_size, list) else self.image_size
        dtype = getattr(torch, self.dtype)
        encoder = FrozenEncoder.load(checkpoint, size, self.device, dtype, self.image_mean, self.image_std)
        if self.untrained:
            encoder = encoder.untrained()
        cache = {"default": default_cache(), "none": None}.get(self.cache, Path(self.cache))
        return FeatureExtractor(encoder, self.extract_batch_size, self.num_workers, cache, crop)


# Options that change no number, and those that name the result already.
UNNAMED = {"dataset", "test", "device", "extract_batch_size", "num_workers", "cache", "output", "output_dir"}


class Evaluation:
    """One measurement, ready to start. Raises ValueError, before any work, if it cannot be made."""

    @classmethod
    def parse(cls, protocol: str, words: list[str]) -> "Evaluation":
        """From what follows `hf-mim evaluate PROTOCOL` on a command line."""
        types = option_types(load_protocol(protocol))
        given, rest = split_options(words, lambda name: types.get(name) is bool)
        for name in given:
            if name not in types:
                nearest = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
                raise ValueError(
                    f"{protocol} has no option {name}" + (f"; did you mean {nearest[0]}?" if nearest else "")
                )
        if len(rest) != 1:
            raise ValueError(f"evaluate {protocol} needs one CHECKPOINT, not {' and '.join(rest) or 'none'}")
        return cls(protocol, rest[0], {name: to_type(name, value, types[name]) for name, value in given.items()})

    def __init__(self, protocol: str, checkpoint: str, values: dict[str, Any]):
        kinds = argument_kinds(protocol_class := load_protocol(protocol))
        encoder, source, self.protocol = (
            kind(**{name: value for name, value in values.items() if name in arguments(kind)}) for kind in kinds
        )
        if protocol_class.needs != "nothing" and source.dataset is None:
            raise ValueError(f"dataset must be given: {arguments_help(NEEDS[protocol_class.needs])['dataset']}")
        self.checkpoint, self.arguments, self.source = checkpoint, encoder, source
        self.path = self._path(values)
        check_writable(self.path, "output", "file")
        self.extract = encoder.extractor(checkpoint, source.crop())
        self.splits = source.load()

    def _path(self, values: dict[str, Any]) -> Path:
        """Of the result, named after protocol, data and every option that was given and may change the number."""
        from hf_mim.run_folder import result_path

        if self.arguments.output:
            return Path(self.arguments.output)
        folder, names = Path(self.checkpoint), [self.protocol.name]
        if not folder.is_dir():  # a Hub name has no folder: its results go to results/ here
            names = [self.checkpoint.replace("/", "_"), *names]
            folder = Path(".")
        names += [Path(values[name]).stem for name in ("dataset", "test") if values.get(name)]
        given = sorted((name, value) for name, value in values.items() if name not in UNNAMED)
        names += [name if value is True else f"{name}_{value}" for name, value in given]
        return result_path(folder, *names)

    def __call__(self):
        """Measure and return the `Result`; `path` is where it is to be saved."""
        from hf_mim.evaluation.checkpoint import checkpoint_sha256

        start = time.perf_counter()
        result = self.protocol.run(self.extract, *self.splits)
        encoder = self.extract.encoder
        result.seconds = round(time.perf_counter() - start, 1)
        result.checkpoint, result.device = source_name(self.checkpoint), str(encoder.device)
        result.checkpoint_sha256 = None if encoder.is_untrained else checkpoint_sha256(self.checkpoint)
        offered = option_types(type(self.protocol))
        about = {"image_size": list(encoder.image_size), "dtype": self.arguments.dtype}
        about |= {"image_mean": encoder.mean, "image_std": encoder.std, "crop_fraction": self.extract.crop.fraction}
        result.settings |= {name: value for name, value in about.items() if name in offered}
        result.settings["untrained"] = encoder.is_untrained
        return result


def argument_kinds(protocol: type) -> tuple[type, type, type]:
    """The dataclasses that say what a protocol can be told: of the encoder, of the images, its own."""
    return EncoderArguments, NEEDS[protocol.needs], protocol


def option_types(protocol: type) -> dict[str, Any]:
    """Name → type of every option. A protocol may have no use for some of the encoder's: it lists them as `unused`."""
    types = {name: hint for kind in argument_kinds(protocol) for name, hint in arguments(kind).items()}
    return {name: hint for name, hint in types.items() if name not in getattr(protocol, "unused", ())}


def arguments(kind: type) -> dict[str, Any]:
    """Name → type of a dataclass's arguments."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def arguments_help(kind: type) -> dict[str, str]:
    return {f.name: f.metadata.get("help", "") for f in dataclasses.fields(kind)}


def evaluate_help(protocol: str | None) -> str:
    """All options of a protocol; without one, what protocols there are."""
    if protocol is None:
        lines = [
            textwrap.fill(inspect.getdoc(load_protocol(name)).splitlines()[0], 118, **_indents(f"  {name:<15}"))
            for name in PROTOCOLS
        ]
        return USAGE + "\n\nprotocols:\n" + "\n".join(lines)
    protocol_class = load_protocol(protocol)
    kinds = {
        f"protocol {protocol}": protocol_class,
        "images": NEEDS[protocol_class.needs],
        "encoder": EncoderArguments,
    }
    offered = option_types(protocol_class)
    rows = {title: [row for row in _rows(kind) if row[0] in offered] for title, kind in kinds.items()}
    sections = [section(title, found) for title, found in rows.items() if found]
    return "\n\n".join([USAGE, inspect.getdoc(protocol_class), *sections])


def _indents(first: str) -> dict[str, str]:
    return {"initial_indent": first, "subsequent_indent": " " * len(first)}


def _rows(kind: type) -> list[tuple[str, Any, str]]:
    return [
        (f.name, f.default if f.default_factory is MISSING else f.default_factory(), f.metadata["help"])
        for f in dataclasses.fields(kind)
    ]

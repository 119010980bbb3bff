"""One measurement: a protocol, a checkpoint's encoder and data give a `Result`, which says what it was measured on.

    from hf_mim.evaluation.measure import Evaluation

    evaluation = Evaluation("knn", "runs/textures_mae", {"dataset": "textures", "k": 5})  # checks everything
    evaluation().save("knn.json")

Three dataclasses have the options of a measurement: `EncoderArguments`, the one of the images that the protocol needs
(`data_arguments.NEEDS`), and the protocol itself. `measure` does the same for an encoder and images that are loaded
already.
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import torch

from hf_mim.checks import check_statistics, least
from hf_mim.data.contents import count_copies, short_hash
from hf_mim.data.fingerprint import absolute_source
from hf_mim.data.sources import source_name
from hf_mim.docstrings import argument_texts
from hf_mim.evaluation import load_protocol
from hf_mim.evaluation.cache import default_cache, fingerprint, image_digests
from hf_mim.evaluation.checkpoint import check_unchanged, checkpoint_sha256
from hf_mim.evaluation.data_arguments import NEEDS
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.folds import CrossValidation
from hf_mim.evaluation.predictions import Predictions
from hf_mim.evaluation.raw_pixels import RawPixels
from hf_mim.evaluation.result import NotKept, Result


@dataclass
class EncoderArguments:
    """How the encoder is loaded and run.

    Args:
        image_size: side, or height,width, to which images are resized; default: the checkpoint's own
        image_mean, image_std: one value for each channel; default: the image processor's
        modalities: those that the encoder reads, such as rgb; the others are masked; default: all, or the checkpoint's
        trust_remote_code: run the Python that CHECKPOINT brings along; read it first
        untrained: take the same architecture with random weights, to compare
        untrained_seed: of these weights
        pixels: take the pixels that the encoder sees, at most 32x32 of them, as features, to compare
        dtype: bfloat16 computes by autocast
        device: default: the accelerator if there is one, otherwise the CPU
        extract_batch_size: images at a time; changes no feature
        num_workers: processes that decode
        cache: folder in which features are kept (default: ~/.cache/hf_mim/features), or none
        output: file of the result; default: in CHECKPOINT/results

    Raises:
        ValueError: a value outside its range, in one line that names the argument.
    """

    image_size: int | list[int] | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    modalities: list[str] | None = None
    trust_remote_code: bool = False
    untrained: bool = False
    untrained_seed: int = 0
    pixels: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str | None = None
    extract_batch_size: int = 64
    num_workers: int = 0
    cache: str = "default"
    output: str | None = None

    def __post_init__(self):
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise ValueError(f"image_size must be a side or height,width, not {self.image_size}")
        least(1, extract_batch_size=self.extract_batch_size)
        least(0, num_workers=self.num_workers)
        least(0, untrained_seed=self.untrained_seed)
        if self.untrained_seed and not self.untrained:
            raise ValueError("untrained_seed must be given together with untrained")
        if self.pixels and self.untrained:
            raise ValueError("pixels cannot be given together with untrained; give one of them")
        check_statistics(self.image_mean, self.image_std)
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError):  # unknown to torch, or not in this machine
                raise ValueError(f"device must be one that this machine has, such as cpu, not {self.device}") from None

    def extractor(self, checkpoint: str, crop, kind: type[FrozenEncoder] = FrozenEncoder) -> FeatureExtractor:
        """The checkpoint's encoder, of this kind, ready to extract features."""
        size = tuple(self.image_size) if isinstance(self.image_size, list) else self.image_size
        dtype = getattr(torch, self.dtype)
        statistics = self.image_mean, self.image_std
        encoder = kind.load(checkpoint, size, self.device, dtype, *statistics, self.trust_remote_code)
        if self.modalities is not None:
            encoder.read_only(self.modalities)
        if self.untrained:
            encoder = encoder.untrained(self.untrained_seed)
        elif self.pixels:
            encoder = RawPixels.of(encoder)
        cache = default_cache() if self.cache == "default" else None if self.cache == "none" else Path(self.cache)
        return FeatureExtractor(encoder, self.extract_batch_size, self.num_workers, cache, crop)


# Options that change no number. The names of files have the data anyway.
UNDECIDING = {"device", "extract_batch_size", "num_workers", "cache", "output", "output_dir", "beside"}
UNNAMED = UNDECIDING | {"dataset", "test"}
OF_THE_WRITER = ("_name_or_path", "transformers_version", "auto_map")  # in a config: who wrote it, where and with what


class Evaluation:
    """One measurement, ready to start.

    Args:
        protocol: a name in `hf_mim.evaluation.PROTOCOLS`.
        checkpoint: a folder, or a name on the Hub.
        values: name → value of options; `option_types` has their names and types.

    Raises:
        ValueError: in one line, before any work, if the measurement cannot be made.
    """

    def __init__(self, protocol: str, checkpoint: str, values: dict[str, Any]):
        encoder, source, self.protocol = arguments_of(load_protocol(protocol), values)
        self.checkpoint = checkpoint
        self._arguments = self.protocol, source, encoder
        self.extract = encoder.extractor(checkpoint, source.crop())
        self.splits = source.load()

    def __call__(self) -> Result:
        """Measure. Raises NotKept, with the result, if what the protocol keeps beside it cannot be written."""
        result = measure(self._in_folds, self.extract, self.splits, self.checkpoint, self._contents)
        for name, encoder in self._beside():
            result.scores[name] = self._in_folds.run(self.extract.replace(encoder=encoder), *self.splits).value
        return result

    @property
    def _in_folds(self):
        folds = getattr(self._arguments[1], "folds", None)
        return self.protocol if folds is None else CrossValidation(self.protocol, folds)

    def _beside(self) -> Iterator[tuple[str, FrozenEncoder | RawPixels]]:
        """What the features are compared with, and its name."""
        encoder, unused = self.extract.encoder, getattr(type(self.protocol), "unused", ())
        is_trained = isinstance(encoder, FrozenEncoder) and not encoder.is_untrained
        if getattr(self._arguments[1], "beside", False) and "beside" not in unused and is_trained:
            yield "untrained", encoder.untrained()
            if "pixels" not in unused:
                yield "raw pixels", RawPixels.of(encoder)

    @cached_property
    def _contents(self) -> list[np.ndarray]:
        return [image_digests(split.images, self.extract.cache) for split in self.splits]

    @property
    def names(self) -> list[str]:
        """What the name of the result's file says: the protocol, the data, and the options that are no defaults."""
        source, options = self._arguments[1], []
        for arguments in self._arguments:
            for field in dataclasses.fields(arguments):
                value, default = getattr(arguments, field.name), field.default
                if field.default_factory is not dataclasses.MISSING:
                    default = field.default_factory()
                if field.name not in UNNAMED and value != default:
                    options.append(field.name if value is True else f"{field.name}_{_short(value)}")
        data = filter(None, (getattr(source, name, None) for name in ("dataset", "test")))
        return [type(self.protocol).name, *map(source_name, data), *sorted(options)]

    @property
    def key(self) -> str:
        """8 hexadecimal digits for everything that decides the number: two measurements that differ in the data (by
        place or by content), in a setting or in the encoder have different keys."""
        settings = {
            field.name: getattr(arguments, field.name)
            for arguments in self._arguments
            for field in dataclasses.fields(arguments)
            if field.name not in UNDECIDING
        }
        encoder = self.extract.encoder.describe()
        architecture = encoder.pop("architecture", {})  # raw pixels have none
        about = {
            "protocol": type(self.protocol).name,
            "settings": settings | {name: _place(settings[name]) for name in ("dataset", "test") if name in settings},
            "encoder": {name: value for name, value in encoder.items() if name != "device"},
            "architecture": {name: value for name, value in architecture.items() if name not in OF_THE_WRITER},
            "contents": list(map(short_hash, self._contents)),
        }
        return fingerprint(about)[:8]


def measure(
    protocol,
    extract: FeatureExtractor,
    splits: tuple,
    checkpoint: str | Path,
    contents: list[np.ndarray] | None = None,
) -> Result:
    """Run a protocol on the features of a checkpoint's encoder.

    Args:
        protocol: such as `KNN(k=5)`.
        extract: with the encoder of the checkpoint, its untrained twin, or the pixels that it sees.
        splits: the images that `protocol.run` takes after `extract`.
        checkpoint: folder, or name on the Hub.
        contents: the digests of the images of each split, if they are known already.

    Returns:
        The protocol's result. It also has the checkpoint and its hash (none if its weights were not used), the device,
        the seconds that it took, and, in its settings, how the encoder saw the images and where labels and groups come
        from. Its data have a short hash of what the images hold, and the number of test images that are among the
        training images, byte for byte.

    Raises:
        ValueError: the checkpoint's folder holds other weights by now.
        NotKept: the protocol could not write what it keeps beside the result; the result is in the error.
    """
    if contents is None:
        contents = [image_digests(split.images, extract.cache) for split in splits]
    encoder, failure = extract.encoder, None
    is_pixels = isinstance(encoder, RawPixels)
    sha256 = None if encoder.is_untrained or is_pixels else checkpoint_sha256(checkpoint)
    check_unchanged(checkpoint, encoder.stamps)
    start = time.perf_counter()
    try:
        result = protocol.run(extract, *splits)
    except NotKept as error:
        result, failure = error.result, error
    if result.predicted is not None:
        result.add_predictions(Predictions.of(result.predicted, splits[-1], result.fold_numbers))
    _add_contents(result, contents)
    result.seconds = round(time.perf_counter() - start, 1)
    result.checkpoint, result.device = source_name(checkpoint), str(encoder.device)
    result.checkpoint_sha256 = sha256
    about = how_seen(extract)
    offered = option_types(type(getattr(protocol, "protocol", protocol)))
    result.settings |= {name: value for name, value in about.items() if name in offered}
    result.settings["untrained"] = encoder.is_untrained
    if encoder.is_untrained and "untrained_seed" in offered:
        result.settings["untrained_seed"] = encoder.untrained_seed
    if is_pixels:
        result.settings["pixels"] = True
    result.settings |= where_from(splits)
    if failure is not None:
        raise failure
    return result


def how_seen(extract: FeatureExtractor) -> dict[str, Any]:
    """How the encoder sees the images."""
    encoder, window = extract.encoder, getattr(extract.crop, "pixels", None)
    return {
        "image_size": list(encoder.image_size),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "image_mean": encoder.mean,
        "image_std": encoder.std,
        **({} if encoder.modalities is None else {"modalities": encoder.modalities}),
        **({"crop_fraction": extract.crop.fraction} if window is None else {"crop_pixels": list(window)}),
    }


def where_from(splits: tuple) -> dict[str, str | None]:
    """Where labels and groups come from, as settings of a result: they are part of the protocol."""
    found = {}
    for name in ("labels", "group"):
        texts = dict.fromkeys(getattr(images, name) for images in splits if hasattr(images, name))
        if texts:
            found[name] = ", in the test ".join(map(str, texts)) if len(texts) > 1 else next(iter(texts))
    return found


def _add_contents(result: Result, contents: list[np.ndarray]):
    """Say in the result what the images hold, and how many test images are copies of training images."""
    if len(contents) == 1:
        result.data["contents"] = short_hash(*contents)
    if len(contents) != 2:
        return
    for name, found in zip(("train", "test"), contents, strict=True):
        if name in result.data:  # a protocol may use only one of the two
            result.data[name]["contents"] = short_hash(found)
    if {"train", "test"} <= result.data.keys():
        copies = count_copies(*contents)
        result.data["test"]["copies_of_training_images"] = copies
        if copies:
            result.notes.append(
                f"{copies:,} of the {len(contents[1]):,} test images are training images too, byte for byte."
            )


def _place(source) -> str | None:
    """The real path of a source on this machine; other sources by their names."""
    path = absolute_source(source)
    return os.path.realpath(path) if path is not None and os.path.isabs(path) else path


def _short(value) -> str:
    """An option's value in the name of a file."""
    if isinstance(value, list | tuple):
        return ",".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def arguments_of(protocol: type, values: dict[str, Any]) -> tuple:
    """The options of a measurement, checked, as instances of its `argument_kinds`. Raises ValueError in one line."""
    encoder, source, own = (
        kind(**{name: value for name, value in values.items() if name in field_types(kind)})
        for kind in argument_kinds(protocol)
    )
    if protocol.needs != "nothing" and source.dataset is None:
        raise ValueError(f"dataset must be given: {argument_texts(type(source))['dataset']}")
    return encoder, source, own


def argument_kinds(protocol: type) -> tuple[type, type, type]:
    """The dataclasses with the options of a measurement: those of the encoder, of the images, of the protocol."""
    return EncoderArguments, NEEDS[protocol.needs], protocol


def option_types(protocol: type) -> dict[str, Any]:
    """Name → type of every option, without the options of the encoder that the protocol lists as `unused`."""
    types = {name: hint for kind in argument_kinds(protocol) for name, hint in field_types(kind).items()}
    return {name: hint for name, hint in types.items() if name not in getattr(protocol, "unused", ())}


def field_types(kind: type) -> dict[str, Any]:
    """Name → type of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}

"""One measurement: a protocol, a checkpoint's encoder and data give a `Result`, which says what it was measured on.

    from hf_mim.evaluation.measure import Evaluation

    evaluation = Evaluation("knn", "runs/digits_mae", {"dataset": "digits", "k": 5})  # checks everything
    evaluation().save("knn.json")

Three dataclasses have the options of a measurement: `EncoderArguments`, the one of the images that the protocol needs
(`data_arguments.NEEDS`), and the protocol itself. `measure` does the same for an encoder and images that are loaded
already.
"""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

from hf_mim.checks import check_statistics, least
from hf_mim.data.sources import source_name
from hf_mim.docstrings import argument_texts
from hf_mim.evaluation import load_protocol
from hf_mim.evaluation.cache import default_cache
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.data_arguments import NEEDS
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.result import Result


@dataclass
class EncoderArguments:
    """How the encoder is loaded and run.

    Args:
        image_size: side, or height,width, to which images are resized; default: the checkpoint's own
        image_mean, image_std: one value for each channel; default: the image processor's
        trust_remote_code: run the Python that CHECKPOINT brings along; read it first
        untrained: take the same architecture with random weights, to compare
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
    trust_remote_code: bool = False
    untrained: bool = False
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
        check_statistics(self.image_mean, self.image_std)
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError):  # unknown to torch, or not in this machine
                raise ValueError(f"device must be one that this machine has, such as cpu, not {self.device}") from None

    def extractor(self, checkpoint: str, crop) -> FeatureExtractor:
        """The checkpoint's encoder, ready to extract features."""
        size = tuple(self.image_size) if isinstance(self.image_size, list) else self.image_size
        dtype = getattr(torch, self.dtype)
        statistics = self.image_mean, self.image_std
        encoder = FrozenEncoder.load(checkpoint, size, self.device, dtype, *statistics, self.trust_remote_code)
        if self.untrained:
            encoder = encoder.untrained()
        cache = {"default": default_cache(), "none": None}.get(self.cache, Path(self.cache))
        return FeatureExtractor(encoder, self.extract_batch_size, self.num_workers, cache, crop)


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
        kinds = argument_kinds(protocol_class := load_protocol(protocol))
        encoder, source, self.protocol = (
            kind(**{name: value for name, value in values.items() if name in field_types(kind)}) for kind in kinds
        )
        if protocol_class.needs != "nothing" and source.dataset is None:
            raise ValueError(f"dataset must be given: {argument_texts(type(source))['dataset']}")
        self.checkpoint = checkpoint
        self.extract = encoder.extractor(checkpoint, source.crop())
        self.splits = source.load()

    def __call__(self) -> Result:
        """Measure."""
        return measure(self.protocol, self.extract, self.splits, self.checkpoint)


def measure(protocol, extract: FeatureExtractor, splits: tuple, checkpoint: str | Path) -> Result:
    """Run a protocol on the features of a checkpoint's encoder.

    Args:
        protocol: such as `KNN(k=5)`.
        extract: with the encoder of the checkpoint, or its untrained twin.
        splits: the images that `protocol.run` takes after `extract`.
        checkpoint: folder, or name on the Hub.

    Returns:
        The protocol's result. It also has the checkpoint and its hash (none if untrained), the device, the seconds that
        it took, and, in its settings, how the encoder saw the images and where labels and groups come from.
    """
    start, encoder = time.perf_counter(), extract.encoder
    result = protocol.run(extract, *splits)
    result.seconds = round(time.perf_counter() - start, 1)
    result.checkpoint, result.device = source_name(checkpoint), str(encoder.device)
    result.checkpoint_sha256 = None if encoder.is_untrained else checkpoint_sha256(checkpoint)
    about = {
        "image_size": list(encoder.image_size),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "image_mean": encoder.mean,
        "image_std": encoder.std,
    }
    window = getattr(extract.crop, "pixels", None)
    about |= {"crop_fraction": extract.crop.fraction} if window is None else {"crop_pixels": list(window)}
    offered = option_types(type(protocol))
    result.settings |= {name: value for name, value in about.items() if name in offered}
    result.settings["untrained"] = encoder.is_untrained
    result.settings |= where_from(splits)
    return result


def where_from(splits: tuple) -> dict[str, str | None]:
    """Where labels and groups come from, as settings of a result: they are part of the protocol."""
    found = {}
    for name in ("labels", "group"):
        texts = dict.fromkeys(getattr(images, name) for images in splits if hasattr(images, name))
        if texts:
            found[name] = ", in the test ".join(map(str, texts)) if len(texts) > 1 else next(iter(texts))
    return found


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

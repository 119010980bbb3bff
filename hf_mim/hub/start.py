"""Weights to start from: a checkpoint of ours or of others, for a model of a method.

source = Source.read("runs/photos_mae")
source.settings("latent_mim")    # the model's settings that follow from it
source.fill(model)               # its weights, for another size, patch size or number of channels too
"""

import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_mim import methods
from hf_mim.data.processor import read_processor
from hf_mim.evaluation.checkpoint import checkpoint_sha256, from_hub, load_encoder, load_whole
from hf_mim.files import listed
from hf_mim.hub.convert import NORMALISATION, Conversion, setting_types
from hf_mim.hub.fit import fit_tensor
from hf_mim.hub.foreign import check_parts
from hf_mim.hub.reading import read_checkpoint, read_json
from hf_mim.models.configuration_vit import MIMConfig, pair
from hf_mim.models.target_encoder import ENCODER_FIELDS, online_encoder, target_encoder_config

ADAPTED = ("image_size", "patch_size", "num_channels")  # for these, weights are adapted (`fit.py`)
READ_OUT = ("pooling", "pool_before_norm")


@dataclass
class Source:
    """A checkpoint whose weights a model starts from.

    Attributes:
        name: as it was given.
        sha256: the hash of its weight files.
        model: its weights, as one of our models: pretraining model, classifier or encoder.
        mean, std: the normalisation of the pixels that its encoder was trained with; None if nothing tells.
    """

    name: str
    sha256: str
    model: PreTrainedModel
    mean: list[float] | None
    std: list[float] | None

    @classmethod
    def read(cls, name: str, argument: str = "init_from") -> "Source":
        """From a folder, a file or a name on the Hub: one of our checkpoints, or any that `convert` reads.

        Raises:
            ValueError: in one line that names the argument: there is none, it is damaged, or it has what our encoders
                do not have (a distillation token, RoPE, SwiGLU).
        """
        if not name:
            raise ValueError(f"{argument} must be a checkpoint: a folder, or a name on the Hub; for none leave it out")
        try:
            return cls._read(name)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error

    @classmethod
    def _read(cls, name: str) -> "Source":
        config = _config(name)
        row = next((row for row in methods.rows() if row.config_class.model_type == config.get("model_type")), None)
        if row is not None:
            whole = config.get("architectures") == [row.pretraining_class.__name__]
            model = load_whole(row.pretraining_class, name, part="model") if whole else load_encoder(name)
            known = read_processor(name, model.config.num_channels)
            return cls(name, checkpoint_sha256(name), model, known and known.mean, known and known.std)
        checkpoint = read_checkpoint(name)
        check_parts(checkpoint.state, checkpoint.name, checkpoint.config.get("model_type"))
        converted = Conversion.of(checkpoint)
        hashes = sorted(checkpoint.files.values())
        sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        return cls(name, sha256, converted.model, list(converted.image_mean), list(converted.image_std))

    @property
    def config(self) -> MIMConfig:
        return self.model.config

    def is_whole(self, method: str) -> bool:
        """Whether it has all weights of the method's pretraining model, not only those of an encoder."""
        return type(self.model) is methods.get(method).pretraining_class

    def settings(self, method: str) -> dict[str, Any]:
        """The settings of a method's model that follow from the source: those of its encoder, or all if it is a
        pretraining model of this method.

        Raises ValueError if the method has no such encoder.
        """
        row, names = methods.get(method), [*ENCODER_FIELDS, *ADAPTED, *READ_OUT]
        if self.config.use_cls_token:
            try:
                row.config_class(use_cls_token=True)
            except ValueError as error:
                takes = "it can be a frozen target (--target_from), or start another method, such as latent_mim"
                raise ValueError(
                    f"init_from {self.name} has a CLS token, and method {method} takes none ({error}); {takes}"
                ) from error
        if self.is_whole(method):
            names = setting_types(method).keys() - NORMALISATION.keys()
            if methods.of_config(self.config).name != method:  # a variant of it differs in what makes the variant
                names -= {name for variant in methods.rows(variants=True) for name in variant.settings}
        return {name: getattr(self.config, name) for name in sorted(names)}

    def check(self, config: MIMConfig, argument: str = "init_from"):
        """Raise ValueError unless an encoder with this config can take the weights. It names tensors and settings."""
        wrong = [name for name in ENCODER_FIELDS if getattr(config, name) != getattr(self.config, name)]
        if not wrong:
            return
        with torch.device("meta"):
            wanted = methods.of_config(config).encoder_class(config).state_dict()
        held = self.model.base_model.state_dict()
        adapted = ("position_embeddings.table", "embeddings.projection.weight")
        misfits = [
            f"{name} ({_shape(held.get(name))}, needed {_shape(wanted.get(name))})"
            for name in dict.fromkeys([*held, *wanted])
            if _shape(held.get(name)) != _shape(wanted.get(name)) and not name.endswith(adapted)
        ]
        right = " ".join(f"--{name} {getattr(self.config, name)}" for name in wrong).replace("True", "true")
        tensors = f": {listed(misfits, 3)}" if misfits else ", though its tensors do"
        raise ValueError(
            f"{argument} {self.name} does not fit the settings{tensors}; {right.replace('False', 'false')} would fit, "
            f"or leave out {'size and ' if 'hidden_size' in wrong else ''}these settings"
        )

    def check_target(self, config: MIMConfig):
        """Raise ValueError unless the encoder can be the frozen target of a model with this config."""
        wrong = [name for name in ADAPTED if pair(getattr(config, name)) != pair(getattr(self.config, name))]
        if wrong:
            theirs, ours = (
                f"{_by(one.grid_size)} patches of {_by(one.patch_height_width)} pixels, {one.num_channels} channel"
                f"{'s' * (one.num_channels != 1)}"
                for one in (self.config, config)
            )
            right = " ".join(f"--{name} {_option(getattr(self.config, name))}" for name in wrong)
            raise ValueError(f"target_from {self.name} sees {theirs}, and the run has {ours}; {right} would fit")

    def fill(self, model: PreTrainedModel) -> str:
        """Put the weights into a pretraining model whose encoder `check` accepts. Returns a line that says what was
        taken over, what was adapted and what starts fresh."""
        theirs, ours = self.config, model.config
        if type(self.model) is type(model):
            held = _fitted(self.model, ours)
            taken, fresh = _parted(held, model.state_dict())
            model.load_state_dict(taken, strict=False)
        else:
            online = online_encoder(model)
            fill_encoder(online, self.model.base_model)
            filled = [online, model.target_encoder] if getattr(ours, "target_config", None) else [online]
            for target, source in model.target_pairs() if hasattr(model, "target_pairs") else ():
                target.load_state_dict(source.state_dict())
                filled += [target] if source is online else []
            parts = [(name, part) for name, part in model.named_children() if all(part is not one for one in filled)]
            fresh = [name for name, part in parts if next(part.parameters(), None) is not None]
        line = f"init_from {self.name} ({type(self.model).__name__}, sha256 {self.sha256[:12]}): "
        line += f"{', '.join(fresh)} start{'s' * (len(fresh) == 1)} fresh" if fresh else "all weights are taken over"
        for what, before, now in (
            ("grid", _by(theirs.grid_size), _by(ours.grid_size)),
            ("patch", _by(theirs.patch_height_width), _by(ours.patch_height_width)),
            ("channels", theirs.num_channels, ours.num_channels),
        ):
            line += f"; {what} {before} → {now}" if before != now else ""
        return line


def fill_encoder(encoder: PreTrainedModel, source: PreTrainedModel):
    """Put the weights of one encoder into another, which may have another grid, patch size and number of channels."""
    encoder.load_state_dict(_fitted(source, encoder.config))


def _fitted(source: PreTrainedModel, config: MIMConfig) -> dict[str, torch.Tensor]:
    def of(name: str, config: MIMConfig) -> MIMConfig:
        return target_encoder_config(config) if name.startswith("target_encoder.") else config

    state = source.state_dict()
    return {name: fit_tensor(name, x, of(name, source.config), of(name, config)) for name, x in state.items()}


def _parted(
    held: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(the tensors that a model takes over, the names of its modules that start fresh), from two state dicts.

    Where tensors do not fit, their Linear starts fresh if it is a head (its size follows from the patch), else the
    whole part of the model, because half a decoder is worse than none.
    """
    wrong = [name for name, tensor in wanted.items() if name not in held or held[name].shape != tensor.shape]
    heads = {name.rpartition(".")[0] for name in wrong if name.split(".")[-2:-1] == ["head"]}
    parts = {name.partition(".")[0] for name in wrong if name.rpartition(".")[0] not in heads}
    fresh = sorted(parts | {head for head in heads if head.partition(".")[0] not in parts})
    return {name: held[name] for name in wanted if not any(name.startswith(f"{module}.") for module in fresh)}, fresh


def _config(name: str) -> dict[str, Any]:
    """The content of a source's config.json; {} without one."""
    if Path(name).is_file():
        return {}
    with contextlib.suppress(OSError, ValueError):  # `read_checkpoint` says what is wrong
        folder = Path(name) if Path(name).is_dir() else from_hub(name, ["config.json"])
        return read_json(folder / "config.json")
    return {}


def _shape(tensor: torch.Tensor | None) -> str:
    return "none" if tensor is None else "×".join(map(str, tensor.shape)) or "scalar"


def _option(value) -> str:
    return str(value) if isinstance(value, int) else ",".join(map(str, value))


def _by(sides: tuple[int, int]) -> str:
    return "×".join(map(str, sides))

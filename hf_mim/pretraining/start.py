"""What a run that starts from weights takes from them: settings, weights, and measurements before the first step."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from hf_mim import methods
from hf_mim.hub.convert import setting_types
from hf_mim.hub.start import ADAPTED, Source, fill_encoder
from hf_mim.models.target_encoder import ENCODER_FIELDS
from hf_mim.pretraining.layers import layered
from hf_mim.pretraining.settings import to_type

NOT_WITH_RESUME = ("init_from", "target_from")


def settings_of_sources(*layers: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings that follow from the checkpoint that a run starts from, as a layer below the given ones.

    They are the sizes of the model (and of a frozen target), and, if it has as many channels, the normalisation of the
    pixels. There is no layer if a run starts from nothing.

    Raises:
        ValueError: the checkpoint cannot be read, the method has no such encoder, or the run is resumed.
    """
    given = layered(*layers)
    if str(given.get("resume")).lower() == "true":
        for name in NOT_WITH_RESUME:
            if layers[-1].get(name):
                raise ValueError(
                    f"{name} cannot be given with resume: the run goes on from its own checkpoint; to start a new run "
                    "from these weights, give another output_dir and no resume"
                )
        return []
    if given.get("continue_from"):
        return []  # all settings and weights are those of the other run
    method, found, sources = methods.get(given.get("method", methods.rows()[0].name)).name, {}, []
    if given.get("init_from") is not None:
        sources.append(source := Source.read(given["init_from"]))
        found |= source.settings(method)
        _check_width(source, given)
    if given.get("target_from") is not None:
        sources.append(target := Source.read(given["target_from"], "target_from"))
        found |= _settings_of_target(target, method, layers[-1])
    for source in sources:
        channels = to_type("num_channels", layered(found, given)["num_channels"], int)
        if source.mean is not None and channels == source.config.num_channels and "image_mean" not in given:
            found |= {"image_mean": list(source.mean), "image_std": list(source.std)}
    return [found] if found else []


def _check_width(source: Source, given: dict[str, Any]):
    """Raise ValueError for a width that the heads of the source do not divide: no model has both."""
    width, heads = source.config.hidden_size, source.config.num_attention_heads
    wanted = to_type("hidden_size", given.get("hidden_size", width), int)
    if "num_attention_heads" not in given and wanted % heads:
        raise ValueError(
            f"init_from {source.name} does not fit the settings: its tensors have a width of {width}, not {wanted}; "
            f"--hidden_size {width} would fit, or leave it out"
        )


def _settings_of_target(target: Source, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that follow from a frozen target: its own sizes, those of its images, and no pull on similarities,
    which is there against a collapse."""
    known = setting_types(method)
    if "target_config" not in known:
        others = ", ".join(name for name in methods.names() if "target_config" in setting_types(name))
        raise ValueError(f"target_from is for methods that predict a target network ({others}), not for {method}")
    for name in given:
        if name.startswith("momentum_"):
            raise ValueError(f"{name} does nothing with target_from, whose encoder never moves; leave it out")
    sizes = {name: getattr(target.config, name) for name in ENCODER_FIELDS}
    found = {"target_config": sizes} | {name: getattr(target.config, name) for name in ADAPTED}
    return found | ({"similarity_weight": 0.0} if "similarity_weight" in known else {})


def start_from(run, model: PreTrainedModel, tell: Callable[[str], Any]):
    """Fill a new pretraining model with the weights that the run's arguments name, and note their hashes there.

    tell: called with a line about what was taken over.

    Raises:
        ValueError: they do not fit, or are others than when the recipe was written.
    """
    if run.init_from is not None:
        source = Source.read(run.init_from)
        check_hash(run, "init_from", source)
        source.check(model.config)
        tell(source.fill(model))
    if run.target_from is not None:
        target = Source.read(run.target_from, "target_from")
        check_hash(run, "target_from", target)
        target.check_target(model.config)
        fill_encoder(model.target_encoder, target.model.base_model)
        about = f"{type(target.model).__name__}, sha256 {target.sha256[:12]}"
        tell(f"target_from {target.name} ({about}): its encoder is the target, and never moves")


def check_hash(run, argument: str, source: Source):
    """Note the hash of a source in the run's arguments. Raises ValueError if another one stands there."""
    noted = getattr(run, f"{argument}_sha256")
    if noted not in (None, source.sha256):
        raise ValueError(
            f"{argument} {source.name} has other weights (sha256 {source.sha256[:12]}…) than the recipe names "
            f"({noted[:12]}…); give those of then, or take {argument}_sha256 out of the recipe"
        )
    setattr(run, f"{argument}_sha256", source.sha256)

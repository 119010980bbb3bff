"""What a run that starts from weights takes from them: settings, weights, and measurements before the first step."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from hf_mim import methods
from hf_mim.hub.start import Source
from hf_mim.pretraining.layers import layered
from hf_mim.pretraining.settings import to_type

NOT_WITH_RESUME = ("init_from",)


def settings_of_sources(*layers: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings that follow from the checkpoint that a run starts from, as a layer below the given ones.

    They are the sizes of the model, and, if it has as many channels, the normalisation of the pixels. There is no layer
    if a run starts from nothing.

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
    if given.get("init_from") in (None, "none"):
        return []
    method = methods.get(given.get("method", methods.rows()[0].name)).name
    source = Source.read(given["init_from"])
    found = source.settings(method)
    channels = to_type("num_channels", layered(found, given)["num_channels"], int)
    if source.mean is not None and channels == source.config.num_channels and "image_mean" not in given:
        found |= {"image_mean": list(source.mean), "image_std": list(source.std)}
    return [found]


def start_from(run, model: PreTrainedModel, tell: Callable[[str], Any]):
    """Fill a new pretraining model with the weights that the run's arguments name, and note their hash there.

    tell: called with a line about what was taken over.

    Raises:
        ValueError: they do not fit, or are others than when the recipe was written.
    """
    source = Source.read(run.init_from)
    check_hash(run, "init_from", source)
    source.check(model.config)
    tell(source.fill(model))


def check_hash(run, argument: str, source: Source):
    """Note the hash of a source in the run's arguments. Raises ValueError if another one stands there."""
    noted = getattr(run, f"{argument}_sha256")
    if noted not in (None, source.sha256):
        raise ValueError(
            f"{argument} {source.name} has other weights (sha256 {source.sha256[:12]}…) than the recipe names "
            f"({noted[:12]}…); give those of then, or take {argument}_sha256 out of the recipe"
        )
    setattr(run, f"{argument}_sha256", source.sha256)

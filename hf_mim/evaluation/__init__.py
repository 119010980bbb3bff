"""How good are the features? Each protocol has a file; it takes an encoder and data, and returns a result.

from hf_mim.evaluation import KNN, FeatureExtractor, FrozenEncoder, load_labelled

extract = FeatureExtractor(FrozenEncoder.load("runs/textures_mae"))
print(KNN().run(extract, *load_labelled("textures")))
"""

import importlib
from typing import Any

from hf_mim.checks import one_of

# Protocol → its file and class. It is imported when it is first needed.
PROTOCOLS = {
    "knn": "knn:KNN",
    "leave_one_out": "knn:LeaveOneOut",
    "linear": "linear:Linear",
    "attentive": "attentive:Attentive",
    "lowshot": "lowshot:LowShot",
    "finetune": "finetune:Finetune",
    "segment": "segment:Segment",
    "propagate": "propagate:Propagate",
    "local": "local:Local",
    "health": "health:Health",
}
_NAMES = {place.partition(":")[2]: place for place in PROTOCOLS.values()} | {
    "FeatureExtractor": "features:FeatureExtractor",
    "FeatureSpec": "encoder:FeatureSpec",
    "FrozenEncoder": "encoder:FrozenEncoder",
    "LabelledImages": "hf_mim.data.labelled:LabelledImages",
    "Result": "result:Result",
    "load_labelled": "hf_mim.data.labelled:load_labelled",
}
__all__ = ["PROTOCOLS", "load_protocol", *_NAMES]


def load_protocol(name: str) -> type[Any]:
    """The class of a protocol. Raises ValueError for an unknown name."""
    one_of(PROTOCOLS, protocol=name)
    return __getattr__(PROTOCOLS[name].partition(":")[2])


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    return getattr(importlib.import_module(module if "." in module else f"{__name__}.{module}"), attribute)

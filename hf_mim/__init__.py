"""hf_mim: masked image modeling for Hugging Face. Importing it registers the models with transformers' Auto classes.

Neither torch nor transformers is imported before a name is used.
"""

import importlib

from hf_mim import auto_classes, methods

__version__ = "0.1.0"

# Public name → its module.
_MODULES = {
    name: module
    for method in methods.OURS
    for module, name in (
        text.split(":")
        for text in (method.config, method.encoder, method.pretraining, method.classifier, method.backbone)
    )
}
_MODULES |= dict.fromkeys(("MIMTrainer", "MIMTrainingArguments"), "hf_mim.pretraining.trainer")

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


auto_classes.install()

"""hf_mim: masked image modeling for Hugging Face. Importing it registers the models with transformers' Auto classes.

It does not import torch or transformers. They are imported when a name is first used.
"""

import importlib

from hf_mim import auto_classes, methods

# Public name → its module.
_MODULES = dict.fromkeys(("MIMTrainer", "MIMTrainingArguments"), "hf_mim.pretraining.trainer")
_MODULES |= dict.fromkeys(("pretrain", "evaluate", "embed", "predict"), "hf_mim.front_door")
_MODULES["Run"] = "hf_mim.runs"
_MODULES["open_image"] = "hf_mim.data.opening"
_MODULES["MIMImageProcessor"] = "hf_mim.models.image_processing_mim"
for _row in methods.OURS:
    for _class in (_row.config, _row.encoder, _row.pretraining, _row.classifier, _row.backbone):
        _module, _, _name = _class.partition(":")
        _MODULES[_name] = _module

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version  # not at the top, so that the import is quick

        return version("hf-mim")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


auto_classes.install()

"""hf_mim: masked image modeling for Hugging Face. Importing it registers the models with transformers' Auto classes.

It does not import torch or transformers. They are imported when a name is first used.
"""

import importlib
from typing import TYPE_CHECKING

from hf_mim import auto_classes, methods

# Public name → its module.
_MODULES = dict.fromkeys(("MIMTrainer", "MIMTrainingArguments"), "hf_mim.pretraining.trainer")
_MODULES |= dict.fromkeys(("pretrain", "evaluate", "embed", "predict"), "hf_mim.front_door")
_MODULES["Run"] = "hf_mim.runs"
_MODULES["open_image"] = "hf_mim.data.opening"
_MODULES["MIMImageProcessor"] = "hf_mim.models.image_processing_mim"
for _row in methods.OURS:
    for _class in (_row.config, _row.encoder, _row.pretraining, _row.classifier, _row.backbone):
        _module, _, _name = str(_class).partition(":")
        _MODULES[_name] = _module

__all__ = sorted(_MODULES)

if TYPE_CHECKING:  # the same names for type checkers, which do not run `__getattr__`
    from hf_mim.data.opening import open_image as open_image
    from hf_mim.front_door import embed as embed
    from hf_mim.front_door import evaluate as evaluate
    from hf_mim.front_door import predict as predict
    from hf_mim.front_door import pretrain as pretrain
    from hf_mim.models.configuration_interactive_mim import InteractiveMIMConfig as InteractiveMIMConfig
    from hf_mim.models.configuration_latent_mim import LatentMIMConfig as LatentMIMConfig
    from hf_mim.models.configuration_mae import MAEConfig as MAEConfig
    from hf_mim.models.configuration_stop_jepa import StopJepaConfig as StopJepaConfig
    from hf_mim.models.configuration_sym_mim import SymMIMConfig as SymMIMConfig
    from hf_mim.models.image_processing_mim import MIMImageProcessor as MIMImageProcessor
    from hf_mim.models.modeling_interactive_mim import InteractiveMIMBackbone as InteractiveMIMBackbone
    from hf_mim.models.modeling_interactive_mim import (
        InteractiveMIMForImageClassification as InteractiveMIMForImageClassification,
    )
    from hf_mim.models.modeling_interactive_mim import InteractiveMIMForPreTraining as InteractiveMIMForPreTraining
    from hf_mim.models.modeling_interactive_mim import InteractiveMIMModel as InteractiveMIMModel
    from hf_mim.models.modeling_latent_mim import LatentMIMBackbone as LatentMIMBackbone
    from hf_mim.models.modeling_latent_mim import LatentMIMForImageClassification as LatentMIMForImageClassification
    from hf_mim.models.modeling_latent_mim import LatentMIMForPreTraining as LatentMIMForPreTraining
    from hf_mim.models.modeling_latent_mim import LatentMIMModel as LatentMIMModel
    from hf_mim.models.modeling_mae import MAEBackbone as MAEBackbone
    from hf_mim.models.modeling_mae import MAEForImageClassification as MAEForImageClassification
    from hf_mim.models.modeling_mae import MAEForPreTraining as MAEForPreTraining
    from hf_mim.models.modeling_mae import MAEModel as MAEModel
    from hf_mim.models.modeling_stop_jepa import StopJepaBackbone as StopJepaBackbone
    from hf_mim.models.modeling_stop_jepa import StopJepaForImageClassification as StopJepaForImageClassification
    from hf_mim.models.modeling_stop_jepa import StopJepaForPreTraining as StopJepaForPreTraining
    from hf_mim.models.modeling_stop_jepa import StopJepaModel as StopJepaModel
    from hf_mim.models.modeling_sym_mim import SymMIMBackbone as SymMIMBackbone
    from hf_mim.models.modeling_sym_mim import SymMIMForImageClassification as SymMIMForImageClassification
    from hf_mim.models.modeling_sym_mim import SymMIMForPreTraining as SymMIMForPreTraining
    from hf_mim.models.modeling_sym_mim import SymMIMModel as SymMIMModel
    from hf_mim.pretraining.trainer import MIMTrainer as MIMTrainer
    from hf_mim.pretraining.trainer import MIMTrainingArguments as MIMTrainingArguments
    from hf_mim.runs import Run as Run

    __version__: str


if not TYPE_CHECKING:  # or a misspelled name would have the type Any

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

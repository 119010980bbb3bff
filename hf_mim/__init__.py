"""hf_mim: masked image modeling for Hugging Face. Importing it registers the models with transformers' Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from .models.configuration_latent_mim import LatentMIMConfig
from .models.configuration_mae import MAEConfig
from .models.configuration_stop_jepa import StopJepaConfig
from .models.modeling_latent_mim import (
    LatentMIMBackbone,
    LatentMIMForImageClassification,
    LatentMIMForPreTraining,
    LatentMIMModel,
)
from .models.modeling_mae import MAEBackbone, MAEForImageClassification, MAEForPreTraining, MAEModel
from .models.modeling_stop_jepa import (
    StopJepaBackbone,
    StopJepaForImageClassification,
    StopJepaForPreTraining,
    StopJepaModel,
)

__version__ = "0.1.0"

for _config, _model, _pretraining, _classifier, _backbone in (
    (MAEConfig, MAEModel, MAEForPreTraining, MAEForImageClassification, MAEBackbone),
    (
        LatentMIMConfig,
        LatentMIMModel,
        LatentMIMForPreTraining,
        LatentMIMForImageClassification,
        LatentMIMBackbone,
    ),
    (StopJepaConfig, StopJepaModel, StopJepaForPreTraining, StopJepaForImageClassification, StopJepaBackbone),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForPreTraining.register(_config, _pretraining)
    AutoModelForImageClassification.register(_config, _classifier)
    AutoBackbone.register(_config, _backbone)

__all__ = [
    "LatentMIMBackbone",
    "LatentMIMConfig",
    "LatentMIMForImageClassification",
    "LatentMIMForPreTraining",
    "LatentMIMModel",
    "MAEBackbone",
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEModel",
    "StopJepaBackbone",
    "StopJepaConfig",
    "StopJepaForImageClassification",
    "StopJepaForPreTraining",
    "StopJepaModel",
]

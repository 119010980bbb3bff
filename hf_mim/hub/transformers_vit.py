"""Our encoders as transformers' own: `ViTMAEForPreTraining`, `ViTModel`, `IJepaModel` and their classifiers.

The patch tokens are ours to float precision in each. Two things differ: `ViTMAEModel` masks at random wherever it
runs (`ViTModel.from_pretrained` reads the same folder and does not), and neither model pools by the mean.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_mim.hub import key_tables
from hf_mim.hub.as_linear import as_linear
from hf_mim.models.configuration_vit import MIMConfig
from hf_mim.models.heads import ClassificationHead
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.models.vit import MIMPreTrainedModel


def write_transformers(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write the transformers model that holds `model` exactly; returns how to load it from `{dest}`."""
    exported = as_transformers(model)
    exported.save_pretrained(folder)
    if isinstance(exported, ViTMAEForPreTraining):
        _name_decoder(folder / "model.safetensors")
    return f'transformers.{type(exported).__name__}.from_pretrained("{{dest}}")'


def _name_decoder(weights: Path):
    """Give the decoder's layers the names that both transformers 4 and 5 load. As saved by 5 they have a name that only
    5 knows, and 4 would leave them random."""
    state = {key.replace("decoder_encoder.layer.", "decoder_layers."): x for key, x in load_file(weights).items()}
    save_file(state, weights, {"format": "pt"})


def as_transformers(model: MIMPreTrainedModel) -> PreTrainedModel:
    """MAE with its decoder as `ViTMAEForPreTraining`, where that can be: it needs a CLS token, square images and square
    patches. Any other encoder as `ViTModel`, or without a CLS token as `IJepaModel`; classifiers likewise.

    `ViTModel`'s pooler is set to hand on the normalised CLS token. Raises ValueError for a classifier that pools in a
    way that transformers' do not.
    """
    config, patch_size = model.config, model.config.patch_height_width
    if isinstance(model, MAEForPreTraining) and _fits_vit_mae(config):
        state = key_tables.to_theirs(model.state_dict(), key_tables.VIT_MAE, patch_size)
        return _filled(ViTMAEForPreTraining, ViTMAEConfig(**_sizes(config), **_decoder(config)), state)
    has_cls = config.use_cls_token
    table, config_class, prefix = (
        (key_tables.VIT_HF, ViTConfig, "vit.") if has_cls else (key_tables.IJEPA_HF, IJepaConfig, "ijepa.")
    )
    state = key_tables.to_theirs(model.base_model.state_dict(), table, patch_size)
    if isinstance(model, ClassificationHead):
        _check_pooling(config)
        state = {f"{prefix}{key}": tensor for key, tensor in state.items()}
        state |= {f"classifier.{name}": tensor for name, tensor in as_linear(model.classifier).items()}
        labels = dict(id2label=config.id2label, label2id=config.label2id, problem_type=config.problem_type)
        classifier = ViTForImageClassification if has_cls else IJepaForImageClassification
        return _filled(classifier, config_class(**_sizes(config), **labels), state)
    if not has_cls:
        return _filled(IJepaModel, config_class(**_sizes(config)), state)
    state["pooler.dense.weight"] = torch.eye(config.hidden_size)
    state["pooler.dense.bias"] = torch.zeros(config.hidden_size)
    return _filled(ViTModel, config_class(**_sizes(config), pooler_act="linear"), state)


def _fits_vit_mae(config: MIMConfig) -> bool:
    sides, patch = config.image_height_width, config.patch_height_width
    return config.use_cls_token and len(set(sides)) == len(set(patch)) == 1


def _check_pooling(config: MIMConfig):
    """transformers' ViT classifies by the CLS token, its I-JEPA by the mean of the normalised tokens."""
    reads = "the mean of the patch tokens" + (" before the final norm" if config.pool_before_norm else "")
    if config.use_cls_token and config.pooling != "cls":
        raise ValueError(
            f"transformers' ViTForImageClassification reads the CLS token, and this classifier {reads} "
            f"(pooling={config.pooling}); timm and remote-code can hold it"
        )
    if not config.use_cls_token and config.pool_before_norm:
        raise ValueError(
            f"transformers' IJepaForImageClassification pools normalised tokens, and this classifier reads {reads} "
            "(pool_before_norm=True); timm and remote-code can hold it"
        )


def _sizes(config: MIMConfig) -> dict:
    def size(pair):
        return pair[0] if pair[0] == pair[1] else list(pair)

    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    return {
        **{name: getattr(config, name) for name in (*same, "num_channels")},
        "layer_norm_eps": float(config.layer_norm_eps),
        "image_size": size(config.image_height_width),
        "patch_size": size(config.patch_height_width),
        "qkv_bias": True,
    }


def _decoder(config: MIMConfig) -> dict:
    same = ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads", "norm_pix_loss")
    return {
        **{name: getattr(config, name) for name in same},
        "decoder_intermediate_size": 4 * config.decoder_hidden_size,
        "mask_ratio": float(config.mask_ratio),
    }


def _filled(model_class, config, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A model with these tensors and no others."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model

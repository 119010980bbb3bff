"""Our encoders as transformers' own: `ViTMAEForPreTraining`, `ViTModel`, `IJepaModel` and their classifiers.

Each gives our patch tokens to float precision. Two things differ: `ViTMAEModel` always masks at random
(`ViTModel.from_pretrained` reads the same folder and does not), and neither model pools by the mean.
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
from hf_mim.models.configuration_vit import MIMConfig, pair
from hf_mim.models.heads import ClassificationHead
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.models.vit import MIMPreTrainedModel

# The fields of transformers' configs that have the names and the meaning of ours.
SHARED = (
    "image_size patch_size num_channels hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act "
    "layer_norm_eps num_register_tokens mask_ratio norm_pix_loss "
    "decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads"
).split()


def write_transformers(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write the transformers model that computes what `model` does; returns how to load it from `{dest}`."""
    exported = as_transformers(model)
    exported.save_pretrained(folder)
    if isinstance(exported, ViTMAEForPreTraining):
        _name_decoder(folder / "model.safetensors")
    return f'transformers.{type(exported).__name__}.from_pretrained("{{dest}}")'


def _name_decoder(weights: Path):
    """Give the decoder's layers the names that both transformers 4 and 5 load. transformers 5 saves them under names
    that 4 does not know, and 4 would leave them random."""
    state = {key.replace("decoder_encoder.layer.", "decoder_layers."): x for key, x in load_file(weights).items()}
    save_file(state, weights, {"format": "pt"})


def as_transformers(model: MIMPreTrainedModel) -> PreTrainedModel:
    """MAE with its decoder becomes `ViTMAEForPreTraining` if it has a CLS token, square images, square patches and a
    decoder with self-attention. Any other encoder becomes `ViTModel`, or `IJepaModel` without a CLS token. A classifier
    becomes that of the two.

    `ViTModel`'s pooler is set so that it returns the normalised CLS token. Raises ValueError for an encoder with
    registers, and for a classifier that pools in a way that transformers' classifiers do not.
    """
    config, patch_size = model.config, model.config.patch_height_width
    if config.num_register_tokens:
        raise ValueError(
            f"to must be timm, remote-code or onnx: transformers' ViT has no registers, and this encoder has "
            f"num_register_tokens={config.num_register_tokens}"
        )
    is_square = len(set(config.image_height_width)) == len(set(patch_size)) == 1
    if isinstance(model, MAEForPreTraining) and _is_theirs(config) and is_square:
        state = key_tables.to_theirs(model.state_dict(), key_tables.VIT_MAE, patch_size)
        theirs = _config(ViTMAEConfig, config, decoder_intermediate_size=4 * config.decoder_hidden_size)
        return _filled(ViTMAEForPreTraining, theirs, state)
    table, config_class, encoder, classifier = (
        (key_tables.VIT_HF, ViTConfig, ViTModel, ViTForImageClassification)
        if config.use_cls_token
        else (key_tables.IJEPA_HF, IJepaConfig, IJepaModel, IJepaForImageClassification)
    )
    state = key_tables.to_theirs(model.base_model.plain_state_dict(), table, patch_size)
    if isinstance(model, ClassificationHead):
        _check_pooling(config)
        state = {f"{classifier.base_model_prefix}.{key}": tensor for key, tensor in state.items()}
        state |= {f"classifier.{name}": tensor for name, tensor in model.classifier.as_linear().items()}
        labels = dict(id2label=config.id2label, label2id=config.label2id, problem_type=config.problem_type)
        return _filled(classifier, _config(config_class, config, **labels), state)
    pooler = {}
    if config.use_cls_token:
        pooler = {"pooler_act": "linear"}
        state["pooler.dense.weight"] = torch.eye(config.hidden_size)
        state["pooler.dense.bias"] = torch.zeros(config.hidden_size)
    return _filled(encoder, _config(config_class, config, **pooler), state)


def _is_theirs(config: MIMConfig) -> bool:
    """Whether transformers' MAE has such tokens and such a decoder."""
    return config.use_cls_token and config.decoder_attention == "self"


def _check_pooling(config: MIMConfig):
    """Raise ValueError unless ViT can classify by the CLS token, or I-JEPA by the mean of the normalised tokens."""
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


def _config(config_class: type, ours: MIMConfig, **others):
    """A config of transformers with the fields that it shares with ours, and `others`."""
    defaults = config_class()
    shared = {name: getattr(ours, name) for name in SHARED if hasattr(defaults, name)}
    for name, value in shared.items():
        if name in ("image_size", "patch_size"):
            height, width = pair(value)
            shared[name] = height if height == width else [height, width]
        elif isinstance(getattr(defaults, name), float):  # transformers takes no int there
            shared[name] = float(value)
    return config_class(**shared, qkv_bias=True, **others)


def _filled(model_class, config, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model with these tensors. They must be all that it has."""
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model

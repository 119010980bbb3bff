"""Our encoders as timm's `VisionTransformer`: a folder like those that timm keeps on the Hub."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_mim.data.processor import read_processor, warn_of_scale
from hf_mim.hub import key_tables
from hf_mim.models.configuration_vit import MIMConfig
from hf_mim.models.heads import ClassificationHead
from hf_mim.models.nodata import as_text
from hf_mim.models.vit import MIMPreTrainedModel

# Names of activations, transformers' → timm's.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
NORM_EPS = 1e-6  # the epsilon of timm's ViT, which no config file can change


def write_timm(model: MIMPreTrainedModel, folder: Path, checkpoint) -> str:
    """Write `model.safetensors` and `config.json`; returns how to load them from `{dest}`.

    timm's `model(images)` then gives our `pooler_output`, or a classifier's logits. Its `forward_features` gives our
    `last_hidden_state`, before the final norm if `pool_before_norm` puts the norm after pooling.
    """
    arguments = timm_arguments(model)
    config = {
        "architecture": "vit_base_patch16_224",  # any ViT: its sizes are all overridden
        "num_classes": arguments["num_classes"],
        "num_features": model.config.hidden_size,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": _images(model.config, checkpoint) | {"num_classes": arguments["num_classes"]},
    }
    if isinstance(model, ClassificationHead):
        config["label_names"] = [model.config.id2label[i] for i in range(model.config.num_labels)]
    save_file(timm_state(model), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return 'timm.create_model("local-dir:{dest}", pretrained=True)'


def timm_arguments(model: MIMPreTrainedModel) -> dict:
    """The arguments of timm's `VisionTransformer`. Raises ValueError for a setting that it does not have."""
    config = model.config
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"timm's ViT has no hidden_act {config.hidden_act}; it has {', '.join(ACTIVATIONS)}")
    if config.layer_norm_eps != NORM_EPS:
        raise ValueError(f"timm's ViT has layer_norm_eps {NORM_EPS}, and this checkpoint {config.layer_norm_eps}")
    ratio = config.intermediate_size / config.hidden_size
    if int(config.hidden_size * ratio) != config.intermediate_size:  # timm truncates the product
        ratio = (config.intermediate_size + 0.5) / config.hidden_size
    return {
        "img_size": list(config.image_height_width),
        "patch_size": list(config.patch_height_width),
        "in_chans": config.num_channels,
        "num_classes": config.num_labels if isinstance(model, ClassificationHead) else 0,
        "global_pool": "token" if config.pooling == "cls" else "avg",
        "fc_norm": _pools_first(config),
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "class_token": config.use_cls_token,
        "act_layer": ACTIVATIONS[config.hidden_act],
        **({"reg_tokens": config.num_register_tokens} if config.num_register_tokens else {}),
    }


def timm_state(model: MIMPreTrainedModel) -> dict:
    """The encoder's tensors, and a classifier's, under timm's names."""
    config = model.config
    table = key_tables.TIMM_VIT_CLS if config.use_cls_token else key_tables.TIMM_VIT
    table = [*table, key_tables.REGISTER_TOKENS]
    state = key_tables.to_theirs(model.base_model.plain_state_dict(), table, config.patch_height_width)
    if config.num_register_tokens:  # timm's position table has rows for them
        cls, places = state["pos_embed"].tensor_split([int(config.use_cls_token)], dim=1)
        rows = places.new_zeros(1, config.num_register_tokens, config.hidden_size)
        state["pos_embed"] = torch.cat([cls, rows, places], dim=1)
    if _pools_first(config):
        for name in ("weight", "bias"):
            state[f"fc_norm.{name}"] = state.pop(f"norm.{name}")
    if isinstance(model, ClassificationHead):
        state |= {f"head.{name}": tensor for name, tensor in model.classifier.as_linear().items()}
    return state


def _images(config: MIMConfig, checkpoint) -> dict:
    """How timm prepares images: as our image processor does. Without one: no mean and std.

    Raises ValueError for images that are not of 8 bits, which timm's pipeline does not read.
    """
    known = read_processor(checkpoint, config.num_channels)
    if known and known.value_range and known.value_range.nodata is not None:
        raise ValueError(
            "to must be remote-code or onnx: timm knows no pixels without data, and the images of this checkpoint have "
            f"nodata {as_text(known.value_range.nodata)}"
        )
    if known and known.value_range:
        raise ValueError(
            "to must be remote-code: timm prepares 8-bit images, and those of this checkpoint have values in "
            f"{known.value_range.as_list()}"
        )
    fraction = known.crop_fraction if known else None
    if known and known.crop_pixels:
        warn_of_scale(known.crop_pixels)
        fraction = 1.0
    return {
        "input_size": [config.num_channels, *config.image_height_width],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": fraction or 1.0,
        "crop_mode": "center" if fraction else "squash",
        **({"mean": known.mean, "std": known.std} if known else {}),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _pools_first(config: MIMConfig) -> bool:
    """Whether the final norm must come after pooling. With a CLS token the order changes nothing."""
    return config.pool_before_norm and config.pooling == "mean"

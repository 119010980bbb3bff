"""A tiny model of every vision encoder that `AutoModel` of the installed transformers loads."""

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

LISTS = (
    "MODEL_FOR_IMAGE_MAPPING_NAMES MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES MODEL_FOR_BACKBONE_MAPPING_NAMES "
    "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES"
).split()
MORE = {"aimv2", "cvt", "flava", "radio", "sam", "vjepa2"}
# No tiny model of these can be built here, or there is no encoder of images in it.
LEFT_OUT = {
    "needs natten": {"dinat"},
    "needs timm": {"gemma3n_vision", "timm_backbone", "timm_wrapper", "edgetam_vision_model"},
    "detects objects: its output is queries": {
        "conditional_detr",
        "dab-detr",
        "deformable_detr",
        "detr",
        "table-transformer",
    },
    "has no small size": {"depth_pro", "glm4v_moe_vision", "glm4v_vision", "glm5_next_vision", "glm_ocr_vision"}
    | {"inkling2_vision", "llama4", "mllama", "granite4_vision", "sam2_vision_model"},
    "models pixels as text": {"imagegpt"},
    "takes any input": {"perceiver"},
    "makes speech": {"vits"},
}
SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=64)
SIZES |= dict(patch_size=8, crop_size=64, projection_dim=16, vocab_size=99, embed_dim=8, embedding_size=8)
SIZES |= dict(window_size=2, depth_multiplier=0.25, width_coefficient=0.1, depth_coefficient=0.1)
SIZES |= dict(fusion_hidden_size=16, max_img_size=64)
WIDTHS, ONES, HEADS = [8, 16, 24, 32], [1] * 5, [1, 2, 2, 4]
SEQUENCES = dict(hidden_sizes=WIDTHS, embed_dims=WIDTHS, embed_dim=WIDTHS, depths=ONES, depth=ONES, layer_depths=ONES)
SEQUENCES |= dict(num_attention_heads=HEADS, num_heads=HEADS, stem_channels=[3, 4, 8], stage_num_blocks=ONES)
SEQUENCES |= dict(stage_in_channels=[8, 16, 32, 48], stage_mid_channels=[8] * 4, stage_out_channels=[16, 32, 48, 64])
SEQUENCES |= dict(embed_dim_per_stage=[32] * 4, blocks_per_stage=ONES, num_attention_heads_per_stage=ONES)
SEQUENCES |= dict(backbone_channel_list=[32] * 4, global_attention_blocks=[])
STAGES = dict(patch_size=4)
OWN = {
    "bit": dict(hidden_sizes=[32, 32, 64, 64], embedding_size=32, depths=[1] * 4, num_groups=4),
    "cvt": dict(depth=[1, 2, 10], num_heads=[1, 2, 2]),
    "donut-swin": STAGES,
    "dpt": dict(backbone_out_indices=[0, 1, 2, 3]),
    "efficientnet": dict(hidden_dim=128),
    "focalnet": STAGES,
    "levit": dict(
        hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], key_dim=[8] * 3, depths=[1] * 3, patch_size=16
    ),
    "maskformer-swin": STAGES,
    "mobilevit": dict(patch_size=2, hidden_sizes=[16, 24, 32]),
    "mobilevitv2": dict(patch_size=2, width_multiplier=0.125),
    "siglip2_vision_model": dict(num_patches=64),
    "swin": STAGES,
    "swin2sr": dict(embed_dim=12, depths=[1, 1], num_heads=[2, 2], image_size=64, patch_size=1),
    "swinv2": STAGES,
    "vitdet": dict(pretrain_image_size=64),
    "vjepa2": dict(pred_hidden_size=32, pred_num_attention_heads=4, pred_num_hidden_layers=1),
}
OWN["siglip2"] = {"vision_config": SIZES | OWN["siglip2_vision_model"]}


def model_types() -> list[str]:
    """The types, in `AutoModel`'s table, that tasks of images have, and all whose name says vision."""
    known = set(modeling_auto.MODEL_MAPPING_NAMES)
    found = {name for mapping in LISTS for name in getattr(modeling_auto, mapping)} | MORE
    found |= {name for name in known if "vision" in name or "vit" in name}
    return sorted((found & known) - set().union(*LEFT_OUT.values()))


def small(config: PreTrainedConfig) -> dict:
    """The fields of a config that make a model large, with small values; of configs in it too."""
    fields = {}
    for name, value in vars(config).items():
        if name in SEQUENCES and isinstance(value, list | tuple) and len(value) <= len(SEQUENCES[name]):
            fields[name] = SEQUENCES[name][: len(value)]
        elif isinstance(value, list | tuple) and name in ("image_size", "patch_size"):
            fields[name] = [SIZES[name]] * len(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and name in SIZES:
            fields[name] = SIZES[name]
        elif isinstance(value, PreTrainedConfig):
            fields[name] = small(value) | {"model_type": value.model_type}
    return fields


def build(model_type: str) -> torch.nn.Module:
    config_class = CONFIG_MAPPING[model_type]
    model_class = modeling_auto.MODEL_MAPPING[config_class]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    torch.manual_seed(0)
    return model_class(config_class(**small(config_class()) | OWN.get(model_type, {}))).eval()

"""Parts of other vision transformers that our encoders do not have."""

import re
from collections.abc import Iterable

import torch

from hf_mim.files import listed

# What it is → how its tensors are named in the files of timm, transformers and the authors of DINOv2 and DINOv3.
PARTS = {
    "LayerScale": r"(^|\.)(layer_scale\d?|ls\d)\.|(^|\.)(gamma|lambda)_\d$",
    "registers": r"(^|\.)(reg_token|register_tokens|storage_tokens)$",
    "a distillation token": r"(^|\.)(dist_token|distillation_token)$",
    "RoPE": r"(^|[._])rope|inv_freq|freqs_cis",
    "SwiGLU": r"mlp\.(w12|w1|w2|w3|gate_proj|weights_in|fc1_g)\.",
    "relative positions": r"relative_position|rel_pos",
    "norms of queries and keys": r"(^|[._])[qk]_norm\.",
}
ROPE_TYPES = ("dinov3_vit", "eva02", "vjepa2")  # transformers' types with rotary positions, which have no tensor


def layer_scale_of_ones(state: dict[str, torch.Tensor]) -> list[str]:
    """The names of LayerScale's tensors if all of them are 1, so that they change nothing; else none."""
    names = [key for key in state if re.search(PARTS["LayerScale"], key)]
    return names if all(bool((state[key] == 1).all()) for key in names) else []


def foreign_parts(names: Iterable[str], model_type: str | None = None) -> dict[str, list[str]]:
    """What of `PARTS` a network has → its tensors."""
    names = list(names)
    found = {part: [name for name in names if re.search(pattern, name)] for part, pattern in PARTS.items()}
    return {part: keys for part, keys in found.items() if keys or (part == "RoPE" and model_type in ROPE_TYPES)}


def check_parts(state: dict[str, torch.Tensor], name: str, model_type: str | None = None):
    """Raise a ValueError of one line that names what our encoders do not have, and so would not compute.

    name: the checkpoint, for the message.
    """
    harmless = set(layer_scale_of_ones(state))
    found = foreign_parts((key for key in state if key not in harmless), model_type)
    if found:
        what = ", ".join(f"{part} ({listed(keys, 1)})" if keys else part for part, keys in found.items())
        raise ValueError(f"{name} has {what}, which no encoder here has: its features would be others")

"""Parts of other vision transformers that our encoders do not have."""

import re
from collections.abc import Iterable

import torch

from hf_mim.files import listed

# What it is → how its tensors are named in the files of timm, transformers and the authors of DINOv2 and DINOv3.
PARTS = {
    "LayerScale": r"(^|\.)(layer_scale\d?|ls\d)\.|(^|\.)(gamma|lambda)_\d$",
    "registers with RoPE": r"(^|\.)storage_tokens$",
    "a distillation token": r"(^|\.)(dist_token|distillation_token)$",
    "RoPE": r"(^|[._])rope|inv_freq|freqs_cis",
    "SwiGLU": r"mlp\.(w12|w1|w2|w3|gate_proj|weights_in|fc1_g)\.",
    "relative positions": r"relative_position|rel_pos",
    "norms of queries and keys": r"(^|[._])[qk]_norm\.",
}
ROPE_TYPES = ("dinov3_vit", "eva02", "vjepa2")  # transformers' types with rotary positions, which have no tensor


# LayerScale multiplies what the last Linear of a residual branch gives. The second table has the names of this Linear.
SCALES = re.compile(r"(?P<layer>.*\.\d+)\.(?:ls|layer_scale)(?P<branch>[12])\.(?:gamma|lambda1)")
SCALED = {
    "1": ("attn.proj", "attention.output.dense", "attention.o_proj"),
    "2": ("mlp.fc2", "mlp.weights_out", "mlp.w3"),
}


def fold_layer_scale(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(the tensors of a ViT with its LayerScale multiplied into the Linears before it, the names of its tensors).

    The network computes the same. If one of the scales has no such Linear, nothing is changed.
    """
    folded = dict(state)
    scales = {key: found for key in state if (found := SCALES.fullmatch(key))}
    for key, found in scales.items():
        names = (f"{found['layer']}.{linear}" for linear in SCALED[found["branch"]])
        linear = next((name for name in names if f"{name}.weight" in state and f"{name}.bias" in state), None)
        if linear is None or state[key].shape != state[f"{linear}.bias"].shape:
            return state, []
        scale = folded.pop(key).float()
        folded[f"{linear}.weight"] = state[f"{linear}.weight"].float() * scale[:, None]
        folded[f"{linear}.bias"] = state[f"{linear}.bias"].float() * scale
    return folded, list(scales)


def foreign_parts(names: Iterable[str], model_type: str | None = None) -> dict[str, list[str]]:
    """What of `PARTS` a network has → its tensors."""
    names = list(names)
    found = {part: [name for name in names if re.search(pattern, name)] for part, pattern in PARTS.items()}
    return {part: keys for part, keys in found.items() if keys or (part == "RoPE" and model_type in ROPE_TYPES)}


def check_parts(state: dict[str, torch.Tensor], name: str, model_type: str | None = None):
    """Raise a ValueError of one line that names what our encoders do not have, and so would not compute.

    name: the checkpoint, for the message.
    """
    found = foreign_parts(fold_layer_scale(state)[0], model_type)
    if found:
        what = ", ".join(f"{part} ({listed(keys, 1)})" if keys else part for part, keys in found.items())
        raise ValueError(f"{name} has {what}, which no encoder here has: its features would be others")

"""The sizes of a recognised state dict, read from its shapes.

Shapes do not tell everything. The rest comes from the `config.json` of a folder of transformers or timm, or else from
the papers:

| | not told | value |
|---|---|---|
| all | `num_attention_heads` | those of the published ViT of that width (192: 3, 384: 6, 768: 12, 1024 and more: 16) |
| | `layer_norm_eps` | 1e-6 |
| MAE, Latent MIM | `decoder_num_attention_heads` | 16 for the published width of 512 |
| I-JEPA, StoP | `predictor_num_attention_heads` | the encoder's |
| MAE | `mask_ratio`, `norm_pix_loss` | from the arguments saved in the file; else .75, True |
| MAE's classifiers | `pooling` of a file with `norm` and `head` | "cls" |
| StoP | `position_noise_std` | .25; .2 for the width of ViT-H |
| Latent MIM | `patch_gap`, `mask_ratio`, `temperature`, … | the defaults of `LatentMIMConfig` |

For another width, users must give the number of heads. The grid is the one whose sine-cosine table the file has. If the
file has another table, a square grid is assumed.
"""

import math
import re
from typing import Any

import torch

from hf_mim.files import listed
from hf_mim.hub.recognise import Layout
from hf_mim.models.configuration_vit import SIZES, pair
from hf_mim.models.positions import sincos_table

PUBLISHED_HEADS = {width: heads for width, _, heads, _ in SIZES.values()}
PUBLISHED_DECODER_HEADS = {512: 16}


def infer(layout: Layout, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config fields that the file tells, config fields that are assumed), without those that are given.

    Raises:
        ValueError: a tensor is missing or has another rank, or a field must be given because nothing tells it.
    """
    told, assumed = layout.told, {}
    if "hidden_size" not in told:  # else config.json tells all sizes, and they are checked against the weights later
        sizes = _encoder_sizes(layout, told | given)
        told = sizes | _other_sizes(layout) | told
        if "image_size" not in told | given:
            size, is_told = _image_size(layout, pair(sizes["patch_size"]))
            (told if is_told else assumed)["image_size"] = size
    told = {name: value for name, value in told.items() if name not in given}
    assumed |= _heads(layout, told | given)
    if layout.method == "stop_jepa":
        assumed["position_noise_std"] = 0.2 if (told | given)["hidden_size"] == SIZES["huge"][0] else 0.25
    defaults = layout.config_class()
    assumed |= {name: getattr(defaults, name) for name in ("layer_norm_eps", *layout.assumed)}
    return told, {name: value for name, value in assumed.items() if name not in told | given}


def _row(layout: Layout, ours: str) -> tuple[str, str | None]:
    """(their name, layout) of our tensor, with `{i}` for the layer's number."""
    return next((theirs, kind) for name, theirs, kind in layout.table if name == ours)


def _tensor(layout: Layout, ours: str, rank: int) -> torch.Tensor:
    """The file's tensor under our name; with `{i}` in the name, that of the first layer."""
    key = _row(layout, ours)[0].replace("{i}", "0")
    if key not in layout.state:
        raise ValueError(f"there is no {key} beside {listed(layout.state, 3)}")
    tensor = layout.state[key]
    if tensor.ndim != rank or 0 in tensor.shape:
        raise ValueError(f"{key} must have {rank} axes, not the shape {tuple(tensor.shape)}")
    return tensor


def _depth(layout: Layout, ours: str, parameter: str = "norm1.bias") -> int:
    """How many layers the file has under a prefix of ours. Each of them has this parameter."""
    pattern = re.escape(_row(layout, f"{ours}.{{i}}.{parameter}")[0]).replace(r"\{i\}", r"(\d+)")
    return len({found[1] for found in (re.fullmatch(pattern, key) for key in layout.state) if found})


def _encoder_sizes(layout: Layout, known: dict[str, Any]) -> dict[str, Any]:
    prefix = layout.encoder
    projection = f"{prefix}embeddings.projection.weight"
    if _row(layout, projection)[1] == "conv":
        width, channels, *patch = _tensor(layout, projection, rank=4).shape
    else:
        width, inputs = _tensor(layout, projection, rank=2).shape
        channels, patch = _square_patch(inputs, known)
    return {
        "hidden_size": width,
        "num_hidden_layers": _depth(layout, f"{prefix}layers"),
        "intermediate_size": len(_tensor(layout, f"{prefix}layers.{{i}}.mlp.fc1.bias", rank=1)),
        "num_channels": channels,
        "patch_size": _single(patch),
    }


def _image_size(layout: Layout, patch: tuple[int, int]) -> tuple[int | tuple[int, int], bool]:
    """(image size, whether the positions tell it)."""
    table = f"{layout.encoder}embeddings.position_embeddings.table"
    positions = _tensor(layout, table, rank=3 if _row(layout, table)[1] == "table" else 2).flatten(0, -2)
    num_prefix = any(ours == f"{layout.encoder}embeddings.cls_token" for ours, _, _ in layout.table)
    grid, is_told = find_grid(positions[num_prefix:], layout.config_class.rescaled_positions)
    return _single([count * side for count, side in zip(grid, patch, strict=True)]), is_told


def _square_patch(inputs: int, known: dict[str, Any]) -> tuple[int, list[int]]:
    """(channels, patch height and width) of a Linear patch embedding. Unless given: 3 channels, square patches."""
    channels = known.get("num_channels", 3)
    side = math.isqrt(inputs // channels)
    patch = known.get("patch_size", side)
    patch = [patch, patch] if isinstance(patch, int) else list(patch)
    if len(patch) != 2 or math.prod(patch) * channels != inputs:
        raise ValueError(
            f"patch_size and num_channels must be given so that a patch has {inputs} values, not "
            f"{'×'.join(map(str, [*patch, channels]))}"
        )
    return channels, patch


def _single(pair: list[int]) -> int | tuple[int, int]:
    return pair[0] if pair[0] == pair[1] else tuple(pair)


def find_grid(positions: torch.Tensor, rescaled: bool) -> tuple[tuple[int, int], bool]:
    """((rows, columns), True) if positions `[N, D]` are a sine-cosine table, else (a square grid, False).

    Raises:
        ValueError: they are no such table, and N is no square number.
    """
    count, width = positions.shape
    for rows in range(1, count + 1):
        if count % rows or width % 4:
            continue
        grid = (rows, count // rows)
        # Half precision changes values by up to 4e-3, another grid by about 1.
        if torch.allclose(sincos_table(grid, width, rescaled=rescaled), positions.float(), rtol=0, atol=1e-2):
            return grid, True
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"image_size must be given as height,width: {count} learned positions are no square grid")
    return (side, side), False


def _other_sizes(layout: Layout) -> dict[str, Any]:
    """The sizes of decoder or predictor, projector and classifier, if there is one."""
    ours, sizes = {name for name, _, _ in layout.table}, {}
    for part in ("decoder", "predictor"):
        if f"{part}.embed.bias" in ours:
            sizes[f"{part}_hidden_size"] = len(_tensor(layout, f"{part}.embed.bias", rank=1))
            sizes[f"{part}_num_hidden_layers"] = _depth(layout, f"{part}.layers")
    if "projector.linears.{i}.weight" in ours:
        sizes["projector_hidden_size"] = len(_tensor(layout, "projector.linears.{i}.weight", rank=2))
        sizes["projector_num_layers"] = _depth(layout, "projector.linears", "weight")
    if "classifier.linear.bias" in ours:
        sizes["num_labels"] = len(_tensor(layout, "classifier.linear.bias", rank=1))
    return sizes


def _heads(layout: Layout, known: dict[str, Any]) -> dict[str, int]:
    """The numbers of attention heads in the papers. Raises ValueError for a width that the papers do not have."""
    heads = {}
    for part, published in (("", PUBLISHED_HEADS), ("decoder_", PUBLISHED_DECODER_HEADS)):
        name, width = f"{part}num_attention_heads", known.get(f"{part}hidden_size")
        if width is None or name in known:
            continue
        if width not in published:
            raise ValueError(
                f"{name} must be given: shapes do not tell it, and {part}hidden_size {width} is none of the papers' "
                f"({', '.join(map(str, published))})"
            )
        heads[name] = published[width]
    if "predictor_hidden_size" in known:
        heads["predictor_num_attention_heads"] = (heads | known)["num_attention_heads"]
    return heads

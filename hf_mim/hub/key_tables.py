"""How the authors' checkpoints name our tensors: one table per source, read in both directions.

A row is `(ours, theirs, layout)`; `{i}` stands for a layer's number. Layouts: None, the tensor is the same; "table",
theirs has a leading batch axis of 1; "conv", theirs is a convolution `[D, C, ph, pw]` where ours is a Linear over
(row, column, channel), `[D, ph·pw·C]`.
"""

import re
from collections.abc import Iterable

import torch

Row = tuple[str, str, str | None]


def _parameters(ours: str, theirs: str, names: Iterable[str] = ("weight", "bias")) -> list[Row]:
    return [(f"{ours}.{name}", f"{theirs}.{name}", None) for name in names]


def _layer(ours: str, theirs: str) -> list[Row]:
    pairs = [("norm1", "norm1"), ("attention.qkv", "attn.qkv"), ("attention.proj", "attn.proj"), ("norm2", "norm2")]
    pairs += [("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")]
    return [row for a, b in pairs for row in _parameters(f"{ours}.{{i}}.{a}", f"{theirs}.{{i}}.{b}")]


def _conv_encoder(ours: str, theirs: str, cls_token: bool) -> list[Row]:
    """A timm-like ViT without its final norm: MAE, I-JEPA, StoP."""
    return [
        (f"{ours}embeddings.projection.weight", f"{theirs}patch_embed.proj.weight", "conv"),
        (f"{ours}embeddings.projection.bias", f"{theirs}patch_embed.proj.bias", None),
        (f"{ours}embeddings.position_embeddings.table", f"{theirs}pos_embed", "table"),
        *([(f"{ours}embeddings.cls_token", f"{theirs}cls_token", None)] if cls_token else []),
        *_layer(f"{ours}layers", f"{theirs}blocks"),
    ]


MAE_ENCODER = [*_conv_encoder("encoder.", "", cls_token=True), *_parameters("encoder.norm", "norm")]

MAE = [
    *MAE_ENCODER,
    *_parameters("decoder.embed", "decoder_embed"),
    ("decoder.mask_token", "mask_token", None),
    ("decoder.position_embeddings.table", "decoder_pos_embed", "table"),
    *_layer("decoder.layers", "decoder_blocks"),
    *_parameters("decoder.norm", "decoder_norm"),
    *_parameters("decoder.head", "decoder_pred"),
]

MAE_CLS_CLASSIFIER = [*MAE_ENCODER, *_parameters("classifier.linear", "head")]

MAE_MEAN_CLASSIFIER = [
    *_conv_encoder("encoder.", "", cls_token=True),
    *_parameters("encoder.norm", "fc_norm"),  # applied after pooling: `pool_before_norm`
    *_parameters("classifier.linear", "head"),
]

MAE_LINEAR_PROBE = [
    *MAE_ENCODER,
    *_parameters("classifier.batch_norm", "head.0", ("running_mean", "running_var", "num_batches_tracked")),
    *_parameters("classifier.linear", "head.1"),
]

I_JEPA = [
    *_conv_encoder("encoder.", "encoder.", cls_token=False),
    *_parameters("encoder.norm", "encoder.norm"),
    *_conv_encoder("target_encoder.", "target_encoder.", cls_token=False),
    *_parameters("target_encoder.norm", "target_encoder.norm"),
    *_parameters("predictor.embed", "predictor.predictor_embed"),
    ("predictor.mask_token", "predictor.mask_token", None),
    ("predictor.position_embeddings.table", "predictor.predictor_pos_embed", "table"),
    *_layer("predictor.layers", "predictor.predictor_blocks"),
    *_parameters("predictor.norm", "predictor.predictor_norm"),
    *_parameters("predictor.head", "predictor.predictor_proj"),
]

# StoP's files have I-JEPA's keys, and a mask token that its code never reads: `use_mask_token=False`.
STOP = [row for row in I_JEPA if row[0] != "predictor.mask_token"]
STOP_UNREAD = ("predictor.mask_token",)


def _latent_mim_encoder(prefix: str) -> list[Row]:
    projector = f"{prefix.replace('encoder', '')}projector"
    return [
        *_parameters(f"{prefix}.embeddings.projection", f"{prefix}.embed.proj"),
        (f"{prefix}.embeddings.position_embeddings.table", f"{prefix}.pos_embed.pos_embeds", None),
        (f"{prefix}.embeddings.cls_token", f"{prefix}.cls_token", None),
        *_layer(f"{prefix}.layers", f"{prefix}.blocks"),
        *_parameters(f"{prefix}.norm", f"{prefix}.norm"),
        (f"{projector}.linears.{{i}}.weight", f"{prefix}.head.linear{{i}}.weight", None),
        *_parameters(f"{projector}.norms.{{i}}", f"{prefix}.head.norm{{i}}"),
    ]


LATENT_MIM = [
    *_latent_mim_encoder("encoder"),
    *_latent_mim_encoder("target_encoder"),
    *_parameters("decoder.embed", "decoder.embed"),
    ("decoder.mask_token", "decoder.mask_token", None),
    ("decoder.cls_token", "decoder.cls_token", None),
    ("decoder.position_embeddings.table", "decoder.pos_embed.pos_embeds", None),
    *[
        row
        for ours, theirs in (
            ("norm1", "norm1"),
            ("self_attention.qkv", "self_attn.qkv"),
            ("self_attention.proj", "self_attn.proj"),
            ("norm2_queries", "norm2q"),
            ("norm2_memory", "norm2kv"),
            ("cross_attention.q", "cross_attn.q_proj"),
            ("cross_attention.kv", "cross_attn.kv_proj"),
            ("cross_attention.proj", "cross_attn.proj"),
            ("norm3", "norm3"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        )
        for row in _parameters(f"decoder.layers.{{i}}.{ours}", f"decoder.blocks.{{i}}.{theirs}")
    ],
    *_parameters("decoder.norm", "decoder.norm"),
    *_parameters("decoder.head", "decoder.head"),
]


def _match(pattern: str, key: str) -> str | None:
    """The layer number in `key` ("" if the pattern has none), or None where it is another key."""
    found = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)"), key)
    return None if found is None else "".join(found.groups())


def _rename(state: dict[str, torch.Tensor], table: list[tuple], change_layout) -> dict[str, torch.Tensor]:
    renamed, unknown = {}, []
    for key, tensor in state.items():
        for source, destination, layout in table:
            number = _match(source, key)
            if number is not None:
                renamed[destination.replace("{i}", number)] = change_layout(tensor, layout)
                break
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"keys that the table does not know: {', '.join(sorted(unknown))}")
    return renamed


def to_ours(state: dict[str, torch.Tensor], table: list[Row]) -> dict[str, torch.Tensor]:
    """The authors' tensors under our names. Raises ValueError, listing them, for keys that the table does not know."""

    def change_layout(tensor, layout):
        if layout == "conv":
            return tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
        return tensor[0] if layout == "table" else tensor

    return _rename(state, [(theirs, ours, layout) for ours, theirs, layout in table], change_layout)


def to_theirs(state: dict[str, torch.Tensor], table: list[Row], patch_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The inverse of `to_ours`; `patch_size` (height, width) gives the convolution its shape."""

    def change_layout(tensor, layout):
        if layout == "conv":
            return tensor.unflatten(1, (*patch_size, -1)).permute(0, 3, 1, 2).contiguous()
        return tensor[None] if layout == "table" else tensor

    return _rename(state, table, change_layout)

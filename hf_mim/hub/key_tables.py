"""How other code names the tensors of our checkpoints: one table per source, read in both directions.

A row is `(ours, theirs, layout)`; `{i}` stands for a layer's number. The layouts:
- None: the tensor is the same.
- "table": theirs has a leading batch axis of 1.
- "conv": theirs is a convolution `[D, C, ph, pw]`, ours a Linear over (row, column, channel), `[D, ph·pw·C]`.
- "q", "k", "v": theirs is that third of our fused `qkv`.

The tables, ours ↔ theirs:
- `MAE`, `I_JEPA`, `STOP`, `LATENT_MIM`: the pretraining model ↔ the authors' file.
- `MAE_ENCODER`: the encoder in MAE's pretraining model ↔ the authors' file without a decoder.
- `MAE_CLS_CLASSIFIER`, `MAE_MEAN_CLASSIFIER`, `MAE_LINEAR_PROBE`: MAE's classifier ↔ the authors' files.
- `TIMM_VIT_CLS`, `TIMM_VIT`: an encoder with, without a CLS token ↔ timm's `VisionTransformer` without its head.
- `VIT_HF` = `VIT_MAE_ENCODER`: an encoder with a CLS token ↔ `ViTModel` without pooler, `ViTMAEModel`.
- `DINOV2_HF`: an encoder with a CLS token ↔ `Dinov2Model` without LayerScale; `DINOV2_REGISTERS_HF`: the same with
  registers ↔ `Dinov2WithRegistersModel`. `foreign.py` multiplies LayerScale into the weights before.
- `IJEPA_HF`: an encoder without a CLS token ↔ `IJepaModel`.
- `VIT_MAE`: `MAEForPreTraining` ↔ `ViTMAEForPreTraining`.

"An encoder" is the state of `MAEModel`, `LatentMIMModel` or `StopJepaModel`, without a prefix. `within(table, ours,
theirs)` is the same table with a prefix on either side. The tables of transformers have the names of its modules (5.x).
Its files keep the names of 4.x, and `module_names` translates them.
"""

import re
from collections.abc import Iterable, Iterator

import torch

Row = tuple[str, str, str | None]


def _parameters(ours: str, theirs: str, names: Iterable[str] = ("weight", "bias")) -> list[Row]:
    return [(f"{ours}.{name}", f"{theirs}.{name}", None) for name in names]


# The modules of a layer that have a weight and a bias, ours → theirs.
MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
TIMM_LAYER = {"norm1": "norm1", "attention.qkv": "attn.qkv", "attention.proj": "attn.proj", "norm2": "norm2"} | MLP
TRANSFORMERS_LAYER = {
    "norm1": "layernorm_before",
    "attention.proj": "attention.o_proj",
    "norm2": "layernorm_after",
} | MLP
CROSS_ATTENTION_LAYER = MLP | {
    "norm1": "norm1",
    "self_attention.qkv": "self_attn.qkv",
    "self_attention.proj": "self_attn.proj",
    "norm2_queries": "norm2q",
    "norm2_memory": "norm2kv",
    "cross_attention.q": "cross_attn.q_proj",
    "cross_attention.kv": "cross_attn.kv_proj",
    "cross_attention.proj": "cross_attn.proj",
    "norm3": "norm3",
}


def _layers(ours: str, theirs: str, modules: dict[str, str] = TIMM_LAYER) -> list[Row]:
    return [row for a, b in modules.items() for row in _parameters(f"{ours}.{{i}}.{a}", f"{theirs}.{{i}}.{b}")]


def within(table: list[Row], ours: str, theirs: str) -> list[Row]:
    """The table for tensors that have a prefix on each side, such as "encoder." or ""."""
    return [(f"{ours}{a}", f"{theirs}{b}", layout) for a, b, layout in table]


def _timm_vit(norm: str) -> list[Row]:
    """timm's ViT without a CLS token. MAE, I-JEPA and StoP use its names."""
    return [
        ("embeddings.projection.weight", "patch_embed.proj.weight", "conv"),
        ("embeddings.projection.bias", "patch_embed.proj.bias", None),
        ("embeddings.position_embeddings.table", "pos_embed", "table"),
        *_layers("layers", "blocks"),
        *_parameters("norm", norm),
    ]


CLS_TOKEN = ("embeddings.cls_token", "cls_token", None)
TIMM_VIT = _timm_vit("norm")
REGISTER_TOKENS = ("embeddings.register_tokens", "reg_token", None)
TIMM_VIT_CLS = [*TIMM_VIT, CLS_TOKEN]

MAE_ENCODER = within(TIMM_VIT_CLS, "encoder.", "")

MAE = [
    *MAE_ENCODER,
    *_parameters("decoder.embed", "decoder_embed"),
    ("decoder.mask_token", "mask_token", None),
    ("decoder.position_embeddings.table", "decoder_pos_embed", "table"),
    *_layers("decoder.layers", "decoder_blocks"),
    *_parameters("decoder.norm", "decoder_norm"),
    *_parameters("decoder.head", "decoder_pred"),
]

MAE_CLS_CLASSIFIER = [*MAE_ENCODER, *_parameters("classifier.linear", "head")]

MAE_MEAN_CLASSIFIER = [
    *within([*_timm_vit("fc_norm"), CLS_TOKEN], "encoder.", ""),  # their norm comes after pooling: `pool_before_norm`
    *_parameters("classifier.linear", "head"),
]

MAE_LINEAR_PROBE = [
    *MAE_ENCODER,
    *_parameters("classifier.batch_norm", "head.0", ("running_mean", "running_var", "num_batches_tracked")),
    *_parameters("classifier.linear", "head.1"),
]

I_JEPA = [
    *within(TIMM_VIT, "encoder.", "encoder."),
    *within(TIMM_VIT, "target_encoder.", "target_encoder."),
    *_parameters("predictor.embed", "predictor.predictor_embed"),
    ("predictor.mask_token", "predictor.mask_token", None),
    ("predictor.position_embeddings.table", "predictor.predictor_pos_embed", "table"),
    *_layers("predictor.layers", "predictor.predictor_blocks"),
    *_parameters("predictor.norm", "predictor.predictor_norm"),
    *_parameters("predictor.head", "predictor.predictor_proj"),
]

# StoP's files have the keys of I-JEPA, also a mask token. StoP's code never reads it: `use_mask_token=False`.
STOP = [row for row in I_JEPA if row[0] != "predictor.mask_token"]
STOP_UNREAD = ("predictor.mask_token",)


def _latent_mim_encoder(prefix: str) -> list[Row]:
    projector = f"{prefix.replace('encoder', '')}projector"
    return [
        *_parameters(f"{prefix}.embeddings.projection", f"{prefix}.embed.proj"),
        (f"{prefix}.embeddings.position_embeddings.table", f"{prefix}.pos_embed.pos_embeds", None),
        (f"{prefix}.embeddings.cls_token", f"{prefix}.cls_token", None),
        *_layers(f"{prefix}.layers", f"{prefix}.blocks"),
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
    *_layers("decoder.layers", "decoder.blocks", CROSS_ATTENTION_LAYER),
    *_parameters("decoder.norm", "decoder.norm"),
    *_parameters("decoder.head", "decoder.head"),
]


def _transformers_layers(ours: str, theirs: str, modules: dict[str, str] = TRANSFORMERS_LAYER) -> list[Row]:
    attention = f"{ours}.{{i}}.attention.qkv", f"{theirs}.{{i}}.attention"
    qkv = [
        (f"{attention[0]}.{name}", f"{attention[1]}.{part}_proj.{name}", part)
        for part in "qkv"
        for name in ("weight", "bias")
    ]
    return qkv + _layers(ours, theirs, modules)


IJEPA_HF = [
    ("embeddings.projection.weight", "embeddings.patch_embeddings.projection.weight", "conv"),
    ("embeddings.projection.bias", "embeddings.patch_embeddings.projection.bias", None),
    ("embeddings.position_embeddings.table", "embeddings.position_embeddings", "table"),
    *_transformers_layers("layers", "layers"),
    *_parameters("norm", "layernorm"),
]

VIT_HF = VIT_MAE_ENCODER = [*IJEPA_HF, ("embeddings.cls_token", "embeddings.cls_token", None)]

DINOV2_HF = [row for row in VIT_HF if not row[0].startswith("layers")]
DINOV2_HF += _transformers_layers("layers", "layers", TRANSFORMERS_LAYER | {"norm1": "norm1", "norm2": "norm2"})
DINOV2_REGISTERS_HF = [*DINOV2_HF, ("embeddings.register_tokens", "embeddings.register_tokens", None)]

VIT_MAE = [
    *within(VIT_MAE_ENCODER, "encoder.", "vit."),
    *_parameters("decoder.embed", "decoder.decoder_embed"),
    ("decoder.mask_token", "decoder.mask_token", None),
    ("decoder.position_embeddings.table", "decoder.decoder_pos_embed", "table"),
    *_transformers_layers("decoder.layers", "decoder.decoder_layers"),
    *_parameters("decoder.norm", "decoder.decoder_norm"),
    *_parameters("decoder.head", "decoder.decoder_pred"),
]

# Names in transformers' files of these models → names of its modules. transformers 5 writes the old names by rules that
# also hit the decoder: its files have "decoder_encoder.layer." where those of 4.x have "decoder_layers.".
FILE_NAMES = (
    ("decoder_encoder.layer.", "decoder_layers."),
    ("encoder.layer.", "layers."),
    ("attention.attention.query.", "attention.q_proj."),
    ("attention.attention.key.", "attention.k_proj."),
    ("attention.attention.value.", "attention.v_proj."),
    ("attention.output.dense.", "attention.o_proj."),
    ("intermediate.dense.", "mlp.fc1."),
    ("output.dense.", "mlp.fc2."),
)


def module_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a transformers file under the names of its modules. Keys that have these names already stay."""
    renamed = {}
    for key, tensor in state.items():
        for in_files, in_modules in FILE_NAMES:
            key = key.replace(in_files, in_modules)
        renamed[key] = tensor
    return renamed


def _match(pattern: str, key: str) -> str | None:
    """The layer number in `key` ("" if the pattern has none), or None if the key does not match."""
    found = re.fullmatch(re.escape(pattern).replace(r"\{i\}", r"(\d+)"), key)
    return None if found is None else "".join(found.groups())


def _rows(state: dict[str, torch.Tensor], table: list[tuple]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(key under its other name, layout, tensor) of every row that a key matches. ValueError for unknown keys."""
    unknown = []
    for key, tensor in state.items():
        matches = [(destination, layout, _match(source, key)) for source, destination, layout in table]
        matches = [match for match in matches if match[2] is not None]
        if not matches:
            unknown.append(key)
        for destination, layout, number in matches:
            yield destination.replace("{i}", number), layout, tensor
    if unknown:
        raise ValueError(f"keys that the table does not know: {', '.join(sorted(unknown))}")


def to_ours(state: dict[str, torch.Tensor], table: list[Row]) -> dict[str, torch.Tensor]:
    """Their tensors under our names. Raises ValueError for keys that the table does not know, with a list of them, and
    if query, key or value is missing."""
    renamed, fused = {}, {}
    for key, layout, tensor in _rows(state, [(theirs, ours, layout) for ours, theirs, layout in table]):
        if layout == "conv":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1).contiguous()
        elif layout == "table":
            tensor = tensor[0]
        elif layout in ("q", "k", "v"):
            fused.setdefault(key, {})[layout] = tensor
            continue
        renamed[key] = tensor
    for key, parts in fused.items():
        if len(parts) < 3:
            raise ValueError(f"{key} needs query, key and value, and there is only {' and '.join(sorted(parts))}")
        renamed[key] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return renamed


def to_theirs(state: dict[str, torch.Tensor], table: list[Row], patch_size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The inverse of `to_ours`; `patch_size` (height, width) gives the convolution its shape."""
    renamed = {}
    for key, layout, tensor in _rows(state, table):
        if layout == "conv":
            tensor = tensor.unflatten(1, (*patch_size, -1)).permute(0, 3, 1, 2).contiguous()
        elif layout == "table":
            tensor = tensor[None]
        elif layout in ("q", "k", "v"):
            tensor = tensor.chunk(3)["qkv".index(layout)].clone()
        renamed[key] = tensor
    return renamed

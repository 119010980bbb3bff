"""The vision transformer (ViT) that the methods share: patches, initialisation, encoder. Its blocks are in `blocks.py`.

Patches are cut before they are embedded, and `encode` takes only the patches that the encoder may see, so a masked
patch costs nothing. After the last block stands a LayerNorm.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import SelfAttention, ViTLayer, vit_layers
from .configuration_vit import MIMConfig
from .linear_layers import input_dtype
from .masking import gather
from .positions import PositionEmbeddings

# The files beside a checkpoint's weights that tell of it: card, settings, pictures, measurements.
BESIDE_WEIGHTS = ("README.md", "*_config.json", "*_state.json", "*.yaml", "*.png", "results/*.json")

# Arguments of the encoder's `forward` that transformers takes for itself, or adds because of the config.
ADDED_BY_TRANSFORMERS = {"output_hidden_states", "output_attentions", "use_cache", "is_causal"}


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """`[B, C, H, W]` → `[B, N, P]`: patches in raster order, each flattened by row, column, channel."""
    batch, channels, height, width = pixel_values.shape
    patch_height, patch_width = patch_size
    if height % patch_height or width % patch_width:
        raise ValueError(f"image sides must be divisible by patch_size {patch_size}, got images of {height}×{width}")
    rows, columns = height // patch_height, width // patch_width
    patches = pixel_values.reshape(batch, channels, rows, patch_height, columns, patch_width)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: torch.Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """`[B, N, P]` → `[B, C, H, W]`, the inverse of `patchify`."""
    batch, (rows, columns), (patch_height, patch_width) = patches.shape[0], grid, patch_size
    patches = patches.reshape(batch, rows, columns, patch_height, patch_width, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, rows * patch_height, columns * patch_width)


@dataclass
class PretrainingOutput(ModelOutput):
    """What every pretraining model returns: the loss [], predictions and targets in the order of target_ids, the ids
    of the pass, and metrics, which are detached scalars on the device. On request hidden_states and attentions of the
    encoder that sees the context (`recording.py`)."""

    loss: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    context_ids: torch.Tensor | None = None
    target_ids: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def are_ids_absent(context_ids, target_ids) -> bool:
    """Whether masks have to be drawn. Raises ValueError if only one kind of ids is given."""
    if (context_ids is None) != (target_ids is None):
        given, missing = ("target_ids", "context_ids") if context_ids is None else ("context_ids", "target_ids")
        raise ValueError(f"context_ids and target_ids must be given together, got {given} without {missing}")
    return context_ids is None


class ViTEmbeddings(nn.Module):
    """Patches `[B, K, P]` and their ids `[B, K]` → tokens `[B, prefix + K, D]`."""

    def __init__(self, config: MIMConfig):
        super().__init__()
        patch_height, patch_width = config.patch_height_width
        self.projection = nn.Linear(patch_height * patch_width * config.num_channels, config.hidden_size)
        width, registers = config.hidden_size, config.num_register_tokens
        self.cls_token = nn.Parameter(torch.empty(1, 1, width)) if config.use_cls_token else None
        self.register_tokens = nn.Parameter(torch.empty(1, registers, width)) if registers else None
        self.position_embeddings = PositionEmbeddings(config, config.hidden_size)

    def forward(self, patches, grid, patch_ids=None):
        dtype = input_dtype(self.projection)
        prefix, places = self.position_embeddings(grid, dtype)
        tokens = self.projection(patches.to(dtype)) + (places if patch_ids is None else places[patch_ids])
        learned = [token for token in (self.cls_token, self.register_tokens) if token is not None]
        if not learned:
            return tokens
        learned = torch.cat(learned, dim=1) + prefix
        return torch.cat([learned.expand(tokens.shape[0], -1, -1), tokens], dim=1)


class MIMPreTrainedModel(PreTrainedModel):
    """Flags and initialisation for every model here. A method adds `config_class` and `base_model_prefix`."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["position_embeddings"]  # a checkpoint must not lose digits of its tables
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTLayer, "attentions": SelfAttention}

    def post_init(self):
        super().post_init()
        layers = (module for module in self.modules() if isinstance(module, GradientCheckpointingLayer))
        self._no_split_modules = {type(layer).__name__ for layer in layers}  # FSDP takes each of them as a unit
        # This has added the encoder's ignore patterns to ours. The encoder ignores the keys of a decoder; a pretraining
        # model must not, because the decoder is its own.
        if hasattr(self, "draw_masks"):
            self._keys_to_ignore_on_load_unexpected = set()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            if self.config.initialization == "xavier":
                init.xavier_uniform_(module.weight)
            else:
                init.trunc_normal_(module.weight, std=self._normal_std(module))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PositionEmbeddings):
            module.init_weights()
        else:
            super()._init_weights(module)  # norms
        for name in ("cls_token", "register_tokens"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                init.normal_(getattr(module, name), std=0.02)
        if isinstance(getattr(module, "mask_token", None), nn.Parameter):
            init.normal_(module.mask_token, std=self.config.mask_token_std)

    def _normal_std(self, linear: nn.Linear) -> float:
        """I-JEPA's .02, divided by sqrt(2·depth) where a residual branch ends.

        I-JEPA chose the patch embedding's .02 for 16×16×3 = 768 inputs (and 14×14×3). With fewer inputs the std grows
        by sqrt(768 / inputs), so that a small patch is not drowned by its position: with 4×4×3 inputs and .02, an
        untrained encoder reaches 25.6 % on CIFAR-10 (20-NN); xavier gives 31 %.
        """
        if getattr(linear, "is_patch_embedding", False) and linear.in_features < 14 * 14 * 3:
            return 0.02 * (768 / linear.in_features) ** 0.5
        return 0.02 / (2 * getattr(linear, "residual_depth", 0.5)) ** 0.5

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        """Also upload the files beside the weights, from the folder that the model was loaded from. transformers alone
        would write an empty card and leave out the image processor."""
        source = Path(self.name_or_path or working_dir)
        code = ["*.py"] if getattr(self.config, "auto_map", None) else []
        for path in (path for pattern in (*BESIDE_WEIGHTS, *code) for path in source.glob(pattern)):
            if path.name.startswith("_"):  # it has paths of this machine
                continue
            copy = Path(working_dir) / path.relative_to(source)
            if not copy.exists() or not copy.samefile(path):
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def check_channels(self, pixel_values):
        channels = self.config.num_channels
        if pixel_values.shape[1] != channels:
            raise ValueError(f"pixel_values must have num_channels={channels} channels, got {pixel_values.shape[1]}")

    def training_masks(self) -> dict:
        """What a pretraining model asks its `draw_masks` for in train mode, beside one mask for each image."""
        return {}

    # The trainer makes the next two calls for every model. A method without a schedule or a target does nothing there.
    def set_progress(self, progress: float):
        """Tell the model how far training is, in [0, 1]; call before each step."""

    def update_target(self, progress: float, skip: torch.Tensor | None = None):
        """Move the target network; call after each optimizer step. Where `skip` (0-dim) is 1, nothing moves."""


class ViTEncoder(MIMPreTrainedModel):
    """The encoder that `AutoModel` loads from a checkpoint of any of the methods.

    A method that embeds patches in its own way names its `embeddings_class`, and in `own_arguments` what its `forward`
    hands on to them.
    """

    embeddings_class = ViTEmbeddings
    own_arguments = ()

    def __init__(self, config: MIMConfig):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.embeddings.projection.is_patch_embedding = True
        self.layers = vit_layers(
            config,
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.intermediate_size,
            config.drop_path_rate,
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns patches into tokens. Accelerate asks for it, to shard it on its own (FSDP2)."""
        return self.embeddings

    def plain_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights of a plain ViT that gives the same features, for packages that know nothing else."""
        return self.state_dict()

    def encode(self, patches, grid, patch_ids=None, **kwargs):
        """Patches `[B, K, P]` at `patch_ids [B, K]` of a `(rows, columns)` grid (default: all, in raster order) →
        normalised tokens `[B, prefix + K, D]`."""
        return self.norm(self.residual_stream(patches, grid, patch_ids, **kwargs))

    def residual_stream(self, patches, grid, patch_ids=None, **kwargs):
        """The tokens of `encode` before the final norm."""
        own = {name: kwargs.pop(name) for name in self.own_arguments if name in kwargs}
        hidden_states = self.embeddings(patches, grid, patch_ids, **own)
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, **kwargs)
        return hidden_states

    def cut(self, pixel_values) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images `[B, C, H, W]` → patches `[B, N, P]` and their grid."""
        self.check_channels(pixel_values)
        patch_size = self.config.patch_height_width
        grid = tuple(side // patch for side, patch in zip(pixel_values.shape[2:], patch_size, strict=True))
        return patchify(pixel_values, patch_size), grid

    def pool(self, tokens):
        """Tokens `[B, prefix + K, D]` → `[B, D]`, by `config.pooling`."""
        return tokens[:, 0] if self.config.pooling == "cls" else tokens[:, self.config.num_prefix_tokens :].mean(dim=1)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values, patch_ids=None, **kwargs) -> BaseModelOutputWithPooling:
        """Encode images: every patch in raster order, or only `patch_ids`. It never masks, not even in train mode.

        Args:
            pixel_values: normalised images `[B, C, H, W]`. The patch size must divide their sides. Positions are
                resampled for a grid that is not the trained one.
            patch_ids: `[B, K]` raster indices of the patches that the encoder sees.

        Returns:
            `last_hidden_state [B, prefix + N, D]` after the final norm, `pooler_output [B, D]`, and on request
            `hidden_states` (the residual stream before each layer and after the last, before the final norm) and
            `attentions` (needs `attn_implementation="eager"`).

        Raises:
            ValueError: a channel count or a side that does not fit the config.
            TypeError: an argument that does not exist.
        """
        if unknown := sorted(kwargs.keys() - ADDED_BY_TRANSFORMERS - {*self.own_arguments}):
            known = "pixel_values, patch_ids, output_hidden_states, output_attentions and return_dict"
            raise TypeError(f"{type(self).__name__}.forward() takes {known}, and no {', '.join(unknown)}")
        patches, grid = self.cut(pixel_values)
        if patch_ids is not None:
            patches = gather(patches, patch_ids)
        stream = self.residual_stream(patches, grid, patch_ids, **kwargs)
        tokens = self.norm(stream)
        pooled = self.norm(self.pool(stream)) if self.config.pool_before_norm else self.pool(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)

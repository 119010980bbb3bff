"""Decoders that more than one method can use."""

import math

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .blocks import MLP, MultiHeadAttention, SelfAttention, run_layers, vit_layers
from .configuration_vit import MIMConfig
from .positions import PositionEmbeddings


class PixelDecoder(nn.Module):
    """Latents of the visible patches and mask tokens → pixels of the masked patches (MAE, arXiv 2111.06377).

    The config has `decoder_hidden_size`, `decoder_num_hidden_layers` and `decoder_num_attention_heads`.
    """

    def __init__(self, config: MIMConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = PositionEmbeddings(config, width)
        self.layers = self.make_layers(config)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, math.prod(config.patch_height_width) * config.num_channels)

    def make_layers(self, config: MIMConfig) -> nn.ModuleList:
        heads = config.decoder_num_attention_heads
        return vit_layers(config, config.decoder_hidden_size, config.decoder_num_hidden_layers, heads)

    def forward(
        self, latents: torch.Tensor, grid: tuple[int, int], context_ids: torch.Tensor, target_ids: torch.Tensor
    ) -> torch.Tensor:
        """Latents `[B, prefix + Nv, D]` of the patches `context_ids [B, Nv]` → predictions `[B, Nm, P]` for
        `target_ids [B, Nm]`.

        The visible patches come first and the masked ones after them. Raster order is not needed, because attention
        does not depend on the order of tokens.
        """
        prefix, places = self.position_embeddings(grid, self.mask_token.dtype)
        context = self.embed(latents) + torch.cat([prefix.expand(len(latents), -1, -1), places[context_ids]], dim=1)
        return self.head(self.norm(self.decode(context, self.mask_token + places[target_ids])))

    def decode(self, context: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The queries `[B, Nm, Dd]` after the layers, in which they see the context `[B, prefix + Nv, Dd]`."""
        return run_layers(self.layers, torch.cat([context, queries], dim=1), num_queries=queries.shape[1])


class CrossAttention(MultiHeadAttention):
    """Queries `[B, Q, D]` attend to a memory `[B, K, D]`."""

    def __init__(self, config: MIMConfig, width: int, heads: int):
        super().__init__(config, width, heads)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attend(self.q(queries), *self.kv(memory).chunk(2, dim=-1))


class CrossAttentionLayer(GradientCheckpointingLayer):
    """Pre-norm block: self-attention among the queries, cross-attention from the queries to the memory, MLP."""

    def __init__(self, config: MIMConfig, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attention = SelfAttention(config, width, heads)
        self.norm2_queries = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm2_memory = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.cross_attention = CrossAttention(config, width, heads)
        self.norm3 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(config, width, 4 * width)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor, num_queries: int | None = None) -> torch.Tensor:
        """Queries `[B, Q, D]`, memory `[B, K, D]` → `[B, Q, D]`, or only the last `num_queries` queries."""
        attended, _ = self.self_attention(self.norm1(queries), num_queries)
        if num_queries is not None:
            queries = queries[:, -num_queries:]
        queries = queries + attended
        queries = queries + self.cross_attention(self.norm2_queries(queries), self.norm2_memory(memory))[0]
        return queries + self.mlp(self.norm3(queries))


class InteractionLayer(GradientCheckpointingLayer):
    """Pre-norm block without self-attention: cross-attention from masked tokens to the visible ones, MLP."""

    def __init__(self, config: MIMConfig, width: int, heads: int):
        super().__init__()
        self.norm1_queries = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm1_memory = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.cross_attention = CrossAttention(config, width, heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(config, width, 4 * width)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """Queries `[B, Q, D]`, memory `[B, K, D]` → `[B, Q, D]`."""
        queries = queries + self.cross_attention(self.norm1_queries(queries), self.norm1_memory(memory))[0]
        return queries + self.mlp(self.norm2(queries))


class CrossPixelDecoder(PixelDecoder):
    """Masked tokens attend to the encoder's tokens, and not to each other, so each is predicted by itself (CrossMAE,
    arXiv 2401.14391, without its weighted sum of the encoder's layers)."""

    def make_layers(self, config: MIMConfig) -> nn.ModuleList:
        sizes = config.decoder_hidden_size, config.decoder_num_attention_heads
        return nn.ModuleList(InteractionLayer(config, *sizes) for _ in range(config.decoder_num_hidden_layers))

    def decode(self, context: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            queries = layer(queries, context)
        return queries

"""Transformer blocks, of which encoders, decoders and predictors are made: pre-norm, one fused `qkv` projection."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vit import MIMConfig
from .linear_layers import is_plain


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for callers that want its weights: `[B, heads, Q, d]` → `[B, Q, heads, d]`, weights."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def sdpa_in_float32(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """`sdpa` in float32, for training in bfloat16 on a CPU: the backward pass in bfloat16 is ten times as slow."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa(module, query.float(), key.float(), value.float(), *args, **kwargs)
    return output.to(query.dtype), None


class MultiHeadAttention(nn.Module):
    """Splits the width into heads and calls the attention backend; subclasses make queries, keys and values."""

    is_causal = False

    def __init__(self, config: MIMConfig, width: int, heads: int):
        super().__init__()
        self.config, self.heads = config, heads
        self.scaling = (width // heads) ** -0.5
        self.proj = nn.Linear(width, width)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Three `[B, tokens, D]` → `[B, Q, D]` and the attention weights, where the backend gives them."""
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        implementation = self.config._attn_implementation
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        slow = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
        if implementation == "sdpa" and slow:
            interface = sdpa_in_float32
        output, weights = interface(self, query, key, value, None, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.proj(output.flatten(2)), weights


class SelfAttention(MultiHeadAttention):
    def __init__(self, config: MIMConfig, width: int, heads: int):
        super().__init__(config, width, heads)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(
        self, hidden_states: torch.Tensor, num_queries: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token is a key and a value; only the last `num_queries` tokens (default: all) are computed."""
        if num_queries is None or not is_plain(self.qkv):
            query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
            query = query if num_queries is None else query[:, -num_queries:]
            return self.attend(query, key, value, **kwargs)
        width = hidden_states.shape[-1]
        weight_q, weight_kv = self.qkv.weight.split([width, 2 * width])
        bias_q, bias_kv = self.qkv.bias.split([width, 2 * width])
        query = nn.functional.linear(hidden_states[:, -num_queries:], weight_q, bias_q)
        return self.attend(query, *nn.functional.linear(hidden_states, weight_kv, bias_kv).chunk(2, dim=-1), **kwargs)


class MLP(nn.Module):
    def __init__(self, config: MIMConfig, width: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(width, intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


def mark_residual_branches(depth: int, *linears: nn.Linear) -> None:
    """Note on the last Linear of each residual branch the number of its layer (from 1): I-JEPA initialises by it."""
    for module in linears:
        module.residual_depth = depth  # type: ignore[assignment]  # torch knows tensors and modules only


class ViTLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block; `depth` counts from 1."""

    def __init__(
        self, config: MIMConfig, width: int, heads: int, intermediate_size: int, depth: int, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = SelfAttention(config, width, heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(config, width, intermediate_size)
        mark_residual_branches(depth, self.attention.proj, self.mlp.fc2)

    def drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        """Stochastic depth: leave the branch out for a random share of the images."""
        if not self.training or self.drop_path_rate == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop_path_rate
        return branch * kept / (1 - self.drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, num_queries: int | None = None, **kwargs: Any) -> torch.Tensor:
        """`[B, tokens, D]` → `[B, tokens, D]`, or only the last `num_queries` tokens."""
        attended, _ = self.attention(self.norm1(hidden_states), num_queries, **kwargs)
        if num_queries is not None:
            hidden_states = hidden_states[:, -num_queries:]
        hidden_states = hidden_states + self.drop_path(attended)
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))


def vit_layers(
    config: MIMConfig,
    width: int,
    depth: int,
    heads: int,
    intermediate_size: int | None = None,
    drop_path_rate: float = 0.0,
) -> nn.ModuleList:
    """A stack of blocks. Their drop path rate grows linearly from 0 to `drop_path_rate`."""
    rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
    mlp = intermediate_size or 4 * width
    return nn.ModuleList(ViTLayer(config, width, heads, mlp, i, rate) for i, rate in enumerate(rates, start=1))


def run_layers(layers: nn.ModuleList, hidden_states: torch.Tensor, num_queries: int) -> torch.Tensor:
    """Run all blocks. The last block computes only the last `num_queries` tokens, because nothing else is read."""
    for layer in layers[:-1]:
        hidden_states = layer(hidden_states)
    return layers[-1](hidden_states, num_queries=num_queries)

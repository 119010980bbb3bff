"""FLOPs of a training step by formula: its matrix products, forward and backward. A multiply-add counts as two.

If both factors of a product have gradients, forward and backward pass cost 3 times the forward pass. They cost 2 times
as much if one factor has none. `trained_encoder_flops` is of both passes, each other function of the forward pass.
Norms, softmax, activations and the optimizer do not count, nor does what gradient checkpointing computes again.
"""

import itertools
import math

from .configuration_vit import MIMConfig


def product_flops(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def linear_flops(tokens: int, *widths: int) -> int:
    """Linears from each of these widths to the next."""
    return sum(product_flops(tokens, inputs, outputs) for inputs, outputs in itertools.pairwise(widths))


def attention_flops(queries: int, keys: int, width: int) -> int:
    """Projections of queries, keys, values and output, and the two products of attention."""
    projections = 2 * linear_flops(queries, width, width) + 2 * linear_flops(keys, width, width)
    return projections + 2 * product_flops(queries, width, keys)


def mlp_flops(tokens: int, width: int) -> int:
    """The MLP of all blocks but the encoder's, 4 times as wide as they are."""
    return linear_flops(tokens, width, 4 * width, width)


def vit_layers_flops(depth: int, tokens: int, width: int, queries: int) -> int:
    """As `blocks.run_layers`: the last block computes only some `queries`."""
    whole, last = (attention_flops(count, tokens, width) + mlp_flops(count, width) for count in (tokens, queries))
    return (depth - 1) * whole + last


def interaction_layers_flops(depth: int, queries: int, memory: int, width: int) -> int:
    """Blocks of cross-attention without self-attention (`decoders.InteractionLayer`)."""
    return depth * (attention_flops(queries, memory, width) + mlp_flops(queries, width))


def patch_values(config: MIMConfig) -> int:
    """How many values a patch has."""
    return math.prod(config.patch_height_width) * config.num_channels


def patch_embedding_flops(config: MIMConfig, patches: int) -> int:
    return linear_flops(patches, patch_values(config), config.hidden_size)


def encoder_flops(config: MIMConfig, patches: int) -> int:
    """The encoder on so many patches of an image."""
    tokens, width = config.num_prefix_tokens + patches, config.hidden_size
    layer = attention_flops(tokens, tokens, width) + linear_flops(tokens, width, config.intermediate_size, width)
    return patch_embedding_flops(config, patches) + config.num_hidden_layers * layer


def trained_encoder_flops(config: MIMConfig, patches: int) -> int:
    """Forward and backward pass of the encoder: pixels have no gradient."""
    return 3 * encoder_flops(config, patches) - patch_embedding_flops(config, patches)


def pixel_decoder_flops(config: MIMConfig, context: int, masked: int) -> int:
    """`decoders.PixelDecoder` on so many visible and masked patches of an image."""
    memory, width = config.num_prefix_tokens + context, config.decoder_hidden_size
    depth = config.decoder_num_hidden_layers
    if getattr(config, "decoder_attention", "self") == "cross":
        layers = interaction_layers_flops(depth, masked, memory, width)
    else:
        layers = vit_layers_flops(depth, memory + masked, width, queries=masked)
    return linear_flops(memory, config.hidden_size, width) + layers + linear_flops(masked, width, patch_values(config))

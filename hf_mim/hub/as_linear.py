"""A classifier as the one Linear that others have."""

import torch

from hf_mim.models.heads import Classifier


def as_linear(classifier: Classifier) -> dict[str, torch.Tensor]:
    """`weight [num_labels, D]` and `bias`; a linear probe's BatchNorm, `(x - mean) / sqrt(var + eps)`, is folded in."""
    weight, bias, norm = classifier.linear.weight.detach(), classifier.linear.bias.detach(), classifier.batch_norm
    if norm is not None:
        scaled = weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight, bias = scaled.to(weight), (bias.double() - scaled @ norm.running_mean.double()).to(bias)
    return {"weight": weight.clone(), "bias": bias.clone()}

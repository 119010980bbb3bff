"""Image classification and backbone, the same for all methods.

Both are mixins that stand before the method's `PreTrainedModel` among the bases. Its `base_model_prefix` names the
encoder, so a pretraining checkpoint loads, and only the classifier is new.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_vit import MIMConfig

if TYPE_CHECKING:
    from .vit import MIMPreTrainedModel as Base  # stands after the mixin among the bases
    from .vit import ViTEncoder
else:
    Base = object


class Classifier(nn.Module):
    """Pooled features `[B, D]` → logits `[B, num_labels]`. With `head_batch_norm`, a BatchNorm without scale and shift
    comes first."""

    def __init__(self, config: MIMConfig) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(config.hidden_size, affine=False, eps=1e-6) if config.head_batch_norm else None
        self.linear = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear(features if self.batch_norm is None else self.batch_norm(features))

    def as_linear(self) -> dict[str, torch.Tensor]:
        """`weight [num_labels, D]` and `bias [num_labels]` of the one Linear that computes the same at evaluation."""
        weight, bias, norm = self.linear.weight.detach(), self.linear.bias.detach(), self.batch_norm
        if norm is not None:  # (x - mean) / sqrt(var + eps) is folded in
            scaled = weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight, bias = scaled.to(weight), (bias.double() - scaled @ norm.running_mean.double()).to(bias)
        return {"weight": weight.clone(), "bias": bias.clone()}


class ClassificationHead(Base):
    """Encoder, pooling, classifier.

    `config.pooling`, `pool_before_norm` and `head_batch_norm` make the three classifiers that MAE publishes:
    ("mean", True, False) and ("cls", False, False) are fine-tuned, ("cls", False, True) is the linear probe.
    """

    if TYPE_CHECKING:
        encoder_class: type[ViTEncoder]

    def __init__(self, config: MIMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        self.classifier = Classifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Images `[B, C, H, W]` (and labels `[B]`) → logits `[B, num_labels]` (and the loss).

        num_items_in_batch: the labels by which the loss is divided, from Trainer; default: those of this batch.
        """
        output = self.base_model(pixel_values, **kwargs)
        logits = self.classifier(output.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


class BackboneHead(BackboneMixin, Base):
    """Feature maps `[B, D, rows, columns]` after chosen layers, each through the final norm."""

    if TYPE_CHECKING:
        encoder_class: type[ViTEncoder]

    def __init__(self, config: MIMConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.encoder_class(config))
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        """Images `[B, C, H, W]` → one map for each of `config.out_features` ("stem", "stage1", …)."""
        encoder: Any = self.base_model
        output = encoder(pixel_values, **kwargs)
        grid = tuple(s // p for s, p in zip(pixel_values.shape[2:], self.config.patch_height_width, strict=True))
        feature_maps = []
        for name, tokens in zip(self.stage_names, output.hidden_states, strict=True):
            if name in self.out_features:
                tokens = encoder.norm(tokens)[:, self.config.num_prefix_tokens :]
                feature_maps.append(tokens.transpose(1, 2).unflatten(-1, grid).contiguous())
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=output.hidden_states, attentions=output.attentions
        )

"""Classifiers to fine-tune, from any checkpoint: load, freeze a part, learning rates by depth, save.

This works for our models and for every other model that transformers can classify with, if its blocks stand in a
`ModuleList`.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

import hf_mim  # noqa: F401 (registers the models)
from hf_mim.checks import share
from hf_mim.evaluation.checkpoint import (
    LOADING_ERRORS,
    blocks_of,
    check_there,
    forget_code,
    load_whole,
    loading_failure,
)
from hf_mim.models.configuration_vit import pair
from hf_mim.trainer_utils import decayed_parameters

UNUSABLE = "holds no encoder that can be fine-tuned"
HEAD_STD = 2e-5  # MAE's: the first predictions are nearly uniform, so the first gradients hardly move the encoder


def load_classifier(
    checkpoint,
    classes: Sequence[str],
    drop_path: float = 0.0,
    blocks: int | None = None,
    untrained: bool = False,
    trust_remote_code: bool = False,
):
    """The encoder of a checkpoint with a new linear classifier on top, as one of our models or of transformers'.

    Our models classify the mean of the patch tokens, taken before the final norm as in MAE's fine-tuning. With
    `blocks=0` it is taken after the norm and goes through a BatchNorm without affine, as in linear probes. Weights are
    float32, whatever type they were saved in.

    Args:
        checkpoint: a folder, or a name on the Hub.
        classes: their names, in the order of the class ids.
        drop_path: stochastic depth of the last block; it grows linearly from 0. Only for models that have it.
        blocks: train only so many of the last blocks (MAE, figure 9), see `freeze_below`; None: everything.
        untrained: take the architecture alone, with new random weights.
        trust_remote_code: run the Python that the checkpoint brings along.

    Raises:
        ValueError: no classifier can be made of the checkpoint, or it lacks weights of the encoder.
    """
    share("[0, 1)", drop_path=drop_path)
    checkpoint = str(checkpoint)
    check_there(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        if not trust_remote_code:
            forget_code(config)
        config.id2label = dict(enumerate(map(str, classes)))
        config.label2id = {name: number for number, name in config.id2label.items()}
        if hasattr(config, "drop_path_rate"):
            config.drop_path_rate = drop_path
        if hasattr(config, "pool_before_norm"):
            config.pooling, config.pool_before_norm, config.head_batch_norm = "mean", blocks != 0, blocks == 0
        model = None
        if untrained:
            options = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
            model = AutoModelForImageClassification.from_config(config, **options)
    except LOADING_ERRORS as error:
        raise ValueError(f"checkpoint {checkpoint} {UNUSABLE}: {loading_failure(error)}") from error
    if model is None:
        options = {"unusable": UNUSABLE, "may_be_new": _is_outside_encoder, "config": config}
        options |= {"trust_remote_code": trust_remote_code}
        model = load_whole(AutoModelForImageClassification, checkpoint, **options)
    encoder = _encoder_prefix(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(encoder):
            nn.init.trunc_normal_(module.weight, std=HEAD_STD)
            nn.init.zeros_(module.bias)
    if blocks is not None:
        freeze_below(model, blocks)
    return model


def _is_outside_encoder(model: nn.Module, key: str) -> bool:
    return not key.startswith(_encoder_prefix(model)) or ".pooler." in key


def parameter_depths(model: nn.Module) -> dict[str, int]:
    """Parameter name → depth: 0 before the blocks, i in block i (from 1), L + 1 after the blocks."""
    name, layers = blocks_of(model)
    depths, depth_outside = {}, 0
    for parameter, _ in model.named_parameters():  # in the order in which the modules were created
        if parameter.startswith(name + "."):
            depths[parameter] = int(parameter[len(name) + 1 :].split(".")[0]) + 1
            depth_outside = len(layers) + 1
        else:
            depths[parameter] = depth_outside
    return depths


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups of the trainable parameters, for an optimizer.

    The learning rate of a group is learning_rate × layer_decay^(L + 1 − depth), see `parameter_depths`. Vectors
    (biases, norms, layer scales), tokens and position tables have no weight decay. This is BEiT's and MAE's rule.

    Raises:
        ValueError: layer_decay outside (0, 1], or a model without a list of layers.
    """
    share("(0, 1]", layer_decay=layer_decay)
    depths, decayed, groups = parameter_depths(model), set(decayed_parameters(model)), {}
    top = len(blocks_of(model)[1]) + 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = learning_rate * layer_decay ** (top - depths[name]), weight_decay if name in decayed else 0.0
            groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()]


def freeze_below(model: nn.Module, blocks: int):
    """Train only the last `blocks` blocks and what follows them; 0: only the classifier; L: everything, embeddings too.

    The frozen part gets no gradient. It always runs in eval mode, without dropout or drop path, even if the model is in
    train mode.

    Raises:
        ValueError: fewer than 0 or more than the model's blocks.
    """
    name, layers = blocks_of(model)
    if not 0 <= blocks <= len(layers):
        raise ValueError(f"blocks must be between 0 (linear probe) and the {len(layers)} of the model, not {blocks!r}")
    if blocks == len(layers):
        return
    depths = parameter_depths(model)
    for parameter_name, parameter in model.named_parameters():
        is_head = not parameter_name.startswith(_encoder_prefix(model))
        parameter.requires_grad_(is_head or depths[parameter_name] > len(layers) - blocks and blocks > 0)
    frozen = set()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen.update(module.modules())

    def before_forward(module, args):  # at each step, because Trainer calls model.train() before each
        for part in frozen:
            part.training = False

    model.register_forward_pre_hook(before_forward)


def save_classifier(model, folder, processor):
    """Save the model and its image processor. `pipeline("image-classification", model=folder)` then names the classes.

    The processor resizes the whole image to `image_size` with PIL. The pipeline makes every image RGB, so it works only
    for models of 3 channels.
    """
    vars(model.config).pop("use_cache", None)  # Trainer adds it for language models; it means nothing here
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def size_options(model, image_size: tuple[int, int]) -> dict:
    """The arguments that `forward` of transformers' ViTs needs for images of another size than the config's."""
    takes_it = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes_it and pair(model.config.image_size) != image_size else {}


def _encoder_prefix(model: nn.Module) -> str:
    """The first part of the names of the encoder's parameters. It is that of the blocks, up to the first dot."""
    return blocks_of(model)[0].split(".")[0] + "."

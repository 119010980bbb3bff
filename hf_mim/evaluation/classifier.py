"""Classifiers to fine-tune, from any checkpoint: load, freeze a part, learning rates by depth, save.

For our models and for any other that transformers can classify with: what is needed of one is that its blocks are in a
`ModuleList`.
"""

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

import hf_mim  # noqa: F401 (registers the models)
from hf_mim.data.processor import image_processor
from hf_mim.evaluation.checkpoint import LOADING_ERRORS, left_over_blocks, quiet
from hf_mim.models.configuration_vit import pair
from hf_mim.trainer_utils import decayed_parameters

HEAD_STD = 2e-5  # MAE's: the first predictions are even, so the first gradients leave the encoder in peace


def load_classifier(
    checkpoint, classes: Sequence[str], drop_path: float = 0.0, blocks: int | None = None, untrained: bool = False
):
    """The encoder of a checkpoint under a new linear classifier, of our models or of transformers.

    Our models pool the mean of the patch tokens before the final norm, as MAE's fine-tuning; with `blocks=0` after it,
    through a BatchNorm without affine, as linear probes. Weights are float32, whatever they were saved in.

    Args:
        checkpoint: a folder, or a name on the Hub.
        classes: their names, in the order of the class ids.
        drop_path: stochastic depth of the last block, growing linearly from 0; for models that have it.
        blocks: train only the last so many blocks (MAE, figure 9), see `freeze_below`; None: everything.
        untrained: take the architecture alone, with new random weights.

    Raises:
        ValueError: no checkpoint that can be classified with, or one that lacks weights of the encoder.
    """
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path must lie in [0, 1), not {drop_path!r}")
    checkpoint = str(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint)
        config.id2label = dict(enumerate(map(str, classes)))
        config.label2id = {name: number for number, name in config.id2label.items()}
        if hasattr(config, "drop_path_rate"):
            config.drop_path_rate = drop_path
        if hasattr(config, "pool_before_norm"):
            config.pooling, config.pool_before_norm, config.head_batch_norm = "mean", blocks != 0, blocks == 0
        if untrained:
            model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        else:
            model = _load(checkpoint, config)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {checkpoint} holds no encoder that can be fine-tuned: {reason}") from error
    encoder = _encoder_prefix(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith(encoder):
            nn.init.trunc_normal_(module.weight, std=HEAD_STD)
            nn.init.zeros_(module.bias)
    if blocks is not None:
        freeze_below(model, blocks)
    return model


def _load(checkpoint: str, config):
    with quiet():  # it reports, at length, that the classifier is new
        model, loading = AutoModelForImageClassification.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    wrong = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    wrong = sorted(key for key in wrong if key.startswith(_encoder_prefix(model)) and ".pooler." not in key)
    if wrong:
        raise ValueError(f"it lacks {len(wrong)} weights of its encoder, such as {wrong[0]}")
    if more := left_over_blocks(model, loading["unexpected_keys"]):
        raise ValueError(f"it has more blocks than its config, such as {more[0]}")
    return model


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the blocks: the longest ModuleList. Of a model in stages it may be a stage, or the list of them.

    Raises:
        ValueError: there is none.
    """
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of layers to tell depth by; it cannot be fine-tuned here")
    return max(found, key=lambda item: len(item[1]))


def parameter_depths(model: nn.Module) -> dict[str, int]:
    """Parameter name → depth: 0 for all that comes before the blocks, i for block i (from 1), L + 1 after them."""
    name, layers = find_layers(model)
    depths, depth_outside = {}, 0
    for parameter, _ in model.named_parameters():  # in the order in which the modules were made
        if parameter.startswith(name + "."):
            depths[parameter] = int(parameter[len(name) + 1 :].split(".")[0]) + 1
            depth_outside = len(layers) + 1
        else:
            depths[parameter] = depth_outside
    return depths


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups for an optimizer: all that trains, learning rate × layer_decay^(L + 1 − depth), see `parameter_depths`.

    Vectors (biases, norms, layer scales), tokens and position tables have no weight decay. BEiT's and MAE's rule.

    Raises:
        ValueError: layer_decay outside (0, 1], or a model without a list of layers.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], not {layer_decay!r}")
    depths, decayed, groups = parameter_depths(model), set(decayed_parameters(model)), {}
    top = len(find_layers(model)[1]) + 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((depths[name], name in decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (top - depth),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in groups.items()
    ]


def freeze_below(model: nn.Module, blocks: int) -> None:
    """Train only the last `blocks` blocks and what follows them; 0: only the classifier; L: everything, embeddings too.

    What is frozen gets no gradient and runs in eval mode, without dropout or drop path, whatever mode the model is in.

    Raises:
        ValueError: fewer than 0 or more than the model's blocks.
    """
    name, layers = find_layers(model)
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

    def before_forward(module, args):  # Trainer calls model.train() before each step
        for part in frozen:
            part.training = False

    model.register_forward_pre_hook(before_forward)


def save_classifier(model, folder, image_size: tuple[int, int], mean, std) -> None:
    """Model and image processor, so that `pipeline("image-classification", model=folder)` works and names the classes.

    The processor brings the whole image to `image_size`, by PIL. The pipeline itself makes every image RGB, so it takes
    only models of 3 channels.
    """
    vars(model.config).pop("use_cache", None)  # Trainer's word to text models
    model.save_pretrained(folder)
    image_processor(image_size, mean, std).save_pretrained(folder)


def size_options(model, image_size: tuple[int, int]) -> dict:
    """What `forward` has to be told for images of another size than the config's: of transformers' ViTs."""
    takes_it = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes_it and pair(model.config.image_size) != image_size else {}


def _encoder_prefix(model: nn.Module) -> str:
    """What the names of the encoder's parameters begin with: where the blocks are, up to the first dot."""
    return find_layers(model)[0].split(".")[0] + "."

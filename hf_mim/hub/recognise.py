"""Finds out from the keys of a state dict what it is: the method, the model class, the key table.

The files of I-JEPA and StoP have the same keys, and their encoders are the same network; only the predictors differ.
Without `method` such a file is taken for I-JEPA.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from hf_mim import methods
from hf_mim.files import one_line
from hf_mim.hub import key_tables
from hf_mim.hub.foreign import fold_layer_scale
from hf_mim.hub.key_tables import Row, module_names, within
from hf_mim.hub.prefixes import choose_prefix
from hf_mim.hub.reading import Checkpoint, check_plain
from hf_mim.hub.timm_vit import ACTIVATIONS
from hf_mim.hub.transformers_vit import SHARED
from hf_mim.models.configuration_vit import MIMConfig, pair

# Dictionaries of the authors' files beside their networks.
BESIDE = ("opt", "optimizer", "scaler", "loss_scaler", "args", "epoch", "loss")
REGISTERS = ("reg_token", "register_tokens")  # timm's name, and that of DINOv2's authors
DINOV2 = ("mae", "latent_mim")
POOLER = ("pooler.dense.weight", "pooler.dense.bias")
# transformers' model types → the methods that each can be, the table, the encoder's prefix, the classifier's pooling.
TRANSFORMERS = {
    "vit_mae": (("mae",), key_tables.VIT_MAE_ENCODER, "vit.", "cls"),
    "vit": (("mae", "latent_mim"), key_tables.VIT_HF, "vit.", "cls"),
    "dinov2": (DINOV2, key_tables.DINOV2_HF, "dinov2.", None),  # its classifier reads CLS and mean
    "dinov2_with_registers": (DINOV2, key_tables.DINOV2_REGISTERS_HF, "dinov2_with_registers.", None),
    "ijepa": (("ijepa", "stop_jepa", "mae", "latent_mim"), key_tables.IJEPA_HF, "ijepa.", "mean"),
}
DINOV2_UNREAD = ("embeddings.mask_token",)  # only for its pretraining


@dataclass
class Layout:
    """A recognised state dict.

    Attributes:
        role: which of the method's models it is: "encoder", "pretraining" or "classifier".
        table: the key table.
        state: the tensors under the names that the table has for others.
        told: config fields whose values follow from the keys or from config.json.
        assumed: the names of config fields whose values nothing tells.
        unread: keys that were left out because they change nothing.
        prefix: what stands before the names in the file.
        others: the prefixes of other networks in the file that could be taken instead.
        tokens: tensors of distillation tokens, which are not taken over.
        folded: tensors of LayerScale, which are multiplied into the weights.
        taken: the names in the file of the tensors that are taken over.
    """

    method: str
    role: str
    table: list[Row]
    state: dict[str, torch.Tensor]
    told: dict[str, Any] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    prefix: str = ""
    others: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(methods.get(self.method), f"{self.role}_class")

    @property
    def config_class(self) -> type[MIMConfig]:
        return methods.get(self.method).config_class

    @property
    def encoder(self) -> str:
        """The prefix of the encoder in our names: "" where it is the whole model."""
        return "" if self.role == "encoder" else f"{self.model_class.base_model_prefix}."


def recognise(checkpoint: Checkpoint, method: str | None = None, prefix: str | None = None, image_size=None) -> Layout:
    """Recognise a checkpoint. `prefix` chooses one of several networks in it (`prefixes.py`). image_size: if it is
    given, a side or (height, width).

    Raises ValueError if it is none that we know, cannot be of this method, or holds several equal networks.
    """
    method = None if method is None else methods.get(method).name
    if checkpoint.config.get("model_type") in [row.config_class.model_type for row in methods.rows()]:
        raise ValueError(f"{checkpoint.name} is a checkpoint of hf_mim already: from_pretrained loads it as it is")
    prefix, others = choose_prefix(checkpoint.state, checkpoint.name, prefix)
    inside = {key.removeprefix(prefix): x for key, x in checkpoint.state.items() if key.startswith(prefix)}
    if prefix == "":  # an optimizer and the like lie beside networks that have no name of their own
        inside = {key: x for key, x in inside.items() if key.partition(".")[0] not in BESIDE}
    state, folded = fold_layer_scale(check_plain(inside, checkpoint.name))
    state, tokens = with_settled_tokens(state, checkpoint.config, image_size)
    layout = _layout(dataclasses.replace(checkpoint, state=state), method)
    layout.prefix, layout.others, layout.tokens, layout.folded = prefix, tuple(others), tokens, tuple(folded)
    layout.taken = tuple(f"{prefix}{key}" for key in inside if key not in {*layout.unread, *tokens})
    return layout


def with_settled_tokens(
    state: dict[str, torch.Tensor], config: dict[str, Any], image_size=None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """(the tensors of a ViT as ours has them, the names of those of a distillation token, which are left out).

    The position table keeps a row for the CLS token, of zeros if it had none, and rows for the patches. A row for the
    distillation token is dropped. Rows for registers are added to the registers themselves, named as in timm. `config`
    is that of timm.

    Raises ValueError if nothing tells how many rows of the table are for patches: timm's has rows for registers or not.
    """
    positions = state.get("pos_embed")
    registers = next((key for key in REGISTERS if key in state), None)
    distilled = ("dist_token",) if "dist_token" in state else ()
    if not (registers or distilled) or positions is None or positions.ndim != 3:
        return state, ()
    has_cls = int("cls_token" in state)
    count = state[registers].shape[-2] if registers and state[registers].ndim == 3 else 0
    all_prefix = has_cls + len(distilled) + count
    possible = [positions.shape[1] - num_prefix for num_prefix in (has_cls, all_prefix, 0)]
    told = _num_patches(state, config, image_size)
    if told is None and registers == REGISTERS[0]:
        raise ValueError(
            f"image_size must be given (--set image_size=HEIGHT,WIDTH): beside {count} registers, the "
            f"{positions.shape[1]} rows of pos_embed do not tell the grid, and there is no config.json that does"
        )
    right = (number for number in possible if (_is_square(number) if told is None else number == told))
    num_prefix = positions.shape[1] - next(right, possible[0])
    cls = positions[:, :has_cls] if num_prefix else positions.new_zeros(1, has_cls, positions.shape[2])
    left_out = (*distilled, *(key for key in ("head_dist.weight", "head_dist.bias") if key in state))
    kept = {key: x for key, x in state.items() if key not in (*left_out, registers)}
    if count:
        own = positions[:, num_prefix - count : num_prefix] if num_prefix == all_prefix else 0
        kept["reg_token"] = state[registers] + own
    return kept | {"pos_embed": torch.cat([cls, positions[:, num_prefix:]], dim=1)}, left_out


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def _num_patches(state: dict[str, torch.Tensor], config: dict[str, Any], image_size=None) -> int | None:
    """How many patches the image size or a timm folder's `config.json` tells; None if neither does."""
    arguments = config.get("model_args")
    size = arguments.get("img_size") if isinstance(arguments, dict) else None
    size = size if image_size is None else pair(image_size)
    filters = state.get("patch_embed.proj.weight")
    if not isinstance(size, list | tuple) or len(size) != 2 or filters is None or filters.ndim != 4:
        return None
    return math.prod(int(side) // patch for side, patch in zip(size, filters.shape[2:], strict=True))


def _layout(checkpoint: Checkpoint, method: str | None) -> Layout:
    state = checkpoint.state
    if any(key.endswith("patch_embeddings.projection.weight") for key in state):
        return _transformers(checkpoint, method)
    if "encoder.embed.proj.weight" in state:
        assumed = ("patch_gap", "mask_ratio", "temperature", "similarity_weight", "loss_type")
        _choose(method, ("latent_mim",), checkpoint)
        return Layout("latent_mim", "pretraining", key_tables.LATENT_MIM, state, assumed=assumed)
    if "encoder.patch_embed.proj.weight" in state or "target_encoder.patch_embed.proj.weight" in state:
        return _jepa(checkpoint, method)
    if "patch_embed.proj.weight" in state:
        return _vit(checkpoint, method)
    raise AssertionError("choose_prefix finds only names that are above")


def _choose(method: str | None, possible: tuple[str, ...], checkpoint: Checkpoint) -> str:
    if method not in (None, *possible):
        raise ValueError(f"method must be {' or '.join(possible)} for {checkpoint.name} (by its keys), not {method}")
    return method or possible[0]


def _jepa(checkpoint: Checkpoint, method: str | None) -> Layout:
    """A file of I-JEPA's or StoP's authors, or one of its two encoders alone."""
    method, state = _choose(method, ("ijepa", "stop_jepa"), checkpoint), checkpoint.state
    networks = {key.partition(".")[0] for key in state}
    if len(networks) == 1:
        table = within(key_tables.TIMM_VIT, "", f"{networks.pop()}.")
        return Layout(method, "encoder", table, state, _jepa_settings(method))
    is_stop = method == "stop_jepa"
    unread = key_tables.STOP_UNREAD if is_stop else ()
    state = {key: tensor for key, tensor in state.items() if key not in unread}
    table, assumed = (key_tables.STOP, ("noise_on",)) if is_stop else (key_tables.I_JEPA, ())
    return Layout(method, "pretraining", table, state, _jepa_settings(method), assumed, unread)


def _jepa_settings(method: str) -> dict[str, Any]:
    """The config fields in which I-JEPA and StoP differ; {} for other methods."""
    use_mask_token = {"ijepa": {"use_mask_token": True}, "stop_jepa": {"use_mask_token": False}}
    return dict(methods.get(method).settings) | use_mask_token.get(method, {})


def _vit(checkpoint: Checkpoint, method: str | None) -> Layout:
    """A file of MAE's authors, or timm's ViT."""
    state, arguments = checkpoint.state, checkpoint.arguments
    has_cls = "cls_token" in state
    if any(key.startswith("decoder_") for key in state):
        told = {name: arguments[name] for name in ("mask_ratio", "norm_pix_loss") if name in arguments}
        _choose(method, ("mae",), checkpoint)
        return Layout("mae", "pretraining", key_tables.MAE, state, told, ("mask_ratio", "norm_pix_loss"))
    table, told = key_tables.MAE_ENCODER, {"use_cls_token": has_cls}
    registers = within([key_tables.REGISTER_TOKENS], "encoder.", "") if "reg_token" in state else []
    if registers:
        told["num_register_tokens"] = state["reg_token"].shape[1]
    if "head.1.weight" in state:
        table, told = key_tables.MAE_LINEAR_PROBE, told | {"pooling": "cls", "head_batch_norm": True}
    elif "fc_norm.weight" in state:
        table, told = key_tables.MAE_MEAN_CLASSIFIER, told | {"pooling": "mean", "pool_before_norm": True}
    elif "head.weight" in state:
        table, told = key_tables.MAE_CLS_CLASSIFIER, told | {"pooling": "cls" if has_cls else "mean"}
    possible = ("mae", "latent_mim") if has_cls else ("ijepa", "stop_jepa", "mae", "latent_mim")
    method = _choose(method, possible, checkpoint)
    has_head = any(key.startswith("head.") for key in state)
    prefix = f"{methods.get(method).classifier_class.base_model_prefix}." if has_head else ""
    table = [
        (ours.replace("encoder.", prefix, 1), theirs, layout)
        for ours, theirs, layout in [*table, *registers]
        if (has_cls or theirs != "cls_token") and (has_head or not ours.startswith("classifier."))
    ]
    told |= _jepa_settings(method) | _timm_settings(checkpoint.config)
    state, unread = _apart(state, ("mask_token",))  # of DINOv2's authors, only for its pretraining
    return Layout(method, "classifier" if has_head else "encoder", table, state, told, unread=unread)


def _timm_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Config fields from the `config.json` of a timm folder. timm's own models have few of them there."""
    pooling = {"avg": "mean", "token": "cls"}.get(str(config.get("global_pool")))
    told = {} if pooling is None else {"pooling": pooling}
    arguments = config.get("model_args")
    if isinstance(arguments, dict):
        names = {"num_heads": "num_attention_heads", "img_size": "image_size"}
        told |= {ours: arguments[theirs] for theirs, ours in names.items() if theirs in arguments}
        if "act_layer" in arguments:
            act = arguments["act_layer"]
            told["hidden_act"] = next((ours for ours, theirs in ACTIVATIONS.items() if theirs == act), str(act))
    if isinstance(config.get("label_names"), list):
        told["id2label"] = dict(enumerate(config["label_names"]))
        told["label2id"] = {label: i for i, label in enumerate(config["label_names"])}
    return told


def _transformers(checkpoint: Checkpoint, method: str | None) -> Layout:
    """A folder of `ViTMAEForPreTraining`, or of an encoder or classifier of ViTMAE, ViT, DINOv2 or I-JEPA."""
    model_type = checkpoint.config.get("model_type")
    if model_type not in list(TRANSFORMERS):  # a list: it may be of any type
        what = "has no config.json: give the folder" if model_type is None else f"is of type {model_type}"
        raise ValueError(f"{checkpoint.name} has transformers' names and {what}; known are {', '.join(TRANSFORMERS)}")
    possible, table, prefix, pooling = TRANSFORMERS[model_type]
    method = _choose(method, possible, checkpoint)
    state = module_names(checkpoint.state)
    if len(state) < len(checkpoint.state):
        raise ValueError(f"{checkpoint.name} has tensors twice, under transformers' old names and under its new ones")
    told = _transformers_settings(checkpoint) | _jepa_settings(method)
    told["use_cls_token"] = model_type != "ijepa"
    if any(key.startswith("decoder.") for key in state):
        return Layout(method, "pretraining", key_tables.VIT_MAE, state, told)
    inner = prefix if any(key.startswith(prefix) for key in state) else ""
    table = within(table, "", inner)
    if model_type.startswith("dinov2"):
        left = {f"{inner}{key}" for key in DINOV2_UNREAD}
        left |= {key for key in state if key.startswith("classifier.")}
        state, unread = _apart(state, left)
        return Layout(method, "encoder", table, state, told, unread=unread)
    if "classifier.weight" not in state:
        unread = POOLER if _pooler_hands_on(state, checkpoint.config) else ()
        state, unread = _apart(state, unread)
        return Layout(method, "encoder", table, state, told, unread=unread)
    table = within(table, f"{methods.get(method).classifier_class.base_model_prefix}.", "")
    table += [(f"classifier.linear.{name}", f"classifier.{name}", None) for name in ("weight", "bias")]
    return Layout(method, "classifier", table, state, told | {"pooling": pooling})


def _apart(state: dict[str, torch.Tensor], unread) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """(the tensors without those that are not read, the names of these)."""
    return {key: x for key, x in state.items() if key not in unread}, tuple(key for key in state if key in unread)


def _pooler_hands_on(state: dict[str, torch.Tensor], config: dict[str, Any]) -> bool:
    """Whether `ViTModel`'s pooler leaves the CLS token as it is, as in our exports; others have no place here."""
    weight, bias = (state.get(key) for key in POOLER)
    if weight is None or bias is None or config.get("pooler_act") != "linear":
        return False
    return weight.ndim == 2 and torch.equal(weight, torch.eye(*weight.shape)) and not bias.any()


def _transformers_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields that a transformers config shares with ours. Those that its file leaves out have its defaults."""
    model_type = checkpoint.config["model_type"]
    defaults = AutoConfig.for_model(model_type)
    names = [name for name in (*SHARED, "mlp_ratio", "id2label", "label2id") if hasattr(defaults, name)]
    settings = {name: checkpoint.config[name] for name in names if name in checkpoint.config}
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the config.json of {checkpoint.name} is wrong: {one_line(error)}") from error
    found = {name: getattr(config, name) for name in names}
    if "mlp_ratio" in found:  # DINOv2's way to give the width of the MLP
        found["intermediate_size"] = int(found["hidden_size"] * found.pop("mlp_ratio"))
    return found

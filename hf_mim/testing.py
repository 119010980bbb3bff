"""A kit to test a method: a function for each promise that every method must keep. It raises if the promise is broken.

    from hf_mim.testing import check_method

    check_method("mae", image_size=32, patch_size=4, hidden_size=48, num_hidden_layers=2, num_attention_heads=3)

All other parts of hf_mim rely on these promises. `docs/new_method.md` shows a method that keeps them.
"""

import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from hf_mim import methods
from hf_mim.models.vit import MIMPreTrainedModel, PretrainingOutput

Make = Callable[..., Any]  # a seed → a new pretraining model


def check_method(name: str, **config: Any) -> None:
    """Check that a method of the table keeps the promises of every method.

    Args:
        name: the method's name in `hf_mim.methods`.
        config: fields of its config. With a small model, the check takes seconds. Images have `config.training_size`.

    Raises:
        AssertionError: a promise is broken; the message is the promise and what was seen.
        ValueError: there is no such method, or the config is wrong.
    """
    method = methods.get(name)

    def make(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return method.pretraining_class(method.config_class(**method.settings, **config))

    for check in CHECKS:
        check(method, make)


def claim(holds: bool, text: str) -> None:
    """Raise AssertionError unless a promise holds. Not `assert`, which `python -O` leaves out."""
    if not holds:
        raise AssertionError(text)


def images_for(model: Any, batch: int = 2) -> torch.Tensor:
    """Normalised images `[batch, C, H, W]` of the size that the pretraining model takes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, model.config.num_channels, *model.config.training_size, generator=generator)


def encoder_images(model: Any) -> torch.Tensor:
    """Images of the size that the encoder sees at evaluation."""
    return torch.randn(2, model.config.num_channels, *model.config.image_height_width)


def seeded_pass(model: Any, images: torch.Tensor, seed: int = 2) -> PretrainingOutput:
    torch.manual_seed(seed)
    return model(images)


def counted_flops(model: Any, images: torch.Tensor, *ids: torch.Tensor, **masks: Any) -> tuple[int, int]:
    """FLOPs of the matrix products in the forward and in the backward pass. A multiply-add counts as two.

    From then on the model's attention is the eager one, because the counter does not know the CPU's fused attention.
    """
    for module in model.modules():  # transformers' MAE has a decoder with a config of its own
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    with FlopCounterMode(display=False) as counter:
        loss = model(images, *ids, **masks).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def check_classes(method: methods.Method, make: Make) -> None:
    classes = method.config_class, method.encoder_class, method.pretraining_class
    claim(all(cls.config_class is classes[0] for cls in classes[1:]), "every model class must name the config class")
    claim(
        issubclass(method.pretraining_class, MIMPreTrainedModel), "the pretraining model must be a MIMPreTrainedModel"
    )
    config = make().config
    claim(methods.of_config(config).name == method.name, f"the config must be recognised as {method.name}")
    claim(bool(method.card_text.strip()), "the card must say what the method does")


def check_encoder_is_never_masked(method: methods.Method, make: Make) -> None:
    encoder = make().base_model.train()
    images = encoder_images(encoder)
    first, second = encoder(images), encoder(images)
    tokens = encoder.config.num_prefix_tokens + encoder.config.grid_size[0] * encoder.config.grid_size[1]
    claim(first.last_hidden_state.shape[1] == tokens, f"the encoder must give {tokens} tokens, one for each patch")
    same = torch.equal(first.last_hidden_state, second.last_hidden_state)
    claim(same, "the encoder must be deterministic and unmasked, in train mode too")
    claim(first.pooler_output.shape == (2, encoder.config.hidden_size), "pooler_output must be [B, D]")
    wide = torch.cat([images, images], dim=3)
    claim(encoder(wide).last_hidden_state.shape[1] > tokens, "the encoder must take images of another size")


def check_output(method: methods.Method, make: Make) -> None:
    model = make()
    images = images_for(model)
    output = seeded_pass(model, images)
    claim(output.loss.ndim == 0 and bool(torch.isfinite(output.loss)), "loss must be one finite number")
    claim(output.predictions.shape == output.targets.shape, "predictions and targets must be of one shape")
    claim(len(output.predictions) == len(images), "the first axis of predictions must be the images")
    for name, value in output.metrics.items():
        scalar = isinstance(value, torch.Tensor) and value.ndim == 0
        claim(scalar and not value.requires_grad, f"metrics must be detached 0-dim tensors, and {name} is none")
    hidden = all(
        not set(context.tolist()) & set(target.tolist())
        for context, target in zip(output.context_ids, output.target_ids.flatten(1), strict=True)
    )
    claim(hidden, "no patch may be both context and target")


def check_ids_reproduce_a_pass(method: methods.Method, make: Make) -> None:
    model = make()
    images = images_for(model)
    output = seeded_pass(model, images)
    claim(not torch.equal(seeded_pass(model, images, seed=3).context_ids, output.context_ids), "masks must be random")
    torch.manual_seed(2)
    masks = model.draw_masks(len(images), model.config.grid_size, images.device)
    accepted = inspect.signature(model.forward).parameters.keys() - {"pixel_values"}
    claim(masks.keys() <= accepted, "draw_masks must return arguments of forward, by name")
    again = model(images, **masks)
    claim(torch.equal(again.loss, output.loss), "forward with the ids of draw_masks must give the pass that drew them")


def check_gradients(method: methods.Method, make: Make) -> None:
    model = make().train()
    seeded_pass(model, images_for(model)).loss.backward()
    targets = [target for target, _ in model.target_pairs()] if hasattr(model, "target_pairs") else []
    frozen = {id(parameter) for target in targets for parameter in target.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in frozen:
            claim(not parameter.requires_grad, f"the target must not be trained, and {name} is")
        elif parameter.requires_grad:
            claim(parameter.grad is not None, f"every trainable parameter must get a gradient, and {name} gets none")


def check_flops(method: methods.Method, make: Make) -> None:
    """Only for a method with a formula; without it, no FLOPs are logged."""
    model = make().train()
    if not hasattr(model, "step_flops"):
        return
    images, grid = images_for(model), model.config.grid_size
    masks = model.draw_masks(len(images), grid, images.device, **model.training_masks())
    formula, counted = model.step_flops(len(images), grid, masks), sum(counted_flops(model, images, **masks))
    same = abs(formula - counted) <= 0.01 * counted
    claim(same, f"step_flops must be the FLOPs of a step, and it is {formula:,} where {counted:,} were counted")


def check_training_calls(method: methods.Method, make: Make) -> None:
    model = make().train()
    for progress in (0.0, 0.5, 1.0):
        model.set_progress(progress)
        model.update_target(progress)
        model.update_target(progress, torch.ones(()))
    claim(bool(torch.isfinite(seeded_pass(model, images_for(model)).loss)), "the loss must be finite after an update")


def check_save_and_load(method: methods.Method, make: Make) -> None:
    model = make().eval()
    images = images_for(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForPreTraining.from_pretrained(folder).eval()
        encoder = AutoModel.from_pretrained(folder).eval()
        claim(type(AutoConfig.from_pretrained(folder)) is method.config_class, "AutoConfig must find the config class")
    state, other = model.state_dict(), again.state_dict()
    claim(state.keys() == other.keys(), "a saved model must load with the same names")
    different = [name for name in state if not torch.equal(state[name], other[name])]
    claim(not different, f"a saved model must load equal, and {', '.join(different)} differ")
    claim(
        torch.equal(seeded_pass(again, images).loss, seeded_pass(model, images).loss),
        "a loaded model must give the same loss",
    )
    views = encoder_images(model)
    same = torch.equal(encoder(views).pooler_output, model.base_model(views).pooler_output)
    claim(same, "AutoModel must load the encoder that base_model_prefix names")


def check_low_precision(method: methods.Method, make: Make) -> None:
    model = make().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = seeded_pass(model, images_for(model))
    output.loss.backward()
    claim(bool(torch.isfinite(output.loss)), "the loss must be finite under bfloat16 autocast")


def check_pixels_without_data(method: methods.Method, make: Make) -> None:
    """Only for a method that takes `valid_pixels`; without it, `--nodata` is refused."""
    if not method.takes_nodata:
        return
    model = make().train()
    images = images_for(model)
    plain = seeded_pass(model, images).loss
    valid = torch.ones_like(images, dtype=torch.bool)
    torch.manual_seed(2)
    whole = model(images, valid_pixels=valid).loss
    claim(torch.allclose(whole, plain, rtol=1e-5), "valid_pixels that are all True must not change the loss")
    valid[0] = False
    torch.manual_seed(2)
    alone = model(images * valid, valid_pixels=valid).loss
    claim(bool(torch.isfinite(alone)), "the loss must be finite if an image holds no data")
    torch.manual_seed(2)
    output = model(images * 0, valid_pixels=torch.zeros_like(valid))
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    finite = bool(torch.isfinite(output.loss)) and all(bool(x.isfinite().all()) for x in gradients)
    claim(finite, "loss and gradients must be finite if no pixel of a batch has data")


CHECKS = (
    check_classes,
    check_encoder_is_never_masked,
    check_output,
    check_ids_reproduce_a_pass,
    check_gradients,
    check_flops,
    check_training_calls,
    check_save_and_load,
    check_low_precision,
    check_pixels_without_data,
)

"""What replaces an `nn.Linear` reaches every product, shown with LoRA adapters of PEFT."""

import peft
import pytest
import torch
from passes import drawn, make
from tiny import METHODS, make_config
from transformers import AutoModelForImageClassification

from hf_mim.models.linear_layers import bias_of, input_dtype, is_plain, product_without_bias


def with_lora(model, target_modules: str, **settings):
    """Adapters that change the output: PEFT starts them at zero."""
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target_modules, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def adapters(model) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def outputs_without(model, name: str, run):
    """What `run` gives when the adapter of the module `name` adds nothing."""
    weight = model.get_submodule(name).lora_B["default"].weight
    saved = weight.clone()
    weight.zero_()
    output = run(model)
    weight.copy_(saved)
    return output


def check_every_adapter(model, run):
    """Each adapted module has gradients and shows in the output; merging the adapters changes nothing."""
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    output = run(model)
    output.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapters(model).values())
    names = {name.rpartition(".lora_")[0] for name in adapters(model)}
    for name in names:
        assert (outputs_without(model, name, run) - output).abs().max() > 1e-5, name
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01).step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in base.items())
    with torch.no_grad():
        unmerged = run(model)
        assert not torch.equal(unmerged, output)
        merged = model.merge_and_unload()
        torch.testing.assert_close(run(merged), unmerged, atol=1e-5, rtol=0)
    return names


@pytest.mark.parametrize("method", METHODS)
def test_fine_tuning_with_lora_reaches_every_layer(method):
    torch.manual_seed(0)
    classifier = AutoModelForImageClassification.from_config(make_config(method, num_labels=5)).eval()
    model = with_lora(classifier, r".*\.qkv", modules_to_save=["classifier"])
    images = torch.randn(4, 3, 32, 32)
    names = check_every_adapter(model, lambda m: m(pixel_values=images).logits)
    assert len(names) == classifier.config.num_hidden_layers


WITH_NOISE = [{"use_mask_token": False}, {"tie_noise_projection": False}, {"noise_on": "both"}]


@pytest.mark.parametrize(
    ("method", "changes"),
    [(method, {}) for method in METHODS] + [("stop_jepa", changes) for changes in WITH_NOISE],
)
def test_pretraining_with_lora_reaches_every_layer_and_the_tied_noise(method, changes):
    torch.manual_seed(0)
    model = make(method, **changes).eval()
    names = "encoder", "decoder", "predictor"
    networks = [name for name in names if hasattr(getattr(model, name, None), "layers")]
    lora = with_lora(model, rf"({'|'.join(networks)})\..*(qkv|embed|projection)")
    images = torch.randn(2, 3, *model.config.training_size)
    names = check_every_adapter(lora, lambda m: drawn(m, images).predictions)
    layers = {name for name in names if name.endswith("qkv")}
    assert len(layers) == sum(len(getattr(model, name).layers) for name in networks)


class Offset(torch.nn.Linear):
    """A subclass, as fp8 layers are, that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


def test_only_a_plain_linear_is_read_by_its_weight():
    linear, x = torch.nn.Linear(3, 5), torch.randn(2, 3)
    assert is_plain(linear) and torch.equal(product_without_bias(linear, x), x @ linear.weight.T)
    assert bias_of(linear, x) is linear.bias and product_without_bias(torch.nn.Linear(3, 5, bias=False), x).shape == (
        2,
        5,
    )
    hooked, replaced = torch.nn.Linear(3, 5), torch.nn.Linear(3, 5)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    replaced.forward = lambda x: torch.nn.functional.linear(x, replaced.weight, replaced.bias) * 2
    offset = Offset(3, 5)
    for module, factor, added in ((hooked, 2, 0), (replaced, 2, 0), (offset, 1, 1)):
        assert not is_plain(module)
        torch.testing.assert_close(product_without_bias(module, x), factor * (x @ module.weight.T))
        torch.testing.assert_close(bias_of(module, x), factor * module.bias + added)


def test_inputs_have_the_dtype_of_the_parameters_that_are_not_quantised():
    linear = torch.nn.Linear(3, 5, dtype=torch.bfloat16)
    assert input_dtype(linear) == torch.bfloat16
    linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert input_dtype(linear) == torch.bfloat16
    linear.weight = torch.nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    assert input_dtype(linear) == torch.bfloat16

"""What every method must do, on every kind of image: one matrix over methods, shapes, channels and CLS."""

import copy

import pytest
import torch
from passes import drawn, gradients, make, tables
from tiny import METHODS, make_config
from transformers import AutoModel

from hf_mim.models import blocks
from hf_mim.models.blocks import MLP
from hf_mim.models.positions import sincos_table

CASES = [
    (method, image_size, channels, cls_token)
    for method in METHODS
    for image_size, channels in ((32, 1), ((24, 40), 10))
    for cls_token in ((True, False) if make_config(method).use_cls_token else (False,))
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def case(request):
    method, image_size, channels, cls_token = request.param
    sizes = dict(image_size=image_size, num_channels=channels, use_cls_token=cls_token)
    model = make(method, **sizes, num_register_tokens=2 if channels == 1 else 0)
    return model, torch.randn(8, channels, *model.config.training_size)  # over fewer, batch statistics are noise


def assert_tables_right_and_target_frozen(model):
    prefix, grid = int(model.config.use_cls_token), model.config.grid_size
    assert tables(model)
    for table in tables(model).values():
        expected = sincos_table(grid, table.table.shape[1], prefix, model.config.rescaled_positions)
        assert torch.equal(table.table, expected) and not table.table.requires_grad
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("target_")}


def test_every_trainable_parameter_gets_a_gradient_and_nothing_frozen_moves(case):
    model, images = case
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = drawn(model.train(), images)
    assert output.loss.isfinite() and output.predictions.shape == output.targets.shape
    assert output.target_ids.shape == output.predictions.shape[:-1]
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trainable), name


def test_saved_and_loaded_models_are_equal_to_the_bit(case, tmp_path):
    model, images = case
    assert_tables_right_and_target_frozen(model)
    if hasattr(model, "target_pairs"):  # a target that a load must not overwrite by the online encoder
        torch.nn.init.normal_(model.target_encoder.norm.bias)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_tables_right_and_target_frozen(loaded)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(drawn(model.eval(), images).loss, drawn(loaded, images).loss)


def test_auto_model_loads_the_encoder_alone(case, tmp_path):
    model, images = case
    if hasattr(model, "target_pairs"):
        torch.nn.init.normal_(model.target_encoder.norm.bias)
    model.save_pretrained(tmp_path)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    images = images[..., : model.config.image_height_width[0], : model.config.image_height_width[1]]
    expected = model.base_model.eval()(images)
    output = encoder(images)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    grid = model.config.grid_size
    assert output.last_hidden_state.shape[1] == model.config.num_prefix_tokens + grid[0] * grid[1]
    patch_tokens = output.last_hidden_state[:, model.config.num_prefix_tokens :]
    torch.testing.assert_close(output.pooler_output, patch_tokens.mean(dim=1))


def test_meta_device_models_have_the_same_tensors(case):
    model, _ = case
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert all(t.is_meta for t in empty.state_dict().values())


def count_calls(model, kind):
    """How often each module of a kind is called, by name."""
    calls = {name: 0 for name, module in model.named_modules() if isinstance(module, kind)}
    for name in calls:

        def count(module, args, name=name):
            calls[name] += 1

        model.get_submodule(name).register_forward_pre_hook(count)
    return calls


def test_eager_attention_equals_sdpa(case, monkeypatch):
    model, images = case
    assert model.config._attn_implementation == "sdpa"
    loss, grads = gradients(model, images)
    model.set_attn_implementation("eager")
    calls, attend = [], blocks.eager_attention
    monkeypatch.setattr(blocks, "eager_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    eager_loss, eager_grads = gradients(model, images)
    assert len(calls) == sum(isinstance(module, blocks.MultiHeadAttention) for module in model.modules())
    torch.testing.assert_close(eager_loss, loss, rtol=1e-5, atol=0)
    for name in grads:
        torch.testing.assert_close(eager_grads[name], grads[name], rtol=1e-3, atol=1e-6)


def test_training_in_bfloat16_on_a_cpu_computes_attention_in_float32(monkeypatch):
    """Its forward pass in bfloat16 takes no longer there, and its backward pass ten times as long."""
    sdpa, given = torch.nn.functional.scaled_dot_product_attention, []

    def record(query, *args, **kwargs):
        given.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return sdpa(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    attention = blocks.SelfAttention(make("mae").config, width=32, heads=2)
    tokens = torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention(tokens)
        without, _ = attention.requires_grad_(False)(tokens)
    assert given == [(torch.float32, False), (torch.bfloat16, True)]
    assert output.dtype == without.dtype == torch.bfloat16 and output.requires_grad
    torch.testing.assert_close(output, without, rtol=0.02, atol=0.02)


def test_gradient_checkpointing_changes_nothing(case):
    model, images = case
    loss, grads = gradients(model, images)
    model.activation_checkpointing_enable()
    calls = count_calls(model, MLP)
    checkpointed_loss, checkpointed_grads = gradients(model, images)
    frozen = [name for name in calls if name.startswith("target_")]  # without gradients there is nothing to recompute
    assert all(count == 1 + (name not in frozen) for name, count in calls.items()), calls
    assert torch.equal(checkpointed_loss, loss)
    assert all(torch.equal(checkpointed_grads[name], grads[name]) for name in grads)

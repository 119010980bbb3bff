"""`hf-mim plan`: what it computes is what real models have, hold and send."""

import json
from pathlib import Path

import pytest
import torch
from tiny import METHODS, has_target, make_model
from transformers import AutoModelForPreTraining

from hf_mim import methods
from hf_mim.cli import main
from hf_mim.models import blocks
from hf_mim.models.configuration_vit import SIZES
from hf_mim.planning import plan
from hf_mim.planning import step as plan_step

SMALL = dict(image_size=32, patch_size=4, num_hidden_layers=3, hidden_size=48, num_attention_heads=3)
DEEPER = SMALL | dict(intermediate_size=100)
MAE_AND_SLOW_OTHERS = ["mae", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "mae")]


def run(path, *arguments):
    assert main(["plan", *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def really_held(model, arguments, bf16) -> int:
    """Bytes of all that autograd saves in a real forward pass, found by address; parameters left out."""
    weights, held, kept = {p.data_ptr() for p in model.parameters()}, {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=bf16):
        model(*arguments)
    return sum(held.values())


@pytest.mark.parametrize("method", MAE_AND_SLOW_OTHERS)
def test_parameters_are_those_of_the_real_model(method):
    model = make_model(method)
    counted = plan_step.examine(model.config, batch_size=4, devices=1)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    assert counted.parameters.trained == counted.shards["trained"] == sum(trained)
    assert counted.parameters.target == counted.shards["target"] == sum(frozen)
    assert bool(frozen) == has_target(method)
    assert counted.parameters.buffers == sum(b.numel() for b in model.buffers())
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    in_layers = [p.numel() for layer in layers for p in layer.parameters() if p.requires_grad]
    assert counted.parameters.trained_layers == sum(in_layers)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [{}, DEEPER], ids=["narrow", "deeper"])
@pytest.mark.parametrize("method", MAE_AND_SLOW_OTHERS)
def test_activations_are_those_that_autograd_holds(monkeypatch, method, sizes, checkpointing):
    config = methods.get(method).config_class(**make_model(method).config.to_diff_dict() | sizes)
    if method == "stop_jepa":  # its masks differ in length from draw to draw
        shapes = (1, 20), (1, 4, 7)
        monkeypatch.setattr(plan_step, "mask_shapes", lambda *_: (shapes, shapes))
    monkeypatch.setattr(blocks, "sdpa_in_float32", None)  # the way of a CPU, which no plan takes
    planned = plan_step.examine(config, batch_size=5, devices=1, checkpointing=checkpointing).ddp
    attention = {"attn_implementation": plan_step.ANY_DEVICE}
    model = AutoModelForPreTraining.from_config(config, **attention).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    held = {}
    for size in (3, 5):
        arguments = [torch.randn(size, 3, *config.training_size)]
        if method == "stop_jepa":
            arguments += [torch.zeros(size * masks, *rest, dtype=torch.int64) for masks, *rest in shapes]
        held[size] = really_held(model, arguments, bf16=True)
    assert (held[5] - held[3]) / 2 == pytest.approx(planned.per_image, rel=0.01)
    if checkpointing:  # planned with all copies of weights, which autocast holds to the end of the forward pass
        assert held[5] <= 5 * planned.per_image + planned.fixed
    else:
        assert held[5] == pytest.approx(5 * planned.per_image + planned.fixed, rel=0.01)


@pytest.mark.parametrize("bf16", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_layer_keeps_the_bytes_of_the_formula(bf16):
    """By hand, per token: in bfloat16 the float32 stream twice and its norms' statistics, then the inputs of four
    products, q, k and v, and GELU's input: 20 width + 4 MLP + 4 heads + 16 bytes."""
    config = methods.get("mae").config_class(**DEEPER)
    found = plan_step.examine(config, batch_size=2, devices=1, bf16=bf16).ddp.per_token_and_layer
    number = 4 if not bf16 else 2
    stream = 2 * 4 * 48 + 2 * 2 * 4
    assert found == stream + number * (48 + 3 * 48 + 48 + 48 + 2 * 100) + 4 * 3


@pytest.mark.parametrize("devices", [1, 3, 8, 512])
def test_a_shard_is_the_first_chunk_of_each_tensor(devices):
    parameters = list(make_model("latent_mim").parameters())
    assert plan_step.shard_numel(parameters, devices) == sum(p.chunk(devices)[0].numel() for p in parameters)


def test_traffic_and_time_are_those_of_a_computation_by_hand():
    parameters = plan_step.Parameters(
        trained=1000, target=600, buffers=0, trained_layers=800, target_layers=500, largest_layer=100
    )
    step = plan_step.Step(parameters, {}, None, None, forward_flops=2e9, backward_flops=4e9, encoder_tokens=1)
    sent = plan.traffic(step, accumulation=2, devices=4, bf16=True)
    assert sent["ddp"] == {"forward": 0, "backward": 2 * 3 / 4 * 4000}
    # Gathered in bfloat16: all in each of two forward passes, layers again in each backward; gradients reduced once.
    assert sent["fsdp2"] == {"forward": 3 / 4 * 2 * 1600 * 2, "backward": 3 / 4 * 2 * (800 * 2 + 1000)}
    assert plan.traffic(step, 1, devices=1, bf16=True)["ddp"]["backward"] == 0

    cluster = plan.Cluster(devices=4, tflops=1, mfu=0.5, link_gbps=(80, 8), devices_per_node=4)
    assert cluster.seconds(1e9) == pytest.approx(0.1)
    assert plan.Cluster(devices=8, link_gbps=(80, 8), devices_per_node=4).seconds(1e9) == pytest.approx(1)
    sent = {"ddp": {"forward": 0.0, "backward": 1e9}, "fsdp2": {"forward": 3e8, "backward": 1e8}}
    time = plan.times(step, sent, cluster, batch=10, accumulation=2)
    # A pass computes forward in .04 s and backward in .08 s; DDP's .1 s hide behind one backward.
    assert time["ddp"]["step"] == pytest.approx(2 * 0.12 + 0.02)
    assert time["fsdp2"]["step"] == pytest.approx(2 * 0.12)
    assert time["ddp"]["images_per_second"] == pytest.approx(10 * 2 * 4 / 0.26)


def test_a_recipe_is_planned_as_it_runs(tmp_path):
    small = ["--hidden_size", "64", "--num_attention_heads", "4", "--num_hidden_layers", "2"]
    found = run(tmp_path / "plan.json", "imagenet_mae", "--devices", "8", *small)
    assert found["batch"] == {"per_device": 128, "accumulation": 4, "images": 4096, "learning_rate": 1.5e-4 * 16}
    assert found["run"]["steps"] == 800 * 313  # 1,281,167 images are 1,251 batches on 8 devices, 313 steps of four
    for way in ("ddp", "fsdp2"):
        assert found["memory"][way]["total"] == sum(v for k, v in found["memory"][way].items() if k != "total")
    assert found["memory"]["fsdp2"]["AdamW"] < found["memory"]["ddp"]["AdamW"] / 7
    assert found["step"]["encoder_tokens"] == 50


def test_a_batch_is_kept_on_any_number_of_devices():
    for devices, per_device, accumulation in ((1, 128, 32), (8, 128, 4), (64, 64, 1), (512, 8, 1)):
        cluster = plan.Cluster(devices=devices, images_per_step=4096)
        assert plan.batches(plan.read_model("base", {}), cluster) == (per_device, accumulation)


@pytest.mark.parametrize("method", METHODS)
def test_a_size_is_planned_with_its_own_parts(method):
    recipe = plan.read_model("huge", {"method": method})
    assert recipe.config().to_dict() == methods.get(method).config_class(size="huge").to_dict()
    assert recipe.config().hidden_size == SIZES["huge"][0]
    assert recipe.training["per_device_train_batch_size"] == (256 if method == "stop_jepa" else 128)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tiny", "small"], "plan needs one MODEL, not tiny and small"),
        (["larg"], "the sizes are tiny, small, base, large"),
        (["tiny", "--json", "no/plan.json"], "there is no folder no"),
        (["no.yaml"], "there is no recipe no.yaml"),
        (["tiny", "--devices", "0"], "devices must be above 0"),
        (["tiny", "--devices", "many"], "devices must be a whole number"),
        (["tiny", "--mfu", "35"], "mfu is a share"),
        (["tiny", "--tflop", "1"], "plan has no option tflop; did you mean tflops?"),
        (["tiny", "--images_per_step", "100", "--devices", "64"], "images_per_step 100 is no multiple"),
        (["tiny", "--image_size", "225"], "image_size must be divisible"),
        (["digits_mae"], "images must be given"),
        (
            ["tiny", "--nodes", "2"],
            "give devices, the number of all, and devices_per_node (default: 8): two nodes of 8",
        ),
        (["tiny", "--gpus-per-node", "4"], "plan has no option gpus_per_node; give devices"),
        (["tiny", "--link_gbps", "0"], "link_gbps must be two rates in Gbit/s, inside a node and between two"),
        (["tiny", "--link_gbps", "0,400"], "link_gbps must be above 0"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, arguments, message):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_default_rate_of_loading_is_the_measured_one():
    measured = json.loads((Path(__file__).parents[2] / "docs" / "benchmarks" / "data_cpu.json").read_text())
    assert plan.Cluster().loader_images_per_second == measured["images_per_second"]["ours"]

"""The effect of options of transformers' TrainingArguments on the steps of a run: length, order of the images, loaders,
optimizer, precision, processes. `test_trainer_options.py` lists all options."""

import types

import pytest
import torch
from accelerate.utils import DistributedType
from option_runs import losses_of, make_trainer, train
from tiny import METHODS, make_model
from tiny_runs import AtEachStep, Images, arguments, assert_same_weights, image_column, snapshot
from transformers import training_args

from hf_mim.data import ImageStream
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.images import random_crops
from hf_mim.pretraining.recipe import RunArguments

# ---- length, seeds, order


def test_a_run_has_as_many_epochs_as_are_asked_for(tmp_path):
    trainer = train(tmp_path, max_steps=-1, num_train_epochs=2.5)
    assert trainer.state.global_step == 10 and trainer.state.epoch == 2.5  # 18 images in batches of 4


def order_and_masks(folder, **settings):
    """The images of a run in their order, each told by a pixel, and the masks."""
    model, order, masks = make_model("mae"), [], []

    def look(module, args, kwargs, output):
        order.extend(kwargs["pixel_values"][:, 0, 0, 0].tolist())
        masks.append(output.context_ids.tolist())

    model.register_forward_hook(look, with_kwargs=True)
    train(folder, model, **settings)
    return order, masks


def test_data_seed_decides_the_order_of_the_images_and_seed_the_masks(tmp_path):
    order, masks = order_and_masks(tmp_path, seed=1, data_seed=1)
    for seed, data_seed in ((1, 2), (2, 1)):
        others = order_and_masks(tmp_path, seed=seed, data_seed=data_seed)
        assert [others[0] == order, others[1] == masks] == [data_seed == 1, seed == 1]


def test_images_come_in_their_own_order_if_that_is_asked_for(tmp_path):
    settings = dict(per_device_train_batch_size=3)
    order, _ = order_and_masks(tmp_path, train_sampling_strategy="sequential", **settings)
    images = Images(make_model("mae"))
    assert order == [images[index]["pixel_values"][0, 0, 0].item() for index in range(6)]
    assert order_and_masks(tmp_path, **settings)[0] != order


def test_data_seed_decides_the_order_of_a_stream(tmp_path):
    def order(**seeds):
        images, args = image_column(24).to_iterable_dataset(), arguments(tmp_path, **seeds)
        stream = random_crops(images, RunArguments(shuffle_buffer=24), make_model("mae").config, args)
        return [row["image"]["path"] for row in stream.images]

    assert order(seed=1, data_seed=1) == order(seed=2, data_seed=1) != order(seed=1, data_seed=2)


def test_full_determinism_is_asked_of_torch_with_the_seed(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", seeds.append)
    make_trainer(tmp_path, full_determinism=True, seed=7)
    assert seeds == [7]


# ---- loaders


@pytest.mark.parametrize("streamed", [False, True])
def test_the_loader_is_as_it_is_asked_for(tmp_path, streamed):
    options = dict(dataloader_num_workers=1, dataloader_prefetch_factor=3, dataloader_multiprocessing_context="spawn")
    trainer = make_trainer(tmp_path, dataloader_persistent_workers=False, dataloader_drop_last=False, **options)
    if streamed:
        trainer.train_dataset = ImageStream(image_column(8).to_iterable_dataset(), size=24)
    loader = trainer.get_train_dataloader().base_dataloader
    assert (loader.num_workers, loader.prefetch_factor) == (1, 3)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    if not streamed:
        assert not loader.persistent_workers and len(loader) == 5  # 18 images in batches of 4


@pytest.mark.slow
def test_workers_that_are_spawned_give_the_same_images(tmp_path):
    spawned = train(tmp_path, dataloader_num_workers=1, dataloader_multiprocessing_context="spawn")
    assert losses_of(spawned) == losses_of(train(tmp_path))


@pytest.mark.parametrize("pinned", [True, False])
def test_memory_is_pinned_for_a_gpu_unless_that_is_refused(tmp_path, monkeypatch, pinned):
    monkeypatch.setattr(MIMTrainingArguments, "device", torch.device("cuda"))
    args = arguments(tmp_path, use_cpu=False, dataloader_pin_memory=pinned)
    assert args.dataloader_pin_memory is args.accelerator_config.non_blocking is pinned


# ---- optimizer


def test_adamw_has_the_betas_and_the_epsilon_that_are_given(tmp_path):
    options = dict(adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-3)
    groups = make_trainer(tmp_path, **options).create_optimizer().param_groups
    assert [(group["betas"], group["eps"]) for group in groups] == [((0.8, 0.7), 1e-3)] * 2


def test_the_optimizer_is_the_one_that_is_named_with_its_own_arguments(tmp_path):
    optimizer = make_trainer(tmp_path, optim="sgd", optim_args="momentum=0.7").create_optimizer()
    assert type(optimizer) is torch.optim.SGD and [group["momentum"] for group in optimizer.param_groups] == [0.7] * 2


@pytest.mark.parametrize("optim", ["adafactor", "adagrad", "rmsprop", "sgd"])
def test_other_optimizers_train_and_decay_as_adamw_does(tmp_path, optim):
    decays = []
    record = AtEachStep(lambda state, optimizer: decays.append([g["weight_decay"] for g in optimizer.param_groups]))
    trainer = train(tmp_path, callbacks=[record], optim=optim, weight_decay=0.2, weight_decay_end=0.4)
    assert decays[0] == [0.2, 0] and decays[1] == [pytest.approx(0.3), 0]
    changed = [not torch.equal(a, b) for a, b in zip(snapshot(trainer.model), snapshot(make_model("mae")), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_a_gradient_is_clipped_to_the_norm_that_is_given(tmp_path):
    settings = dict(optim="sgd", weight_decay=0.0, learning_rate=1.0, max_steps=1, max_grad_norm=1e-3)
    before, after = snapshot(make_model("mae")), snapshot(train(tmp_path, **settings).model)
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)]).norm()
    assert moved == pytest.approx(1e-3, rel=1e-3)


# ---- precision, memory, compilation


def test_half_precisions_reach_the_accelerator(tmp_path, monkeypatch):
    assert make_trainer(tmp_path, bf16=True).accelerator.mixed_precision == "bf16"
    assert make_trainer(tmp_path).accelerator.mixed_precision == "no"
    with pytest.raises(ValueError, match="^fp16 needs a GPU"):
        arguments(tmp_path, fp16=True)
    monkeypatch.setattr(MIMTrainingArguments, "device", torch.device("cuda"))
    assert arguments(tmp_path, fp16=True).mixed_precision == "fp16"


@pytest.mark.parametrize("asked", [True, False, None])
def test_tf32_is_switched_as_it_is_asked_for(tmp_path, monkeypatch, asked):
    switched = []
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(training_args, "enable_tf32", switched.append)
    arguments(tmp_path, tf32=asked)
    assert switched == ([] if asked is None else [asked])


def test_the_cache_of_the_device_is_emptied_every_so_many_steps(tmp_path, monkeypatch):
    emptied = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: emptied.append(1))
    train(tmp_path, max_steps=6, torch_empty_cache_steps=3)
    assert len(emptied) == 2


@pytest.mark.parametrize(
    ("name", "kwargs_name"),
    [
        ("activation_checkpointing", "activation_checkpointing_kwargs"),
        ("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_activation_checkpointing_computes_layers_twice_and_changes_nothing(tmp_path, name, kwargs_name):
    def run(**settings):
        model, calls = make_model("mae"), [0, 0]
        for index, layer in enumerate(model.encoder.layers):
            # A pre-hook, because the second pass through a layer ends before its last module has an output.
            layer.mlp.register_forward_pre_hook(lambda *args, index=index: calls.__setitem__(index, calls[index] + 1))
        train(tmp_path, model, **settings)
        return model, calls

    plain, calls = run()
    assert calls == [2, 2]
    for kwargs, expected in ((None, [4, 4]), ({"every_n_layers": 2}, [4, 2])):
        model, calls = run(**{name: True, kwargs_name: kwargs})
        assert calls == expected
        assert_same_weights(model, plain, tolerance=1e-6)


def test_torch_compiles_with_the_backend_and_the_mode_that_are_given(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **settings: asked.append(settings) or model)
    train(tmp_path, torch_compile=True)
    train(tmp_path, torch_compile_backend="eager", torch_compile_mode="reduce-overhead")
    train(tmp_path)
    found = [(settings["backend"], settings.get("mode")) for settings in asked]
    assert found == [("inductor", None), ("eager", "reduce-overhead")]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_learns_the_same(tmp_path, method):
    compiled = train(tmp_path, make_model(method), torch_compile=True, torch_compile_backend="eager")
    plain = train(tmp_path, make_model(method))
    assert losses_of(compiled) == pytest.approx(losses_of(plain), abs=1e-6)
    assert_same_weights(compiled.model, plain.model, tolerance=1e-6)


def test_the_search_for_overflows_names_the_layer_and_ends_the_run(tmp_path, capsys):
    model = make_model("mae")
    model.encoder.layers[1].mlp.fc1.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="inf/nan detected"):
        train(tmp_path, model, debug="underflow_overflow")
    assert "encoder.layers.1.mlp" in capsys.readouterr().out


def test_memory_is_measured_if_that_is_asked_for(tmp_path):
    ends = [train(tmp_path, skip_memory_metrics=skip).state.log_history[-1] for skip in (True, False)]
    assert [any(name.startswith("train_mem_cpu") for name in end) for end in ends] == [False, True]


# ---- processes


def test_device_backend_and_timeout_reach_the_process_group(tmp_path, monkeypatch):
    given, state = [], types.SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0)
    state.distributed_type = DistributedType.NO
    monkeypatch.setattr(training_args, "PartialState", lambda **settings: given.append(settings) or state)
    arguments(tmp_path, use_cpu=True, ddp_backend="gloo")  # one process needs no backend, and accelerate fails with one
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments(tmp_path, use_cpu=True, ddp_backend="gloo")
    arguments(tmp_path, use_cpu=False, ddp_backend="nccl", ddp_timeout=77)
    alone, on_cpu, elsewhere = given
    assert alone == {"cpu": True, "backend": None} and on_cpu == {"cpu": True, "backend": "gloo"}
    assert elsewhere["timeout"].total_seconds() == 77 and elsewhere["backend"] == "nccl" and "cpu" not in elsewhere


def test_the_accelerator_has_the_settings_that_are_given_and_each_rank_its_own_images(tmp_path):
    config = make_trainer(tmp_path, accelerator_config={"even_batches": False}).accelerator.dataloader_config
    assert (config.even_batches, config.dispatch_batches) == (False, False)


def test_fsdp_is_set_up_as_fsdp_config_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers writes it
    plugin = arguments(tmp_path, fsdp=True, fsdp_config={"reshard_after_forward": False}).fsdp_plugin_args
    assert (plugin["fsdp_version"], plugin["reshard_after_forward"]) == (2, False)
    with pytest.raises(ValueError, match="^Using fsdp only works in distributed training.$"):
        make_trainer(tmp_path, fsdp=True)

"""training/accelerate/*.yaml, read by accelerate's own loader and launcher; FSDP2 as they set it, on two CPU ranks.

`two_ranks.py` has two ranks train each method by DDP and by FSDP2, and they leave behind what the tests compare. FSDP2
through Trainer is meant for accelerators: the ranks here tell accelerate that they are GPUs, and talk by gloo.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser, prepare_multi_gpu_env
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny import METHODS, make_mean_model, make_model
from tiny_runs import Images, arguments, assert_same_weights, fixed_ids
from two_ranks import launch

from hf_mim.planning import step as plan_step
from hf_mim.pretraining.trainer import MIMTrainer

FOLDER = Path(__file__).parents[1] / "training" / "accelerate"
SHARED = dict(max_steps=4, train_sampling_strategy="sequential", adam_epsilon=1e-3, logging_steps=1)


def environment(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells its processes."""
    from accelerate.commands.launch import _validate_launch_command

    path = str(FOLDER / name)
    args = launch_command_parser().parse_args(["--config_file", path, "--main_process_ip", "localhost", "script.py"])
    args, _, _ = _validate_launch_command(args)
    before = dict(os.environ)
    try:
        told = prepare_multi_gpu_env(args)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {key: value for key, value in told.items() if key.startswith(("FSDP", "ACCELERATE"))}


def train(folder: Path, method: str, bf16: bool = False, **kwargs):
    """A few steps on given masks; returns the trainer."""
    model = make_mean_model(method)
    args = arguments(folder, ddp_backend="gloo", bf16=bf16, save_strategy="steps", save_steps=2, **SHARED)
    assert args.device.type == "cpu"  # also makes accelerate's state, which is corrected now
    if "ACCELERATE_USE_FSDP" in os.environ:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = MIMTrainer(model, args, Images(model, **fixed_ids(model)))
    trainer.train(**kwargs)
    trainer.save_model(str(folder / "saved"))
    return trainer


def held_bytes(model, inputs) -> int:
    """What autograd really holds after a forward pass, beside the weights; those that were gathered are freed by then
    or stand in the model."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**inputs)
    weights = {p.untyped_storage()._cdata for p in model.parameters() if type(p).__name__ != "DTensor"}
    size = sum(storage.nbytes() for address, storage in storages.items() if address not in weights)
    output.loss.backward()
    return size


def train_ranks(folder: Path, rank: int):
    fsdp = environment("fsdp2.yaml") | {"ACCELERATE_MIXED_PRECISION": "no"}
    for method in METHODS:
        train(folder / f"{method}_ddp", method)
        os.environ |= fsdp
        straight = train(folder / f"{method}_fsdp", method)
        found = {
            "sharded": [type(p).__name__ == "DTensor" for p in straight.model.parameters()],
            "local": sum(p.to_local().numel() for p in straight.model.parameters() if p.requires_grad),
        }
        if method == "stop_jepa":
            checkpoint = str(folder / f"{method}_fsdp/checkpoint-2")
            resumed = train(folder / f"{method}_fsdp", method, resume_from_checkpoint=checkpoint)
            half = train(folder / f"{method}_half", method, bf16=True)
            runs = straight, resumed, half
            found["losses"] = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in runs]
            found["dtypes"] = sorted({str(p.dtype) for p in half.model.parameters()})
            images = torch.utils.data.default_collate([half.train_dataset[index] for index in range(3)])
            found["held"] = held_bytes(half.model.train(), images)
        (folder / f"{method}_{rank}.json").write_text(json.dumps(found))
        for name in fsdp:
            os.environ.pop(name)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, "test_accelerate_files")
    return folder


def saved(folder: Path):
    from transformers import AutoModelForPreTraining

    return AutoModelForPreTraining.from_pretrained(folder / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_trains_as_ddp_does(ranks, method):
    ddp, fsdp = saved(ranks / f"{method}_ddp"), saved(ranks / f"{method}_fsdp")
    assert_same_weights(ddp, fsdp, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_sharded_as_planned(ranks, method):
    found = json.loads((ranks / f"{method}_0.json").read_text())
    assert all(found["sharded"])
    step = plan_step.examine(make_mean_model(method).config, batch_size=3, devices=2)
    assert found["local"] == step.shards["trained"]


@pytest.mark.slow
def test_fsdp2_resumes_and_follows_float32_in_bfloat16(ranks):
    found = json.loads((ranks / "stop_jepa_0.json").read_text())
    straight, resumed, half = found["losses"]
    assert resumed == straight and len(straight) == 4
    assert half == pytest.approx(straight, rel=0.02)
    assert found["dtypes"] == ["torch.float32"]  # the shards, those of the EMA target too


@pytest.mark.slow
def test_fsdp2_holds_the_activations_that_are_planned(ranks, monkeypatch):
    found, config = json.loads((ranks / "stop_jepa_0.json").read_text()), make_model("stop_jepa").config
    ids = fixed_ids(make_model("stop_jepa"))
    shapes = tuple((1, *ids[name](0).shape) for name in ("context_ids", "target_ids"))  # one mask of each image
    monkeypatch.setattr(plan_step, "mask_shapes", lambda *_: (shapes, shapes))
    held = plan_step.examine(config, batch_size=3, devices=2).fsdp
    assert found["held"] == pytest.approx(3 * held.per_image + held.fixed, rel=0.02)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))  # raises for an unknown key, but not for one of fsdp_config
    options = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(config.fsdp_config) <= set(options)
    assert config.distributed_type in (DistributedType.MULTI_GPU, DistributedType.FSDP)


def test_the_launcher_asks_for_fsdp2_as_the_file_says(monkeypatch):
    for name, value in environment("fsdp2.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # so that it takes the model's _no_split_modules

"""FSDP2 on two gloo ranks of the CPU: `two_ranks.py` has them train, and they leave behind what the tests compare.

Accelerate keeps FSDP for accelerators, though nothing in it needs one: here it is told of FSDP after it has looked at
the device. From there on all is as on accelerators: it shards each layer, and the rest together, by `fully_shard`, the
Trainer calls our callbacks, and the sharded states go into our checkpoints.
"""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from tiny import METHODS, has_target, make_mean_model, make_model, only
from tiny_runs import Images, arguments, fixed_ids, image_column
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForPreTraining, TrainerCallback

from hf_mim.data import DeviceAugment
from hf_mim.pretraining.checkpoints import check, newest_whole
from hf_mim.pretraining.probe import OnlineProbe
from hf_mim.pretraining.trainer import MIMTrainer

EQUAL = dict(max_steps=3, train_sampling_strategy="sequential", adam_epsilon=1e-4, learning_rate=0.01, logging_steps=1)
EQUAL |= dict(gradient_accumulation_steps=2, max_grad_norm=0.1, weight_decay=0.1, weight_decay_end=0.5)


class ShardedTrainer(MIMTrainer):
    """MIMTrainer with FSDP2 as its arguments say, on a CPU."""

    def create_accelerator_and_postprocess(self):
        plugin, self.args.fsdp_plugin_args = self.args.fsdp_plugin_args, None
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin)
        self.is_fsdp_enabled = True


class OneNaN(Images):
    """In a sequential run of two ranks with two images each, rank 1 meets a NaN in its second step."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if index == 6:
            item["pixel_values"][0, 0, 0] = torch.nan
        return item


class Changes(TrainerCallback):
    """What each step has changed of this rank's shards, its masks, and whether its own loss was finite."""

    def __init__(self, trainer):
        self.trainer, self.changed, self.masks, self.finite = trainer, [], [], []
        trainer.model.register_forward_hook(self.record)

    def record(self, module, args, output):
        self.masks.append(output.context_ids.tolist())
        self.finite.append(bool(output.loss.isfinite()))

    def now(self):
        model, optimizer = self.trainer.model, self.trainer.optimizer
        parts = {"online": [], "target": [], "optimizer": [list(state.values()) for state in optimizer.state.values()]}
        for name, parameter in model.named_parameters():
            parts["target" if name.startswith("target_") else "online"].append(parameter)
        return tree_map(lambda t: (t.to_local() if isinstance(t, DTensor) else t).detach().clone(), parts)

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.now()
        self.changed.append([name for name in now if not same(now[name], self.before[name])])


def sharding(model):
    """The modules that are gathered by themselves, and the parameters of which each rank has only a part."""
    modules = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor) and p.placements == (Shard(0),)]
    return dict(modules=modules, sharded=sharded)


def same(tree, other):
    ours, theirs = tree_leaves(tree), tree_leaves(other)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def make_equal_model(method):
    """Its loss is the mean over the images of a batch, and its target follows within a few steps."""
    return make_mean_model(method, **only(method, momentum_start=0.5))


def states(model, optimizer):
    """The tensors of both by name, each whole. The order is the same on all ranks, which gather them together."""
    tensors = dict(get_model_state_dict(model))
    for name, state in get_optimizer_state_dict(model, optimizer)["state"].items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in state.items()}
    return {name: whole(tensors[name]) for name in sorted(tensors)}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_on_given_masks(folder, method, batch_size, sharded):
    """A few steps in which nothing is random; on two ranks with half the batch each, or in one process."""
    model = make_equal_model(method)
    args = arguments(folder, per_device_train_batch_size=batch_size, fsdp=sharded, **EQUAL)
    images, augment = Images(model, uint8=True, **fixed_ids(model)), DeviceAugment(flip_probability=0)
    trainer = (ShardedTrainer if sharded else MIMTrainer)(model, args, images, augment)
    trainer.add_callback(OnlineProbe(trainer, args.max_steps, None, image_column(8)))
    trainer.train()
    logged = {
        name: [float(entry[name]) for entry in trainer.state.log_history if name in entry]
        for name in ("loss", "grad_norm", "probe_rank_me", "probe_std_mean")
    }
    return dict(states=states(model, trainer.optimizer), logged=logged)


def train_through_a_nan(folder, method, **kwargs):
    """Four steps on masks that are drawn, with a NaN in the second; sharded checkpoints after the third and the last.

    At the end the model is saved whole.
    """
    model = make_model(method)
    sampling = dict(train_sampling_strategy="sequential", per_device_train_batch_size=2)
    fsdp = dict(fsdp=True, fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"})
    args = arguments(folder, max_steps=4, save_strategy="steps", save_steps=3, **sampling, **fsdp)
    trainer = ShardedTrainer(model, args, OneNaN(model))
    changes = Changes(trainer)
    trainer.add_callback(changes)
    trainer.train(**kwargs)
    trainer.save_model()
    found = dict(changed=changes.changed, masks=changes.masks, finite=changes.finite, skipped=trainer.guard.skipped)
    return states(model, trainer.optimizer), found | sharding(model)


def train_ranks(folder, rank):
    findings = {}
    for method in METHODS:
        together = train_on_given_masks(folder / "equal_sharded", method, batch_size=2, sharded=True)
        torch.save(together, folder / f"{method}_sharded_{rank}.pt")
        run = folder / f"{method}_run"
        straight, findings[method] = train_through_a_nan(run, method)
        resumed, later = train_through_a_nan(run, method, resume_from_checkpoint=str(run / "checkpoint-3"))
        findings[method]["resumed"] = dict(later, equal=same(straight, resumed))
        torch.save(straight, folder / f"{method}_straight_{rank}.pt")
    (folder / f"found_sharded_{rank}.json").write_text(json.dumps(findings))


@pytest.fixture(scope="module")
def ranks(two_ranks):
    """The folder in which two ranks have left what they end with, and the findings of both."""
    return two_ranks, [json.loads((two_ranks / f"found_sharded_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("method", METHODS)
def test_all_parameters_are_sharded_and_each_layer_is_gathered_by_itself(ranks, method):
    model = make_model(method)
    layers = {name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}
    for found in ranks[1]:
        assert found[method]["sharded"] == [name for name, _ in model.named_parameters()]
        assert layers | {""} <= set(found[method]["modules"])


@pytest.fixture(scope="module", params=METHODS)
def alone(request, tmp_path_factory):
    """A method, and what one process ends with."""
    return request.param, train_on_given_masks(
        tmp_path_factory.mktemp("alone"), request.param, batch_size=4, sharded=False
    )


def test_sharded_ranks_equal_one_process_with_the_joint_batch(ranks, alone):
    (folder, _), (method, alone) = ranks, alone
    before = make_equal_model(method).state_dict()
    moved = [name for name, tensor in before.items() if (alone["states"][name] - tensor).abs().max() > 1e-4]
    assert any(name.startswith("encoder.") for name in moved)
    assert any(name.startswith("target_encoder.") for name in moved) == ("target_encoder.norm.weight" in before)
    for rank in (0, 1):
        together = torch.load(folder / f"{method}_sharded_{rank}.pt")
        for name in ("loss", "grad_norm"):
            assert len(alone["logged"][name]) == EQUAL["max_steps"]
            assert together["logged"][name] == pytest.approx(alone["logged"][name], abs=1e-5)
        for name in before:
            assert (together["states"][name] - alone["states"][name]).abs().max() <= 1e-5, name


def test_probe_of_sharded_ranks_measures_what_one_process_does(ranks, alone):
    (folder, _), (method, alone) = ranks, alone
    for rank in (0, 1):
        together = torch.load(folder / f"{method}_sharded_{rank}.pt")
        for name in ("probe_rank_me", "probe_std_mean"):
            assert len(alone["logged"][name]) == 2  # before the first step and after the last
            assert together["logged"][name] == pytest.approx(alone["logged"][name], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_nan_on_one_rank_changes_nothing_on_either(ranks, method):
    everything = ["online", *["target"] * has_target(method), "optimizer"]
    for rank, finite in enumerate(([True, True, True, True], [True, False, True, True])):
        found = ranks[1][rank][method]
        assert found["finite"] == finite
        assert found["changed"] == [everything, [], everything, everything]
        assert found["skipped"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_sharded_ranks_draw_different_masks(ranks, method):
    first, second = (found[method]["masks"] for found in ranks[1])
    assert len(first) == 4 and all(ours != theirs for ours, theirs in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as is the intent
@pytest.mark.parametrize("method", METHODS)
def test_sharded_checkpoint_loads_whole_into_one_process(ranks, method):
    folder, _ = ranks
    run = folder / f"{method}_run"
    checkpoint = newest_whole(run)
    assert checkpoint.name == "checkpoint-4"
    shards = [name for name in check(checkpoint)["files"] if name.endswith(".distcp")]
    assert sorted(shards) == [
        f"{of}_0/__{rank}_0.distcp" for of in ("optimizer", "pytorch_model_fsdp") for rank in (0, 1)
    ]

    model = make_model(method, seed=1)
    optimizer = MIMTrainer(model, arguments(folder)).create_optimizer()
    loaded = dict(model=get_model_state_dict(model))
    dcp.load(loaded, checkpoint_id=checkpoint / "pytorch_model_fsdp_0", no_dist=True)
    set_model_state_dict(model, loaded["model"])
    loaded = dict(optimizer=get_optimizer_state_dict(model, optimizer))
    dcp.load(loaded, checkpoint_id=checkpoint / "optimizer_0", no_dist=True)
    set_optimizer_state_dict(model, optimizer, loaded["optimizer"])

    found = states(model, optimizer)
    for rank in (0, 1):
        saved = torch.load(folder / f"{method}_straight_{rank}.pt")
        assert found.keys() == saved.keys() and same(found, saved)


@pytest.mark.parametrize("method", METHODS)
def test_sharded_model_is_saved_whole(ranks, method):
    folder, _ = ranks
    model = AutoModelForPreTraining.from_pretrained(folder / f"{method}_run")
    assert model.config.architectures == [type(model).__name__]
    saved = torch.load(folder / f"{method}_straight_0.pt")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_sharded_ranks_that_resume_go_on_as_if_never_stopped(ranks, method):
    for found in ranks[1]:  # the ranks have compared all that they end with, to the bit
        assert found[method]["resumed"]["equal"]
        assert found[method]["resumed"]["masks"] == found[method]["masks"][3:]

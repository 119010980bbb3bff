"""Learning rates: by depth, and schedules other than the cosine."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import METHODS, has_target, make_model
from tiny_runs import AtEachStep, Images, arguments

from hf_mim.models.target_encoder import online_encoder
from hf_mim.pretraining.trainer import MIMTrainer


@pytest.mark.parametrize("method", METHODS)
def test_rates_fall_from_block_to_block_of_the_online_encoder_alone(tmp_path, method):
    model, seen = make_model(method, num_hidden_layers=3), {}

    def record(state, optimizer):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen.setdefault(names[id(parameter)], []).append(group["lr"])

    args = arguments(tmp_path, max_steps=4, warmup_steps=2, encoder_layer_decay=0.5)
    trainer = MIMTrainer(model, args, Images(model), callbacks=[AtEachStep(record)])
    trainer.train()
    prefix = next(name for name, part in model.named_children() if part is online_encoder(model))
    assert prefix == "encoder"
    scales = {"embeddings": 1 / 16, "layers.0": 1 / 8, "layers.1": 1 / 4, "layers.2": 1 / 2, "norm": 1}
    for name, rates in seen.items():
        part = next((part for part in scales if name.startswith(f"{prefix}.{part}.")), None)
        expected = scales[part] if name.startswith(f"{prefix}.") else 1
        assert rates == pytest.approx([0, 5e-4 * expected, 1e-3 * expected, 5e-4 * expected]), name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert seen.keys() == trained
    assert not has_target(method) or not any(name.startswith("target_") for name in seen)
    assert [log["learning_rate"] for log in trainer.state.log_history if "loss" in log][:1] == [0]


@pytest.mark.parametrize("method", ["mae"])
def test_a_resume_keeps_the_rates_by_depth(tmp_path, method):
    def run(resume, record=None):
        model = make_model(method)
        options = dict(save_strategy="steps", save_steps=4, encoder_layer_decay=0.5)
        trainer = MIMTrainer(model, arguments(tmp_path, **options), Images(model), callbacks=[AtEachStep(record)])
        trainer.train(resume_from_checkpoint=resume)

    first, second = {}, {}
    run(None, lambda state, optimizer: first.update({state.global_step: [g["lr"] for g in optimizer.param_groups]}))
    resume = str(tmp_path / "checkpoint-4")
    run(resume, lambda state, optimizer: second.update({state.global_step: [g["lr"] for g in optimizer.param_groups]}))
    assert second and all(second[step] == first[step] for step in second)


SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]
STABLE = {"lr_scheduler_type": "warmup_stable_decay"}


def seen_schedules(tmp_path, **options):
    """(learning rate, weight decay, progress) of each of 8 steps."""
    model, seen, told = make_model("mae"), [], []
    model.set_progress = told.append

    def look(state, optimizer):
        seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups if group["decays"]])

    options = dict(weight_decay=0.1, weight_decay_end=0.3, learning_rate=1e-3) | options
    MIMTrainer(model, arguments(tmp_path, **options), Images(model), callbacks=[AtEachStep(look)]).train()
    return [(*groups[0], progress) for groups, progress in zip(seen, told, strict=True)]


def test_warmup_stable_decay_rises_stays_and_falls_and_takes_all_else_along(tmp_path):
    options = dict(warmup_steps=2, decay_steps=2, start_lr_ratio=0.5, final_lr_ratio=0.2)
    rates, decays, told = zip(*seen_schedules(tmp_path, **STABLE, **options), strict=True)
    assert rates == pytest.approx([5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 6e-4])
    assert told == (0, 0, 0, 0, 0, 0, 0, 0.5)
    assert decays == pytest.approx([0.1] * 7 + [0.2])


def test_constant_stays_at_the_peak_after_the_warm_up(tmp_path):
    options = dict(lr_scheduler_type="constant", warmup_steps=2, final_lr_ratio=0.2)
    rates, decays, told = zip(*seen_schedules(tmp_path, **options), strict=True)
    assert rates == pytest.approx([0, 5e-4] + [1e-3] * 6) and set(decays) == {0.1} and set(told) == {0}


def test_a_share_of_the_run_decays(tmp_path):
    args = arguments(tmp_path, **STABLE)
    assert [args.decay_start(steps) for steps in (8, 100, 300)] == [7, 90, 270]
    assert arguments(tmp_path, decay_steps=0.25, **STABLE).decay_start(8) == 6
    assert arguments(tmp_path).decay_start(8) is None


def test_warm_up_and_decay_that_are_longer_than_the_run_are_refused(tmp_path):
    model = make_model("mae")
    with pytest.raises(ValueError, match="^warmup_steps and decay_steps must together be at most the 8 steps"):
        MIMTrainer(model, arguments(tmp_path, warmup_steps=5, decay_steps=4, **STABLE), Images(model)).train()


@pytest.mark.parametrize(
    ("first", "second", "method"),
    [(6, 9, "mae"), (6, 9, "stop_jepa"), *(pytest.param(200, 300, name, marks=SLOW) for name in METHODS)],
)
def test_a_run_that_is_made_longer_is_the_longer_run_to_the_bit(tmp_path, method, first, second):
    def run(name, steps, resume=None):
        model = make_model(method, drop_path_rate=0.1)
        options = dict(max_steps=steps, warmup_steps=2, save_strategy="steps", save_steps=steps, save_total_limit=1)
        args = arguments(tmp_path / name, weight_decay_end=0.2, decay_steps=1 / 3, **options, **STABLE)
        MIMTrainer(model, args, Images(model)).train(resume_from_checkpoint=resume and str(resume))

    run("short", first)
    run("whole", second)
    before = tmp_path / "short" / f"checkpoint-{first - first // 3 - (first % 3 == 2)}"
    assert before.is_dir() and (tmp_path / "short" / f"checkpoint-{first}").is_dir()  # kept though the limit is 1
    run("longer", second, resume=before)
    for step in (second * 2 // 3, second):  # where the decay begins, and at the end
        one, other = (tmp_path / name / f"checkpoint-{step}" for name in ("whole", "longer"))
        weights, same = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
        assert all(torch.equal(x, same[name]) for name, x in weights.items())
        moments, theirs = (torch.load(folder / "optimizer.pt")["state"] for folder in (one, other))
        assert all(torch.equal(x, theirs[key][name]) for key, state in moments.items() for name, x in state.items())

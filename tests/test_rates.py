"""Learning rates by depth."""

import pytest
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

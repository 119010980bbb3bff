"""The FLOPs of a step by each method's formula, those that are counted, and what a run logs of them."""

import json

import pytest
import torch
from tiny import METHODS, make_model
from tiny_runs import Images, arguments

from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.pretraining.flops import StepFlops
from hf_mim.pretraining.trainer import MIMTrainer
from hf_mim.testing import check_flops, counted_flops, images_for

FROZEN = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40, use_cls_token=True)
FROZEN |= dict(layer_norm_eps=1e-6, hidden_act="gelu", num_register_tokens=2)
SETTINGS = [
    *((method, {}) for method in METHODS),
    *((method, dict(num_register_tokens=3, intermediate_size=72)) for method in METHODS),
    *((method, dict(num_channels=5, image_size=(24, 16))) for method in METHODS),
    ("mae", dict(use_cls_token=False, decoder_num_hidden_layers=2, decoder_hidden_size=48)),
    ("mae", dict(mask_unit=2)),
    ("mae", dict(decoder_attention="cross", decoder_targets=0.4, decoder_num_hidden_layers=3)),
    ("latent_mim", dict(use_cls_token=False, decoder_num_hidden_layers=3, loss_type="norm_l2")),
    ("latent_mim", dict(mask_target=False, projector_num_layers=1)),
    ("latent_mim", dict(target_config=FROZEN)),
    ("stop_jepa", dict(position_noise_std=0.0, predictor_num_hidden_layers=2)),
    ("stop_jepa", dict(noise_on="both", tie_noise_projection=False, masks_per_image=3)),
    ("stop_jepa", dict(noise_on="context", use_mask_token=False, num_targets=2)),
    ("stop_jepa", dict(target_config=FROZEN, position_embedding="learned")),
    ("sym_mim", dict(masks_per_image=2, projector_size=16)),
    ("sym_mim", dict(mask_pattern="random", masks_per_image=3, decoder_num_hidden_layers=2)),
    ("sym_mim", dict(contrast_weight=0.0)),
    ("interactive_mim", dict(num_channels=4, modalities={"rgb": 3, "ir": 1}, decoder_num_hidden_layers=2)),
    ("interactive_mim", dict(num_channels=4, modalities={"rgb": 3, "ir": 1}, modality_masking="shared")),
    ("interactive_mim", dict(interaction_num_layers=0, use_cls_token=False)),
]


@pytest.mark.parametrize("method, changes", SETTINGS)
def test_formula_gives_each_matrix_product_that_torch_counts(method, changes):
    model = make_model(method, **changes).train()
    images, grid = images_for(model, 3), model.config.grid_size
    torch.manual_seed(0)
    masks = model.draw_masks(3, grid, **model.training_masks())
    formula = model.step_flops(3, grid, masks)
    assert formula == sum(counted_flops(model, images, **masks))


def test_images_of_another_size_count_by_their_own_grid():
    model = make_model("latent_mim")
    rows, columns = model.config.training_size
    large = torch.randn(2, 3, 2 * rows, columns)
    masks = model.draw_masks(2, (12, 6))
    assert StepFlops(model)(large.shape, masks) == sum(counted_flops(model.train(), large, **masks))


def test_check_method_finds_a_formula_that_is_2_percent_off(monkeypatch):
    right = MAEForPreTraining.step_flops
    monkeypatch.setattr(MAEForPreTraining, "step_flops", lambda *args: round(1.02 * right(*args)))
    with pytest.raises(AssertionError, match="step_flops must be"):
        check_flops(None, lambda: make_model("mae"))


def train(folder, method="mae", resume=None, **settings):
    model = make_model(method)
    seen = []
    forward = model.forward

    def recorded(pixel_values, **kwargs):
        output = forward(pixel_values, **kwargs)
        seen.append(StepFlops(model)(pixel_values.shape, output))
        return output

    model.forward = recorded
    args = arguments(folder, max_steps=4, logging_steps=1, save_steps=2, gradient_accumulation_steps=2, **settings)
    trainer = MIMTrainer(model, args, Images(model))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.mark.parametrize("method", ["mae", "stop_jepa"])
def test_total_flos_is_the_sum_over_all_batches_and_goes_on_in_a_resumed_run(tmp_path, method):
    trainer, seen = train(tmp_path, method, save_strategy="steps")
    assert len(seen) == 8 and trainer.state.total_flos == sum(seen)
    assert trainer.state.log_history[-1]["total_flos"] == sum(seen)
    held = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert held["total_flos"] == sum(seen[:4])
    resumed, rest = train(tmp_path, method, resume=str(tmp_path / "checkpoint-2"), save_strategy="steps")
    assert rest == seen[4:] and resumed.state.total_flos == sum(seen)


def test_tflops_are_the_flops_of_the_logged_steps_by_their_seconds(tmp_path):
    trainer, seen = train(tmp_path)
    logged = [entry for entry in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "loss" in entry]
    for number, entry in enumerate(logged):
        flops = seen[2 * number] + seen[2 * number + 1]
        assert entry["tflops"] * 1e12 * entry["seconds"] == pytest.approx(flops)


def test_a_method_without_a_formula_logs_no_flops(tmp_path, monkeypatch):
    monkeypatch.delattr(MAEForPreTraining, "step_flops")
    trainer = MIMTrainer(model := make_model("mae"), arguments(tmp_path, max_steps=1), Images(model))
    trainer.train()
    assert trainer.state.total_flos == 0
    assert not any(entry.keys() & {"tflops", "total_flos"} for entry in trainer.state.log_history)

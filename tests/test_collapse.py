"""The collapse alarm: its signals against plain computations, its verdicts on made-up logs, and runs of tiny models
that are healthy or made to collapse."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny import METHODS, has_target, make_model
from tiny_runs import Images, arguments
from transformers import TrainerControl, TrainerState

from hf_mim import methods
from hf_mim.models.configuration_latent_mim import LatentMIMConfig
from hf_mim.models.configuration_stop_jepa import StopJepaConfig
from hf_mim.models.signals import error_over_constant, target_signals
from hf_mim.pretraining.collapse import CollapseAlarm, verdicts
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.run import Pretraining
from hf_mim.pretraining.settings import read_yaml
from hf_mim.pretraining.trainer import MIMTrainer

RECIPES = Path(__file__).parents[1] / "training" / "recipes"

# ---- signals


def slow_signals(targets, ids, num_places):
    """The definitions, in loops."""
    size = targets.square().mean(dim=(0, 1)).sum()
    groups = [targets[ids == place] for place in range(num_places)]
    squares = sum((group - group.mean(0)).square().sum() for group in groups if len(group))
    within = squares / (ids.numel() - sum(len(group) > 0 for group in groups))
    varying = (targets - targets.mean(dim=(0, 1))).square().sum() / ids.numel()
    means = targets.mean(dim=1)
    pairs = [(i, j) for i in range(len(means)) for j in range(len(means)) if i != j]
    return {
        "target_std": (within / size).sqrt(),
        "target_position_share": 1 - within / varying,
        "target_cosine": torch.stack([F.cosine_similarity(means[i], means[j], dim=0) for i, j in pairs]).mean(),
    }


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn places", "all places"])
def test_signals_are_what_they_say(drawn):
    torch.manual_seed(0)
    count = 5 if drawn else 9
    ids = torch.stack([torch.randperm(9)[:count] if drawn else torch.arange(9) for _ in range(6)])
    targets = torch.randn(9, 16)[ids] + torch.randn(6, 1, 16) + torch.randn(6, count, 16) + 0.5
    signals = target_signals(targets, ids, 9) if drawn else target_signals(targets)
    for name, value in slow_signals(targets.double(), ids, 9).items():
        assert signals[name].item() == pytest.approx(value.item(), abs=1e-5), name
        assert signals[name].ndim == 0 and not signals[name].requires_grad


def test_the_degenerate_targets_are_told_apart():
    torch.manual_seed(0)
    ids = torch.rand(64, 49).argsort(1)[:, :30]
    constant = F.layer_norm(torch.randn(32) + 1e-3 * torch.randn(64, 30, 32), (32,))
    by_place = F.layer_norm(torch.randn(49, 32)[ids] + 1e-3 * torch.randn(64, 30, 32), (32,))
    diverse = F.layer_norm(torch.randn(64, 30, 32), (32,))
    constant, by_place, diverse = (target_signals(targets, ids, 49) for targets in (constant, by_place, diverse))
    assert constant["target_std"] < 0.01 and by_place["target_std"] < 0.01 and diverse["target_std"] > 0.9
    assert constant["target_position_share"] < 0.1 and diverse["target_position_share"] < 0.1
    assert by_place["target_position_share"] > 0.99
    assert constant["target_cosine"] > 0.99 and diverse["target_cosine"] < 0.1


def test_the_standard_deviation_of_a_small_batch_is_not_biased():
    """The mean of a place takes up one observation: of four images, a quarter of their variance."""
    torch.manual_seed(0)
    values = [target_signals(torch.randn(4, 9, 64))["target_std"] ** 2 for _ in range(50)]
    assert torch.stack(values).mean() == pytest.approx(1, abs=0.03)


def test_images_that_share_no_place_have_no_spread():
    """As two images whose checkerboards are inverse: NaN, which no mean of a log counts, and not 0, a collapse."""
    torch.manual_seed(0)
    ids = torch.stack([torch.arange(0, 16, 2), torch.arange(1, 16, 2)])
    for targets in torch.randn(20, 2, 8, 24):
        signals = target_signals(targets, ids, 16)
        assert signals["target_std"].isnan() and signals["target_position_share"].isnan()
        assert signals["target_cosine"].isfinite()


def test_one_image_has_no_signals_and_zeros_are_finite():
    assert target_signals(torch.randn(1, 9, 4)) == {}
    assert target_signals(torch.zeros(3, 9, 4))["target_std"] == 0
    assert all(value.isfinite() for value in target_signals(torch.zeros(3, 9, 4)).values())


def test_error_over_constant_is_one_minus_r2():
    torch.manual_seed(0)
    targets = torch.randn(3, 2, 5, 8) + 2
    mean = targets.mean(dim=(0, 1, 2))
    assert error_over_constant(mean.expand_as(targets), targets) == pytest.approx(1, abs=1e-5)
    assert error_over_constant((targets + mean) / 2, targets) == pytest.approx(0.25, abs=1e-5)


@pytest.mark.parametrize("loss_type", ["patch_discrimination", "norm_l2"])
def test_a_constant_prediction_of_latent_mim_has_an_error_of_one(loss_type):
    torch.manual_seed(0)
    model = make_model("latent_mim", loss_type=loss_type)
    targets = torch.randn(4, 27, 32)
    normalized = (targets - targets.mean(-1, keepdim=True)) / targets.std(-1, keepdim=True)
    predictions = torch.zeros(()) if loss_type == "patch_discrimination" else normalized.mean(dim=(0, 1))
    predictions = predictions.expand_as(targets)
    _, metrics = model.loss(predictions, targets, torch.randn(4, 9, 32))
    assert metrics["error_over_constant"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", [name for name in METHODS if has_target(name)])
def test_the_models_report_the_signals_of_their_targets(method):
    model = make_model(method).eval()
    output = model(torch.randn(6, 3, *model.config.training_size))
    if method == "latent_mim":
        expected = slow_signals(output.targets, output.target_ids, 36)
        for name, value in expected.items():
            assert output.metrics[name].item() == pytest.approx(value.item(), abs=1e-4)
    names = {"target_std", "target_position_share", "target_cosine", "error_over_constant"}
    assert names <= output.metrics.keys()
    assert all(output.metrics[name].ndim == 0 and output.metrics[name].isfinite() for name in names)


# ---- verdicts


class Log:
    """A run that logs what it is given, every `every` steps, to an alarm."""

    def __init__(self, model=None, every=10, history=(), stop=False):
        self.alarm, self.every = CollapseAlarm(stop), every
        self.model = model or SimpleNamespace(config=StopJepaConfig())
        self.state, self.control = TrainerState(log_history=list(history), max_steps=1000), TrainerControl()
        self.args = SimpleNamespace(world_size=1, learning_rate=1e-3)

    def __call__(self, *values, name="target_std", **others):
        for value in values:
            self.state.global_step += self.every
            logs = {name: value} | others
            self.state.log_history.append(logs | {"step": self.state.global_step})
            self.alarm.on_log(self.args, self.state, self.control, logs=logs, model=self.model)

    @property
    def verdicts(self):
        return [entry["collapsed"] for entry in self.state.log_history if "collapsed" in entry]


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "hf_mim.pretraining.collapse")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "hf_mim.pretraining.collapse"]


def test_a_collapse_is_told_once_and_again_when_it_comes_back(warnings):
    log = Log()
    log(0.6, 0.5, 0.1, 0.1, 0.1, 0.1)
    assert log.verdicts == [0, 0, 0, 1, 1, 1] and len(warnings()) == 1
    log(0.5, 0.1, 0.5, 0.5)  # one healthy log does not end it, two do
    assert log.verdicts[6:] == [1, 1, 1, 0] and len(warnings()) == 1
    log(0.1, 0.1, 0.1)
    assert log.verdicts[10:] == [0, 1, 1] and len(warnings()) == 2
    assert warnings()[0].startswith("Since step 30 ") and warnings()[1].startswith("Since step 110 ")


def test_the_warning_says_what_it_saw_and_what_to_change(warnings):
    log = Log(SimpleNamespace(config=StopJepaConfig(momentum_start=0)))
    log(0.6, target_cosine=0.7, target_position_share=0.3)
    log(0.1, 0.09, target_cosine=0.995, target_position_share=0.3)
    (text,) = warnings()
    assert "\n" not in text
    assert "Since step 20 the targets collapse: they are nearly constant. At step 30: target_std 0.09 " in text
    assert "(at step 10: 0.6), target_cosine 0.995 (at step 10: 0.7)" in text
    assert "Try first: momentum_start nearer to 1 (published 0.996), now 0; learning_rate lower" in text
    other = Log(SimpleNamespace(config=LatentMIMConfig(loss_type="norm_l2")))
    other(0.6, 0.1, 0.1)
    assert "loss_type patch_discrimination, now norm_l2" in warnings()[1]


def test_targets_that_never_told_images_apart_are_told_at_once(warnings):
    log = Log(stop=True)
    log(0.0, 0.0, 1e-9, 0.0)
    assert log.verdicts == [0, 1, 1, 1] and log.control.should_training_stop
    (text,) = warnings()
    assert text.startswith(
        "The targets have never told images apart: target_std 0 at step 10 and 0 at step 20. Look at"
    )
    assert "\n" not in text


def test_images_that_are_all_alike_raise_the_alarm_in_a_run(warnings, tmp_path):
    model = make_model("stop_jepa")
    images = Images(model, uint8=True)
    images.shape, grey = images.shape, torch.full(images.shape, 128, dtype=torch.uint8)
    images.__class__ = type("Alike", (Images,), {"__getitem__": lambda self, index: {"pixel_values": grey}})
    args = arguments(tmp_path, max_steps=3, logging_steps=1)
    MIMTrainer(model, args, train_dataset=images, augment=lambda pixels: pixels.float() / 128 - 1).train()
    assert "The targets have never told images apart" in warnings()[0]


def test_targets_of_the_place_alone_are_called_so(warnings):
    log = Log()
    log(0.6, target_position_share=0.3)
    log(0.05, 0.05, target_position_share=0.97)
    assert "they tell the place of a patch and not the image" in warnings()[0]


def test_a_whole_log_tells_what_is_collapsed_and_what_has_recovered():
    def log(*values):
        return [{"step": 10 * number, "target_std": value} for number, value in enumerate(values)]

    assert verdicts(log(0.6, 0.5, 0.5)) == verdicts([]) == verdicts([{"step": 1, "loss": 1.0}]) == ([], [])
    (now,), before = verdicts(log(0.6, 0.1, 0.1))
    assert now.startswith("Since step 10 the targets collapse: they are nearly constant.") and not before
    assert verdicts(log(0.6, 0.1, 0.1, 0.5, 0.5)) == ([], ["From step 10 the targets collapsed, and recovered later."])


def test_what_is_no_collapse_is_not_called(warnings):
    log = Log()
    log(0.6, 0.1, 0.6, 0.1, 0.5, 0.3, 0.25, 0.25, float("nan"), float("nan"))
    assert not warnings() and not any(log.verdicts)
    low = Log()
    low(0.1, 0.08, 0.07, 0.06, 0.1)  # as low from the start: an encoder that tells patches by their place
    Log(history=[])(2.0, 1.0, name="loss")
    assert not warnings() and not any(low.verdicts)


@pytest.mark.parametrize("name, first, last", [("probe_std_mean", 0.12, 0.01), ("probe_effective_rank", 6.0, 1.1)])
def test_health_is_judged_when_it_is_probed(warnings, name, first, last):
    log = Log(every=100)
    log(first, last, name=name, probe_rank_me=2.0)
    log(0.5, 0.5)
    assert not warnings()
    log(last, name=name, probe_rank_me=1.0)
    assert len(warnings()) == 1 and "Since step 200 the features collapse" in warnings()[0]


def test_a_stop_saves_the_state(warnings):
    log = Log(stop=True)
    log(0.6, 0.1)
    assert not log.control.should_training_stop
    log(0.1)
    assert log.control.should_training_stop and log.control.should_save
    silent = Log()
    silent(0.6, 0.1, 0.1)
    assert not silent.control.should_training_stop


def test_a_resumed_run_goes_on_in_its_history(warnings):
    before = Log()
    before(0.6, 0.1)
    after = Log(history=before.state.log_history)
    after.state.global_step = 20
    after(0.1)
    assert len(warnings()) == 1 and warnings()[0].startswith("Since step 20 ")
    again = Log(history=after.state.log_history, stop=True)
    again.state.global_step = 30
    again(0.1)
    assert len(warnings()) == 1 and again.control.should_training_stop


def test_the_verdict_is_in_the_log_of_a_run(tmp_path):
    model = make_model("stop_jepa")
    trainer = MIMTrainer(model, arguments(tmp_path, logging_steps=2), Images(model))
    trainer.train()
    logged = [entry["collapsed"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0.0] * 5


# ---- runs: nothing of them is made up


def run(tmp_path, method, **settings):
    """A run of the recipe on the digits, with an alarm that stops it; the share of its steps that it took."""
    recipe = read_yaml(RECIPES / f"digits_{method}.yaml")
    options = {"output_dir": str(tmp_path), "knn": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = Pretraining(Recipe.resolve(recipe | options | settings | {"stop_on_collapse": True})).trainer
    trainer.train()
    return trainer.state.global_step / trainer.state.max_steps


# Latent MIM does not collapse without the gap and the discrimination alone: the similarity term holds latents apart.
# SymMIM does not collapse without momentum, nor at a weight decay of 50: its contrast and its reconstruction hold the
# images apart. What breaks it is a high rate: 50 times that of the recipe may be enough, 5,000 times always was.
COLLAPSING = {
    "stop_jepa": {"momentum_start": 0, "momentum_end": 0},
    "latent_mim": {"patch_gap": 0, "loss_type": "norm_l2", "similarity_weight": 0},
    "sym_mim": {"base_lr": 10.0},
}
SMALLER = {"hidden_size": 64, "num_hidden_layers": 2, "per_device_train_batch_size": 64, "num_train_epochs": 20}


def test_every_method_with_a_target_is_made_to_collapse():
    """MAE and Interactive MIM reconstruct pixels: they have no target that could. I-JEPA is a setting of StoP-JEPA."""
    own = {name for name in METHODS if has_target(name) and methods.get(name).variant_of is None}
    assert COLLAPSING.keys() == own and not has_target("mae") and not has_target("interactive_mim")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", COLLAPSING)
def test_a_run_made_to_collapse_is_called_before_a_quarter_of_it(method, tmp_path, warnings):
    for seed in range(5):
        assert run(tmp_path / str(seed), method, seed=seed, logging_steps=20, **COLLAPSING[method]) < 0.25
        assert len(warnings()) == seed + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", COLLAPSING)
def test_a_healthy_run_is_never_called(method, tmp_path, warnings):
    for seed in range(5):
        assert run(tmp_path / str(seed), method, seed=seed, **SMALLER) == 1
    assert not warnings()

"""A setting that is given at a resume takes effect, or is refused by name."""

import shutil

import pytest
from PIL import Image
from tiny import make_model
from tiny_runs import AtEachStep, Images, arguments

from hf_mim.pretraining.recipe import RUN_FIELDS, TRAINING_FIELDS, Recipe
from hf_mim.pretraining.resume import FIXED, check_run_folder
from hf_mim.pretraining.trainer import MIMTrainer
from hf_mim.run_folder import RECIPE

SHARED = dict(max_steps=8, logging_steps=4, save_steps=4, save_strategy="steps", learning_rate=1e-3)


def run(folder, resume=False, **settings):
    """The trainer, and for each step of this start (rate, betas, weight decay)."""
    seen = []

    def look(state, optimizer):
        group = next(group for group in optimizer.param_groups if group["decays"])
        seen.append((group["lr"], group["betas"], group["weight_decay"]))

    model = make_model("mae")
    trainer = MIMTrainer(model, arguments(folder, **SHARED | settings), Images(model, 32), callbacks=[AtEachStep(look)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


@pytest.fixture
def begun(tmp_path):
    """A run of eight steps that was ended after four."""
    _, seen = run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-8")
    return tmp_path, seen


def test_a_resume_with_the_same_settings_has_the_same_rates_to_the_bit(begun):
    folder, seen = begun
    assert run(folder, resume=True)[1] == seen[4:]


@pytest.mark.parametrize(
    "changed",
    [
        dict(learning_rate=1e-5),
        dict(adam_beta2=0.9),
        dict(weight_decay=0.3),
        dict(final_lr_ratio=0.5),
        dict(max_steps=6),
    ],
)
def test_rate_betas_decay_and_length_are_those_that_are_given_now(begun, tmp_path_factory, changed):
    folder, _ = begun
    _, expected = run(tmp_path_factory.mktemp("whole"), **changed)  # a run that had them from its start
    assert run(folder, resume=True, **changed)[1] == expected[4:]


def test_logs_and_saves_come_as_often_as_is_said_now(begun):
    folder, _ = begun
    trainer, _ = run(folder, resume=True, logging_steps=1, save_steps=1)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 4, 5, 6, 7, 8]
    assert (folder / "checkpoint-7").is_dir()


@pytest.fixture
def held(tmp_path, pictures):
    """A run folder with nothing but its recipe."""
    recipe = Recipe.read(None, {"dataset": str(pictures), "output_dir": str(tmp_path / "run"), "size": "tiny"})
    recipe.run.image_mean, recipe.run.image_std = [0.5] * 3, [0.25] * 3
    (tmp_path / "run").mkdir()
    recipe.save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40)).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path / "pictures"


OTHER = {
    "train_split": "test",
    "image_column": "picture",
    "missing_modality": "zero",
    "streaming": True,
    "shuffle_buffer": 7,
    "image_mean": "0.1,0.1,0.1",
    "image_std": "0.1,0.1,0.1",
    "value_range": "0,7",
    "nodata": "7",
    "seed": 7,
    "data_seed": 7,
    "optim": "adamw_torch",
    "optim_args": "fused=false",
    "encoder_layer_decay": 0.7,
    "keep_best": "probe_rank_me",
    "dataloader_drop_last": False,
    "train_sampling_strategy": "sequential",
}


@pytest.mark.parametrize("name", FIXED)
def test_what_must_stay_is_refused_by_name(held, name):
    others = {"keep_best": {"probe_every": 1}, "missing_modality": {"image_column": "rgb,ir"}}.get(name, {})
    recipe = Recipe.read(None, {"resume": True, "output_dir": str(held), name: OTHER[name]} | others)
    with pytest.raises(ValueError, match=rf"^{name} is .*, but the run in {held} has "):
        check_run_folder(held, recipe)


def test_a_resume_without_a_change_is_accepted(held):
    check_run_folder(held, Recipe.read(None, {"resume": True, "output_dir": str(held)}))


def test_each_fixed_setting_was_tried():
    assert OTHER.keys() == set(FIXED) and set(FIXED) <= RUN_FIELDS.keys() | TRAINING_FIELDS.keys()


@pytest.mark.parametrize("content", ["", "dataset: pho", "# run\nmethod: mae\ndataset: photos\n"])
def test_a_recipe_that_is_cut_off_is_no_recipe(held, content):
    (held / RECIPE).write_text(content)
    with pytest.raises(ValueError, match="recipe.yaml is cut off, or was written by hand: its last line must be"):
        Recipe.read(None, {"resume": True, "output_dir": str(held)})


def test_a_recipe_is_whole_or_absent(held, monkeypatch):
    before = (held / RECIPE).read_text()
    monkeypatch.setattr("yaml.dump", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError):
        Recipe.read(None, {"resume": True, "output_dir": str(held)}).save(held)
    assert (held / RECIPE).read_text() == before and not list(held.glob("*.part"))


@pytest.mark.parametrize("removed, named", [("optimizer.pt", "optimizer"), ("scheduler.pt", "scheduler")])
def test_a_checkpoint_without_the_state_of_the_training_is_no_place_to_go_on_from(begun, removed, named):
    folder, _ = begun
    (folder / "checkpoint-4" / removed).unlink()
    (folder / "checkpoint-4" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=f"checkpoint-4 has no {named} .save_only_model leaves them out"):
        run(folder, resume=str(folder / "checkpoint-4"))


def test_a_run_that_saved_only_its_model_is_not_resumed(tmp_path):
    run(tmp_path, save_only_model=True)
    with pytest.raises(ValueError, match="checkpoint-8 has no optimizer and no scheduler"):
        run(tmp_path, resume=True)


def test_the_seed_of_a_checkpoint_must_stay(begun):
    folder, _ = begun
    with pytest.raises(ValueError, match="seed must stay 42, as in .*checkpoint-4, got 7"):
        run(folder, resume=True, seed=7)

"""Checkpoints are whole or absent: what a manifest finds, which one a resume takes, what rotation keeps."""

import json
import os
import shutil

import pytest
from tiny import make_model
from tiny_runs import Images, arguments

from hf_mim.pretraining import checkpoints
from hf_mim.pretraining.trainer import MIMTrainer


def make(run, step, size=1000):
    folder = run / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes([step % 256]) * size)
    (folder / "shards" / "0.distcp").write_bytes(b"shard")
    checkpoints.write_manifest(folder, step=step)
    return folder


def cut(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(500)


def flip_a_byte(folder):
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(b"\xff")


DAMAGES = {
    "has 500 of 1000 bytes of model.safetensors": cut,
    "has other bytes in model.safetensors than were saved": flip_a_byte,
    "lacks model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "lacks shards/0.distcp": lambda folder: shutil.rmtree(folder / "shards"),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "has a damaged manifest.json": lambda folder: (folder / "manifest.json").write_text('{"files": '),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_resume_takes_the_newest_whole_one_and_says_which_it_passed_over(tmp_path, says):
    make(tmp_path, 9)
    make(tmp_path, 100)  # the text "checkpoint-9" is the greater
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-100"
    DAMAGES[says](tmp_path / "checkpoint-100")
    told = []
    assert checkpoints.newest_whole(tmp_path, told.append).name == "checkpoint-9"
    assert told == [f"checkpoint-100 is passed over: it {says}"]


def test_rotation_never_deletes_the_last_whole_one_whatever_the_clock_says(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
        os.utime(tmp_path / f"checkpoint-{step}", (1e9 - step, 1e9 - step))  # the clock runs backwards
    cut(tmp_path / "checkpoint-3")
    cut(tmp_path / "checkpoint-4")
    checkpoints.rotate(tmp_path, limit=1)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2"]
    cut(tmp_path / "checkpoint-2")
    checkpoints.rotate(tmp_path, limit=1)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2"]  # nothing better is there


def test_rotation_keeps_what_was_measured_on_a_checkpoint(tmp_path):
    for step in (1, 2):
        make(tmp_path, step)
    (tmp_path / "checkpoint-1/results").mkdir()
    (tmp_path / "checkpoint-1/results/knn_photos.json").write_text("{}")
    checkpoints.rotate(tmp_path, limit=1)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert (tmp_path / "results/checkpoint-1/knn_photos.json").read_text() == "{}"


def test_rotation_keeps_the_best_one_too(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    checkpoints.rotate(tmp_path, 1, keep=["checkpoint-1"])
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-1"]


def test_a_whole_checkpoint_of_the_same_step_stays_and_a_damaged_one_is_replaced(tmp_path):
    final = make(tmp_path, 5)
    flip_a_byte(final)
    staged = shutil.move(make(tmp_path / "other", 5), tmp_path / "staged")
    checkpoints.commit(tmp_path / "staged", final)
    assert checkpoints.is_whole(final) and not os.path.exists(staged)


def test_files_written_aside_take_their_place_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError), checkpoints.written_aside(tmp_path) as folder:
        (folder / "a").write_text("new")
        raise OSError("the disk is full")
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]
    with checkpoints.written_aside(tmp_path) as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


# ---- by the trainer


def train(folder, **settings):
    resume, images = settings.pop("resume", None), settings.pop("images", 24)
    model = make_model("mae")
    args = arguments(folder, **dict(max_steps=6, save_strategy="steps", save_steps=2) | settings)
    trainer = MIMTrainer(model, args, Images(model, images))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_leaves_whole_checkpoints_by_the_limit_and_nothing_else(tmp_path):
    train(tmp_path, save_total_limit=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "checkpoint-6", "metrics.jsonl"]
    manifest = checkpoints.check(tmp_path / "checkpoint-6")
    assert manifest["images_per_step"] == 4 and manifest["step"] == 6
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= set(manifest["files"])


def test_a_run_resumed_past_a_damaged_checkpoint_ends_alike(tmp_path, caplog):
    straight = train(tmp_path)
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    cut(tmp_path / "checkpoint-4")
    (tmp_path / "_saving" / "checkpoint-5").mkdir(parents=True)  # what a kill has left
    resumed = train(tmp_path, resume=True)
    passed_over = [line for line in caplog.messages if "passed over" in line]
    assert len(passed_over) == 2 and "checkpoint-6 is passed over: it lacks optimizer.pt" in passed_over[0]
    for ours, theirs in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert ours.equal(theirs)
    assert checkpoints.is_whole(tmp_path / "checkpoint-6") and not (tmp_path / "_saving").exists()


def test_a_run_that_is_done_makes_no_step_more(tmp_path):
    train(tmp_path, images=28)  # it ends within an epoch
    resumed = train(tmp_path, images=28, resume=True)
    assert resumed.state.global_step == 6
    assert not (tmp_path / "checkpoint-7").exists()


def test_the_best_checkpoint_is_known_by_its_name(tmp_path):
    model = make_model("mae")
    settings = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, save_total_limit=1)
    options = dict(load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False)
    images = dict(train_dataset=Images(model), eval_dataset=Images(model, 8))
    trainer = MIMTrainer(model, arguments(tmp_path, **settings, **options), **images)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best in [str(path) for path in checkpoints.checkpoints(tmp_path)]
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert "_saving" not in json.dumps(state) and str(tmp_path) not in json.dumps(state)  # it may be uploaded
    trainer.save_state()
    assert str(tmp_path) not in (tmp_path / "trainer_state.json").read_text()
    resumed = MIMTrainer(make_model("mae"), arguments(tmp_path, **settings, **options), **images)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == best == trainer.state.best_model_checkpoint


def test_all_files_of_a_run_have_the_modes_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        train(tmp_path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in files)
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


# ---- what a resume refuses


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path):
    train(tmp_path)
    cut(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="^resume_from_checkpoint: .*checkpoint-4 has 500 of .* bytes of model.safe"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_no_whole_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="^resume_from_checkpoint: .* has no whole checkpoint; to begin again, move"):
        train(tmp_path, resume=True)
    with pytest.raises(ValueError, match="^resume_from_checkpoint must be a checkpoint's folder"):
        train(tmp_path, resume=str(tmp_path / "none"))


def test_another_number_of_images_per_step_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"^per_device_train_batch_size × gradient_accumulation_steps × processes must stay 4, .* got 4 × 2 × 1$",
    ):
        train(tmp_path, resume=True, gradient_accumulation_steps=2)


def test_a_checkpoint_without_a_manifest_is_taken_at_the_users_word(tmp_path, caplog):
    train(tmp_path)
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    assert train(tmp_path, resume=str(tmp_path / "checkpoint-4")).state.global_step == 6
    assert "has no manifest.json, so nothing can tell whether it is whole" in caplog.text

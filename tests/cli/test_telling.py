"""A run says what it is about to do, when it cannot work, and how to go on."""

import contextlib
import io
import resource
import shlex
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from small_runs import ENVIRONMENT, REPOSITORY, SMALL, photos, read_recipe, run

from hf_mim.data import decode
from hf_mim.models.pixels import ValueRange
from hf_mim.pretraining import telling
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.run import Pretraining
from hf_mim.pretraining.telling import FirstSteps, features_hint, images_in_words, rate_hint
from hf_mim.pretraining.telling import finished as finished_line

# Blocks what takes seconds to import.
WITHOUT_LIBRARIES = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "datasets", "numpy"):
            raise ImportError(f"No module named {name}")
sys.meta_path.insert(0, Missing())
from hf_mim.cli import main
main(["pretrain"])
"""
OPTIONS = (
    "--image_size 16 --patch_size 8 --max_steps 3 --per_device_train_batch_size 6 --dataloader_num_workers 0".split()
)


@pytest.mark.parametrize(("rank", "told"), [("0", 1), ("1", 0)])
def test_the_first_line_needs_no_library_and_comes_from_the_first_rank(rank, told):
    environment = ENVIRONMENT | {"RANK": rank}
    done = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARIES], env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == told and "No module named" in done.stderr
    assert all(line.startswith("hf-mim 0") and line.endswith(") starts") for line in lines)


@pytest.mark.slow
def test_the_first_line_comes_within_a_second():
    """A second of the process's own time, so that a busy machine does no harm."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process = subprocess.Popen([sys.executable, "-c", WITHOUT_LIBRARIES], env=ENVIRONMENT, **pipes)
    assert process.stdout.readline().startswith("hf-mim ")
    process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run on photos: its folder, what it printed, and how often it decoded each image when it measured."""
    folder, out, err, counts = tmp_path_factory.mktemp("told"), io.StringIO(), io.StringIO(), Counter()
    source, open_bytes, measure = photos(folder / "photos"), decode._open_bytes, Pretraining.measure

    def measured(self, model):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(decode, "_open_bytes", lambda data, *x: counts.update([data]) or open_bytes(data, *x))
            measure(self, model)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(Pretraining, "measure", measured)
        run(*SMALL, *OPTIONS, "--dataset", source, "--labels", "folder", "--output_dir", folder / "run")
    return SimpleNamespace(folder=folder / "run", out=out.getvalue(), err=err.getvalue(), decoded=counts)


def test_the_plan_says_what_the_recipe_says(told):
    (line,) = [line for line in told.out.splitlines() if " · MAE · " in line]
    assert line == (
        "24 images in 2 folders, 16×16 RGB · ViT of 1 block, width 16, patch 8 at 16 px, 6.4 k · MAE · "
        f"cpu, 1 process, 0 workers · 3 steps of 6 (0.8 epochs), peak lr 3.5e-6 · {told.folder}"
    )


def test_the_plan_in_the_readme_is_what_the_first_command_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = Pretraining(read_recipe(["--use_cpu"])).plan
    assert line in (REPOSITORY / "README.md").read_text().splitlines()


def test_without_a_terminal_there_are_plain_lines_and_no_bars(told):
    assert "{'loss'" not in told.out + told.err and "\r" not in told.out + told.err and "it/s" not in told.err
    steps = [line for line in told.out.splitlines() if line.startswith("step ")]
    assert [line.split(" · ")[0] for line in steps] == ["step 1 of 3", "step 2 of 3", "step 3 of 3", "step 3 of 3"]


def test_the_measurements_of_the_end_decode_each_image_once(told):
    assert set(told.decoded.values()) == {1} and len(told.decoded) == 24


def test_a_run_that_cannot_work_is_told_so(told):
    hints = [line for line in told.out.splitlines() if line.startswith("hint: ")]
    assert len(hints) == 2
    assert hints[0].startswith("hint: the rates of 3 steps add up to ") and "--base_lr" in hints[0]
    assert hints[1].startswith("hint: on 4 images, ") and "is not clearly better than the untrained encoder" in hints[1]


def test_a_resume_of_a_finished_run_says_so_and_how_to_go_on(told, capsys):
    run("--resume", "--output_dir", told.folder)
    out = capsys.readouterr().out
    assert f"the run in {told.folder} has made all its 3 steps" in out and "step 3 of 3 · loss" not in out
    (command,) = [line for line in out.splitlines() if line.startswith("hf-mim pretrain ")]
    words = shlex.split(command)
    assert words[2:] == [f"{told.folder}/recipe.yaml", "--init_from", f"{told.folder}", *words[5:]]
    assert read_recipe(words[2:]).run.init_from == f"{told.folder}"


@pytest.mark.slow
def test_the_command_that_starts_from_a_finished_run_works(told):
    words = f"{told.folder}/recipe.yaml --init_from {told.folder} --output_dir {told.folder}_more".split()
    run(*words, "--knn", "false", "--max_steps", "1")
    assert (told.folder.with_name("run_more") / "model.safetensors").is_file()


def arguments(folder, **settings):
    return MIMTrainingArguments(output_dir=str(folder), use_cpu=True, **settings)


@pytest.mark.parametrize("schedule", ["warmup_stable_decay", "constant", "cosine"])
def test_how_to_go_on_from_a_finished_run_follows_from_its_schedule(schedule, tmp_path, monkeypatch):
    recipe = SimpleNamespace(run=SimpleNamespace(init_from=None, continue_from=None, dataset="my photos", method="mae"))
    args, folder = arguments(tmp_path, lr_scheduler_type=schedule, num_train_epochs=50), tmp_path / "a run"
    monkeypatch.setattr(telling, "checkpoint_to_continue", lambda folder: folder / "checkpoint-9")
    command = shlex.split(finished_line(folder, recipe, args, 10).splitlines()[-1])
    if schedule == "cosine":
        assert command[2:] == [f"{folder}/recipe.yaml", "--init_from", f"{folder}", "--output_dir", f"{folder}_more"]
        recipe.run.init_from = "elsewhere"
        command = shlex.split(finished_line(folder, recipe, args, 10).splitlines()[-1])
        assert command[2:8] == ["--method", "mae", "--dataset", "my photos", "--init_from", f"{folder}"]
    else:
        assert command[2:] == ["--continue", f"{folder}", "--num_train_epochs", "100"]


@pytest.mark.parametrize(
    ("steps", "settings", "is_hinted"),
    [
        (40, {"learning_rate": 9.4e-6}, True),
        (1240, {"learning_rate": 2e-3}, False),
        (40, {"learning_rate": 9.4e-6, "optim": "sgd"}, False),
        (100_000, {"learning_rate": 1e-4}, False),
    ],
)
def test_only_rates_that_move_nothing_are_hinted_at(steps, settings, is_hinted, tmp_path):
    hint = rate_hint(arguments(tmp_path, **settings), steps)
    assert bool(hint) is is_hinted
    assert not hint or hint.startswith("hint: the rates of 40 steps add up to 0.00019, ")


@pytest.mark.parametrize(
    ("trained", "untrained", "told"),
    [
        (0.83, 0.23, []),
        (0.24, 0.23, ["the untrained encoder (23.0 %)"]),
        (0.55, 0.2, ["always naming one class (50.0 %)"]),
        (0.18, 0.23, ["the untrained encoder", "always naming one class"]),
    ],
)
def test_features_are_hinted_at_if_they_are_no_better_than_untrained_ones_or_chance(trained, untrained, told):
    labels = SimpleNamespace(read_labels=lambda: torch.arange(200).remainder(4).clamp(max=2))
    hint = features_hint(SimpleNamespace(value=trained, scores={"untrained": untrained}), labels)
    assert bool(hint) is bool(told) and all(part in hint for part in told)


@pytest.mark.parametrize(
    ("device", "seconds", "lines"),
    [
        ("cpu", 147, ["about 1.7 days to go: 147 s a step, measured on step 1", "hint: at 147 s a step on this CPU, "]),
        ("cpu", 2, ["about 33 min to go: 2.0 s a step, measured on steps 2 to 3"]),
        ("cuda", 2, ["about 30 min to go: 2.0 s a step, measured on steps 51 to 100"]),
        ("cuda", 147, ["about 1.5 days to go: 147 s a step"]),
    ],
)
def test_the_time_of_steps_is_told_once_and_a_slow_cpu_is_hinted_at(device, seconds, lines, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(telling.time, "perf_counter", lambda: now[0])
    args = SimpleNamespace(device=SimpleNamespace(type=device), torch_compile=False)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1000)
    first = FirstSteps()
    first.on_train_begin(args, state, None)
    now[0] = 1000.0  # a probe measures the features
    for step in range(1, 201):
        first.on_step_begin(args, state, None)
        state.global_step, now[0] = step, now[0] + seconds
        first.on_step_end(args, state, None)
        if state.global_step % 50 == 0:
            first.on_log(args, state, None, logs={"loss": 1.0})
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(lines) and all(line.startswith(part) for line, part in zip(told, lines, strict=True))


def test_images_of_several_sizes_depths_and_sources_are_described(tmp_path):
    from datasets import Dataset
    from PIL import Image

    paths = [tmp_path / folder / "image.png" for folder in "abc"]
    for path, size in zip(paths, [(20, 30), (40, 10), (30, 30)], strict=True):
        path.parent.mkdir()
        Image.new("L", size).save(path)
    images = Dataset.from_dict({"image": [{"bytes": None, "path": str(path)} for path in paths]})
    assert images_in_words(images, 1, None) == "3 images in 3 folders, 20×10 to 40×30 grey"
    in_bytes = Dataset.from_dict({"image": [{"bytes": path.read_bytes(), "path": None} for path in paths[:1]]})
    deep = ValueRange((0.0,), (1.0,), "uint16")
    assert images_in_words(in_bytes, 13, deep) == "1 image, 20×30, 13 bands of uint16"
    assert images_in_words(iter(()), 3, None) == "a stream of images, read as RGB"

"""`hf_mim.pretrain`, `evaluate` and `embed`: what the commands do, in Python, twice in one process."""

import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tiny import make_model

import hf_mim
from hf_mim import front_door
from hf_mim.cli import main
from hf_mim.data.decode import MAX_PIXELS_VARIABLE
from hf_mim.evaluation.result import Result
from hf_mim.pretraining.signals import Ended
from hf_mim.pretraining.trainer import MIMTrainer
from hf_mim.runs import Run

SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, use_cpu=True)
SMALL |= dict(method="mae", max_steps=3, per_device_train_batch_size=8, knn=False, dataset="digits", disable_tqdm=True)


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Nothing is measured at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_mim.pretraining.run.Pretraining.measure", lambda run, model: None)


def test_a_run_gives_its_model_curve_and_folder_and_a_second_one_in_the_process_works(quick, tmp_path, monkeypatch):
    monkeypatch.delenv(MAX_PIXELS_VARIABLE, raising=False)
    before, threads = handlers(), torch.get_num_threads()
    run = hf_mim.pretrain(**SMALL, output_dir=tmp_path / "one", max_image_pixels=10_000)
    again = hf_mim.pretrain(**SMALL, output_dir="two")
    assert handlers() == before and torch.get_num_threads() == threads and not torch.distributed.is_initialized()
    assert MAX_PIXELS_VARIABLE not in os.environ
    assert isinstance(run, Run) and run.folder == tmp_path / "one" and again.folder == Path("two")
    assert "model" not in vars(run)  # not loaded before it is asked for
    assert type(run.model).__name__ == "MAEModel" and not run.model.training
    pairs = zip(run.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert run.step == 3 and run.curve("loss") == again.curve("loss") and run.recipe["max_steps"] == 3
    assert run.plot()._repr_png_().startswith(b"\x89PNG")
    assert run.results == {}


def test_the_commands_call_the_same_functions(quick, monkeypatch, capsys):
    called = []

    def noted(name, answer):
        monkeypatch.setattr(front_door, name, lambda *words, **options: called.append((name, words, options)) or answer)

    class Prepared:
        folder = Path("mine")

    noted("prepare", Prepared)
    noted("train", None)
    assert main(["pretrain", "--method", "mae", "--max_steps", "3"]) == 0
    noted("evaluate", Result("knn", "accuracy", 0.5, {}, {}))
    assert main(["evaluate", "knn", "mine", "--dataset", "digits", "--k", "3"]) == 0
    noted("predict", "done")
    assert main(["predict", "mine", "--dataset", "digits"]) == 0
    assert called == [
        ("prepare", (None, {"method": "mae", "max_steps": "3"}), {}),
        ("train", (Prepared,), {}),
        ("evaluate", ("knn", "mine"), {"dataset": "digits", "k": "3"}),
        ("predict", ("mine",), {"dataset": "digits"}),
    ]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"methd": "mae"}, "unknown argument methd; did you mean method?"),
        ({"max_steps": "many"}, "max_steps must be a whole number, not 'many'"),
        ({"image_size": 30, "patch_size": 16}, "image_size"),
        ({"crop_pixels": 8, "crop_scale": (0.5, 1)}, "crop_pixels cannot be given together with crop_scale"),
        ({"hidden_size": 15}, "hidden_size"),
        ({"dataset": "nowhere/photos/"}, "nowhere/photos"),
    ],
)
def test_a_mistake_is_the_line_of_the_command_as_one_exception(quick, tmp_path, capsys, settings, line):
    settings = SMALL | settings
    with pytest.raises(ValueError) as error:
        hf_mim.pretrain(**settings, output_dir="run")
    told = str(error.value)
    assert line in told and "\n" not in told
    assert error.value.__suppress_context__ and error.value.__cause__ is None  # a notebook shows one exception
    assert not list(tmp_path.iterdir())
    text = {name: ",".join(map(str, x)) if isinstance(x, tuple) else str(x) for name, x in settings.items()}
    words = [word for name, value in text.items() for word in (f"--{name}", value)]
    assert main(["pretrain", *words, "--output_dir", "run"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: {told}"


def test_a_dataset_in_memory_is_refused_with_what_to_do_instead(quick):
    images = datasets.Dataset.from_dict({"image": [1, 2]})
    for call in (hf_mim.pretrain, lambda dataset: hf_mim.evaluate("knn", "run", dataset=dataset)):
        with pytest.raises(ValueError, match=r"^dataset must be text.*save_to_disk\(FOLDER\) makes a folder") as error:
            call(images)
        assert "\n" not in str(error.value)


def test_a_signal_ends_a_run_with_an_exception_that_says_how_to_go_on(quick, monkeypatch):
    before, step = handlers(), MIMTrainer.training_step

    def ended(trainer, *arguments, **more):
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)  # a notebook's stop button
        return step(trainer, *arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(Ended) as error:
        patch.setattr(MIMTrainer, "training_step", ended)
        hf_mim.pretrain(**SMALL, output_dir="run")
    assert str(error.value) == "SIGINT has ended the run; go on with hf_mim.pretrain(output_dir='run', resume=True)"
    assert handlers() == before
    run = hf_mim.pretrain(output_dir="run", resume=True)
    assert run.step == 3 and run.state == "ended"


def test_a_run_that_fails_leaves_no_trainer_behind(quick, monkeypatch):
    held = []

    def fail(trainer, *arguments, **more):
        held.append(trainer.state.global_step)
        raise OSError("the disk is full")

    monkeypatch.setattr(MIMTrainer, "training_step", fail)
    pretraining = front_door.prepare(None, SMALL | {"output_dir": "run"})
    with pytest.raises(OSError, match="the disk is full") as error:
        front_door.train(pretraining)
    frames, trace = [], error.value.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    assert held and not vars(pretraining)
    assert not any(isinstance(value, MIMTrainer) for frame in frames for value in frame.f_locals.values())


def test_a_result_is_returned_and_saved_as_the_command_saves_it(quick, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    make_model("mae").save_pretrained(tmp_path / "run")
    options = dict(dataset="digits", train_images=60, test_images=30, k=3, beside=False, image_mean=[0.5] * 3)
    result = hf_mim.evaluate("knn", Run(tmp_path / "run", {}, []), **options, image_std=(0.5, 0.5, 0.5))
    saved = Result.load(result.path)
    assert result.path.parent == tmp_path / "run/results" and saved.value == result.value
    assert [path.is_file() for path in result.beside] == [True] * 3
    words = "--train_images 60 --test_images 30 --k 3 --beside false --image_mean .5,.5,.5 --image_std .5,.5,.5".split()
    assert main(["evaluate", "knn", str(tmp_path / "run"), "--dataset", "digits", *words]) == 0
    assert [result.path] == sorted((tmp_path / "run/results").glob("*.json"))  # the same name: the same measurement
    with pytest.raises(ValueError, match="^knn has no option kk; did you mean k"):
        hf_mim.evaluate("knn", tmp_path / "run", dataset="digits", kk=3)
    seen = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    done = hf_mim.embed(tmp_path / "run", dataset="digits", split="test", output=tmp_path / "x.npy", **seen)
    assert done.output.is_file() and done.images > 100


def test_no_public_name_hides_a_module_and_importing_stays_quick():
    modules = {module.name for module in pkgutil.iter_modules(hf_mim.__path__)}
    assert not modules & set(hf_mim.__all__)
    slow = "{'torch', 'transformers', 'hf_mim.front_door'}"
    code = f"import sys, hf_mim; hf_mim.__all__; dir(hf_mim); print(*sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "", done.stdout

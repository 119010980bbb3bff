"""`training/compare.py`: what may be compared, and the processes of a comparison."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from tiny import make_model
from tiny_comparison import TRAINING, read, write
from transformers import AutoModel

from hf_mim.cli import main
from hf_mim.run_folder import RECIPE

# ---- what may be compared


JEPA = {"JEPA": {"method": "ijepa"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imagse": 5}, "unknown argument imagse of a comparison; did you mean images?"),
        ({"images": 0}, "images must be at least 1, not 0"),
        ({"images": 15}, "run MAE: images must be at least 16, not 15"),
        ({"seeds": [1, 1]}, r"seeds must be different numbers from 0 on, at least one, not \[1, 1\]"),
        ({"seeds": "zero"}, "seeds must be a list like 1,2, not 'zero'"),
        ({"runs": []}, "runs must be a mapping"),
        ({"runs": {"MAE": {"method": "mea"}}}, "run MAE: method must be one of .*; did you mean mae?"),
        ({"runs": {"MAE": {"base_rl": 1}}}, "run MAE: unknown argument base_rl; did you mean base_lr?"),
        ({"runs": {"MAE": {"patch_gap": 1}}}, "run MAE: patch_gap is an argument of latent_mim, not of method mae"),
        ({"runs": {"MAE": {"hidden_size": 17}}}, "run MAE: hidden_size must be divisible"),
        ({"runs": {"MAE": {"seed": 1}}}, "run MAE: seed cannot be given here: seeds sets it"),
        ({"settings": {"max_steps": 5}}, "run MAE: max_steps cannot be given here: images sets it"),
        (
            {"runs": {"a b": {}, "a-b": {}, "a_b": {}}},
            "runs must have names of their own, in letters and digits, not 'a b'",
        ),
        ({"runs": {"supervised": {}}}, "runs must have names of their own, in letters and digits, not 'supervised'"),
        ({"runs": {"MAE": 3}}, "runs must have names with settings, and MAE has 3"),
        ({"evaluate": {"knnn": {}}}, "column knnn: protocol must be one of knn, .*, not knnn; did you mean knn?"),
        ({"evaluate": {"a": {"protocol": 3}}}, "column a: protocol must be one of knn, .*, not 3"),
        ({"evaluate": {"minutes": {"protocol": "knn"}}}, "evaluate must have names of their own, .*, not 'minutes'"),
        ({"evaluate": {"linear": {"epoch": 1}}}, "column linear: linear has no option epoch; did you mean epochs?"),
        ({"evaluate": {"knn": {"k": 0}}}, "column knn: k must be at least 1, not 0"),
        ({"evaluate": {"knn": {"pixels": True}}}, "column knn: pixels cannot be given here: the comparison sets it"),
        ({"supervised": {"epochs": 3}}, "supervised: epochs cannot be given here: images sets it"),
        ({"references": ["chance"]}, "references must be one of untrained, start, pixels, supervised, not 'chance'"),
        ({"varies": ["base_lr"]}, "varies must be one of .*, not 'base_lr'"),
        (
            {"runs": {"deep": {"num_hidden_layers": 2}}},
            "num_hidden_layers must be equal for all runs, and is 1 for MAE",
        ),
        (
            {"runs": {"wide": {"crop_scale": [0.2, 1]}}},
            "is 0.3,1.0 for MAE and 0.2,1.0 for wide: give it in settings, or",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(changes, message, scripts, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(scripts, tmp_path, **changes)
    assert "\n" not in str(error.value)


def test_runs_that_differ_by_a_methods_default_are_refused(scripts, tmp_path):
    """MAE and I-JEPA have other crops of the digits by default, which nobody would see in the file."""
    with pytest.raises(ValueError, match="crop_scale must be equal for all runs, and is 0.2,1.0 for MAE and 0.3,1.0"):
        read(scripts, tmp_path, runs=JEPA, settings={"crop_scale": None})


def test_what_varies_by_permission_may_differ(scripts, tmp_path):
    comparison = read(scripts, tmp_path, runs={"deep": {"num_hidden_layers": 2}}, varies=["num_hidden_layers"])
    assert [recipe.config().num_hidden_layers for recipe in comparison.recipes.values()] == [1, 2]


def test_the_budget_in_images_gives_the_steps_and_a_rest_is_told(scripts, tmp_path):
    runs = {"large": {"per_device_train_batch_size": 10, "gradient_accumulation_steps": 5}}
    comparison = read(scripts, tmp_path, runs=runs)
    assert comparison.steps("MAE") == 6 and comparison.steps("large") == 2
    assert list(comparison.uneven_budgets()) == ["MAE sees 96 of 100 images: 6 whole steps of 16"]


def test_a_run_takes_its_learning_rate_in_place_of_the_shared_one(scripts, tmp_path):
    """`base_lr` is overruled by `learning_rate`, so that of the settings must not reach the command."""
    comparison = read(scripts, tmp_path, settings={"learning_rate": 1e-3}, runs={"low": {"base_lr": 1e-5}})
    low = next(job.steps[0] for job in scripts.jobs.jobs_of(comparison, tmp_path) if job.name == "low, seed 0")
    assert low.options["base_lr"] == 1e-5 and "learning_rate" not in low.options


def test_a_comparison_takes_from_the_file_that_it_extends_what_it_lacks(scripts, tmp_path):
    write(tmp_path)
    (tmp_path / "more").mkdir()
    for name, lines in (
        ("a", "extends: ../tiny.yaml\nseeds: [3]\nsettings:\nevaluate: {linear: {epochs: 1}}"),
        ("b", "extends: a.yaml\nsettings: {hidden_size: 32}"),
    ):
        (tmp_path / f"more/{name}.yaml").write_text(f"{lines}\n")
    found, base = (scripts.plan.Comparison.read(tmp_path / name, {}) for name in ("more/b.yaml", "tiny.yaml"))
    assert found.settings == base.settings | {"hidden_size": 32} and found.seeds == [3] and found.runs == base.runs
    assert found.evaluate == {"linear": {"epochs": 1}} and "linear" not in base.evaluate


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extends: b.yaml", "extends must not lead back to the same file: .*b.yaml extends .*a.yaml"),
        ("extends: other/../a.yaml", "extends must not lead back to the same file"),
        ("extends: c.yaml", "extends must name a file, and there is no .*c.yaml, which .*a.yaml extends"),
        ("extends: [b.yaml]", r"extends must be text, not \['b.yaml'\]"),
        ("extend: b.yaml", "unknown argument extend of a comparison; did you mean extends?"),
        ("extends: tiny.yaml\nsettings: 5", "settings must be a mapping"),
    ],
)
def test_a_mistake_in_what_is_extended_is_one_line(line, message, scripts, tmp_path):
    write(tmp_path)
    (tmp_path / "a.yaml").write_text(line)
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ValueError, match=message) as error:
        scripts.plan.Comparison.read(tmp_path / "a.yaml", {})
    assert "\n" not in str(error.value)


def test_only_the_named_runs_of_the_file_are_made(scripts, tmp_path):
    path = write(tmp_path, runs=JEPA | {"Latent MIM": {"method": "latent_mim"}})
    found = scripts.plan.Comparison.read(path, {}, ["Latent_MIM", "MAE"])
    assert list(found.runs) == ["MAE", "Latent MIM"]  # in the order of the file
    with pytest.raises(ValueError, match="only must be one of MAE, JEPA, Latent_MIM, not 'Latent'"):
        scripts.plan.Comparison.read(path, {}, ["Latent"])


def test_a_linear_probe_comes_before_k_nn_which_then_finds_its_features(scripts, tmp_path):
    comparison = read(scripts, tmp_path, evaluate={"linear": {}})
    assert list(comparison.evaluate) == ["20-NN", "linear"]  # the columns keep the order of the file
    run = next(job for job in scripts.jobs.jobs_of(comparison, tmp_path) if job.name == "MAE, seed 0")
    assert [step.measures for step in run.steps][:3] == ["training", "linear", "20-NN"]


def test_only_one_untrained_encoder_of_each_kind_is_measured(scripts, tmp_path):
    runs = JEPA | {"StoP": {"method": "stop_jepa"}, "Latent": {"method": "latent_mim"}}
    comparison = read(scripts, tmp_path, runs=runs)
    rows = [comparison.untrained_row(run) for run in comparison.runs]
    assert rows == ["untrained encoder of MAE", "untrained encoder of JEPA", None, "untrained encoder of Latent"]


def test_the_weights_that_runs_start_from_are_measured_once_and_as_they_are(scripts, tmp_path):
    """The reference is a run of one step which changes no weight."""
    one, other = (tmp_path / name for name in ("one", "other"))
    same = dict(image_size=32, patch_size=8, num_channels=1, hidden_size=16, num_hidden_layers=1)
    for seed, folder in enumerate((one, other)):
        make_model("mae", "encoder", seed, **same).save_pretrained(folder)
    runs = {"MAE": {}, "a": {"init_from": str(one)}, "b": {"init_from": str(one)}, "c": {"init_from": str(other)}}
    comparison = read(scripts, tmp_path, runs=runs, varies=["init_from"])
    assert [comparison.start_row(run) for run in comparison.runs] == [None, "start of a", None, "start of c"]
    job = next(job for job in scripts.jobs.jobs_of(comparison, tmp_path) if job.name == "start of a")
    assert [step.measures for step in job.steps] == ["training", "20-NN"] and {step.seed for step in job.steps} == {
        None
    }
    assert main(job.steps[0].arguments) == 0
    before, after = (AutoModel.from_pretrained(folder) for folder in (one, job.folder))
    for (name, value), now in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        assert torch.equal(value[value != 0], now[value != 0]), name


@pytest.mark.parametrize("path", sorted((TRAINING / "comparisons").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_comparisons_of_the_repository_are_fair(path, scripts):
    comparison = scripts.plan.Comparison.read(path, {})
    assert set(comparison.varies) <= {"init_from"}  # which is what is compared there
    assert len(comparison.runs) > 1 or comparison.references  # one run is compared with references


# ---- processes


class Fake:
    """A launcher of quick processes: each does what `script` says of its job, and then makes the job's files."""

    def __init__(self, scripts):
        self.scripts, self.alive, self.most, self.started = scripts, [], 0, []

    def start(self, job):
        self.started.append(job.name)
        files = [str(step.file) for step in job.left]
        lines = (
            "import sys, time, signal, pathlib",
            self.scripts.get(job.name, ""),
            "[pathlib.Path(x).touch() for x in sys.argv[1:]]",
        )
        process = subprocess.Popen([sys.executable, "-S", "-c", "\n".join(lines), *files])
        self.alive = [other for other in self.alive if other.poll() is None] + [process]
        self.most = max(self.most, len(self.alive))
        return process

    def reason(self, job, status):
        return f"status {status}"


@pytest.fixture
def make_jobs(scripts, tmp_path):
    def make(*names, needs=None):
        step = scripts.jobs.Step
        return [
            scripts.jobs.Job(name, [step(name, "training", 0, [], {}, {}, tmp_path / name)], needs) for name in names
        ]

    return make


def test_so_many_processes_run_at_once_and_each_end_is_told(scripts, make_jobs):
    jobs, launcher, ends = make_jobs(*"abcde"), Fake(dict.fromkeys("abcde", "time.sleep(.3)")), []
    assert scripts.run.run_jobs(jobs, 2, launcher, lambda: ends.append(1)) is None
    assert launcher.most == 2 and len(ends) == 5 and not any(job.left for job in jobs)
    assert launcher.started == list("abcde")


def test_a_job_that_fails_stops_no_other_but_those_that_need_it(scripts, make_jobs):
    a, b = make_jobs("a", "b")
    jobs = [a, b, *make_jobs("c", needs=a), *make_jobs("d", needs=b)]
    scripts.run.run_jobs(jobs, 2, Fake({"a": "sys.exit(2)"}), lambda: None)
    assert [job.failure for job in jobs] == ["training: status 2", None, "training: there is no checkpoint of a", None]
    assert [bool(job.left) for job in jobs] == [True, False, True, False]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_processes_in_peace_and_is_no_failure(number, scripts, make_jobs, tmp_path):
    end = f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(tmp_path / 'saved')!r}).touch(), sys.exit(75)))"
    jobs, launcher = (
        make_jobs("a", "b"),
        Fake({"a": f"{end}\npathlib.Path({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(30)"}),
    )

    def ask():
        while not (tmp_path / "begun").exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask).start()
    assert scripts.run.run_jobs(jobs, 1, launcher, lambda: None) == number
    assert (tmp_path / "saved").exists() and launcher.started == ["a"]
    assert all(job.left and job.failure is None for job in jobs)


def test_the_reason_of_a_failure_is_the_last_error_that_was_printed(scripts, make_jobs, tmp_path):
    (job,), launcher = make_jobs("a"), scripts.run.Launcher([], tmp_path)
    for text, reason in (
        ("{'loss': 1}\nerror: base_lr must be above 0\n  hint\n", "base_lr must be above 0"),
        ("Traceback:\n  File\nRuntimeError: out of memory\n", "RuntimeError: out of memory"),
        ("", "exit status 2"),
    ):
        (tmp_path / "a.log").write_text(text)
        assert launcher.reason(job, 2) == reason
    assert launcher.reason(job, -9) == "ended by SIGKILL"


def test_a_run_that_has_begun_is_resumed_and_what_is_done_is_left_out(scripts, tmp_path):
    job = scripts.jobs.jobs_of(read(scripts, tmp_path), tmp_path)[0]
    launcher = scripts.run.Launcher(["my_methods"], tmp_path)
    assert [words[2] for words in launcher.commands(job)] == ["pretrain", "evaluate", "evaluate"]
    assert all(words[:2] == ["--import", "my_methods"] and "--resume" not in words for words in launcher.commands(job))
    (tmp_path / "MAE_0").mkdir()
    (tmp_path / "MAE_0" / RECIPE).touch()
    assert ["--resume" in words for words in launcher.commands(job)] == [True, False, False]
    for step in job.steps[:2]:
        step.file.parent.mkdir(exist_ok=True)
        step.file.touch()
    assert [words[2:4] for words in launcher.commands(job)] == [["evaluate", "knn"]]


def test_the_help_is_no_error(scripts, capsys):
    assert scripts.compare.main(["--help"]) == 0
    printed = capsys.readouterr()
    assert "--only" in printed.out and not printed.err

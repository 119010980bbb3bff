"""`training/compare.py`: comparisons that are fair, tables that are those of the files, and starts that go on."""

import contextlib
import copy
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from test_comparison import cells

from hf_mim.cli import main
from hf_mim.evaluation.result import Result
from hf_mim.pretraining.run import Pretraining
from hf_mim.pretraining.signals import INTERRUPTED
from hf_mim.run_folder import RECIPE, checkpoints, logged, step_of

TRAINING = Path(__file__).parents[1] / "training"
FEW = {"train_images": 100, "test_images": 50}
TINY = {
    "dataset": "digits",
    "images": 100,
    "points": 2,
    "settings": {
        **{"image_size": 32, "patch_size": 8, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "crop_scale": [0.3, 1.0], "flip_probability": 0.0, "knn": False},
        **{"per_device_train_batch_size": 16, "dataloader_num_workers": 0, "use_cpu": True, "probe_images": 40},
        **{"image_mean": [0.3], "image_std": [0.3]},
    },
    "runs": {"MAE": {"method": "mae"}},
    "evaluate": {"20-NN": {"protocol": "knn", **FEW}},
    "supervised": {"batch_size": 32, **FEW},
}


@pytest.fixture(scope="module")
def scripts():
    """The modules of the script, by the end of their names."""
    sys.path.insert(0, str(TRAINING))
    names = "compare", "compare_plan", "compare_jobs", "compare_report", "compare_run"
    yield SimpleNamespace(**{name.rpartition("_")[2]: importlib.import_module(name) for name in names})
    sys.path.remove(str(TRAINING))


def changed(**changes) -> dict:
    """TINY with changes; those of a mapping are made inside it, and None takes a name out of it."""
    found = copy.deepcopy(TINY)
    for name, value in changes.items():
        found[name] = found.get(name, {}) | value if isinstance(value, dict) else value
        if isinstance(value, dict):
            found[name] = {key: own for key, own in found[name].items() if own is not None}
    return found


def write(folder, **changes) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(changed(**changes), sort_keys=False))
    return path


# ---- what may be compared


def read(scripts, folder, **changes):
    return scripts.plan.Comparison.read(write(folder, **changes), {})


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
        ({"references": ["chance"]}, "references must be one of untrained, pixels, supervised, not 'chance'"),
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


def test_only_one_untrained_encoder_of_each_kind_is_measured(scripts, tmp_path):
    runs = JEPA | {"StoP": {"method": "stop_jepa"}, "Latent": {"method": "latent_mim"}}
    comparison = read(scripts, tmp_path, runs=runs)
    rows = [comparison.untrained_row(run) for run in comparison.runs]
    assert rows == ["untrained encoder of MAE", "untrained encoder of JEPA", None, "untrained encoder of Latent"]


@pytest.mark.parametrize("path", sorted((TRAINING / "comparisons").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_comparisons_of_the_repository_are_fair(path, scripts):
    comparison = scripts.plan.Comparison.read(path, {})
    assert len(comparison.runs) > 1 and not comparison.varies


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


# ---- a comparison of two runs of six steps, one of which fails


@pytest.fixture(scope="module")
def make(scripts):
    """make(path, output) -> exit status and the names of the jobs that were started, in this process."""

    class Here(scripts.run.Launcher):
        def start(self, job):
            started.append(job.name)
            self.logs.mkdir(parents=True, exist_ok=True)
            with open(self.log(job), "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                status = scripts.run.work(self.commands(job))
            return SimpleNamespace(poll=lambda: status, returncode=status)

    started = []

    def compare(path, output, *options):
        started.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scripts.compare, "Launcher", Here)
            patch.setattr(scripts.run, "LOOK", 0)
            patch.setattr(Pretraining, "draw", lambda *_: None)  # its pictures and the health take half of the time
            patch.setattr("hf_mim.pretraining.run.health_record", lambda *_: None)
            return scripts.compare.main([str(path), "--output", str(output), "--jobs", "1", *options]), list(started)

    return compare


@pytest.fixture
def made(once, make, tmp_path):
    """A finished comparison: its file and its output, which a test may change."""

    def fill(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_MIM_CACHE", str(folder / "cache"))
            status, started = make(write(folder, runs={"broken": {"base_lr": -1}}), folder / "out")
        assert status == 1 and len(started) == 7

    shutil.copytree(once("comparison", fill), tmp_path / "made")
    return SimpleNamespace(path=tmp_path / "made" / "tiny.yaml", output=tmp_path / "made" / "out")


def record(made) -> dict:
    return json.loads((made.output / "comparison.json").read_text())


def test_the_table_has_mean_and_deviation_of_the_result_files(made):
    lines = {line[0]: line for line in cells((made.output / "comparison.md").read_text().split("\n\n")[0])}
    assert list(lines) == ["MAE", "broken", "untrained encoder of MAE", "raw pixels", "supervised from scratch"]

    def values(name, *folders):
        return [100 * Result.load(made.output / folder / "results" / name).value for folder in folders]

    for row, found in (
        ("MAE", values("compared_20-NN.json", "MAE_0", "MAE_1")),
        ("untrained encoder of MAE", values("compared_20-NN_untrained.json", "MAE_0", "MAE_1")),
        ("supervised from scratch", values("compared_20-NN.json", "supervised_0", "supervised_1")),
    ):
        assert lines[row][1] == f"{statistics.fmean(found):.1f} ± {statistics.stdev(found):.1f}", row
    assert lines["raw pixels"][1] == f"{values('compared_20-NN_pixels.json', 'MAE_0')[0]:.1f}"
    assert lines["MAE"][2] == "96" and 100 <= int(lines["supervised from scratch"][2]) < 100 + 32
    own = values("compared_training.json", "supervised_0", "supervised_1")
    assert lines["supervised from scratch"][-1] == (
        f"its own classifier has {statistics.fmean(own):.1f} ± {statistics.stdev(own):.1f} %"
    )


def test_a_run_that_failed_is_in_the_table_with_its_reason(made):
    (line,) = [line for line in (made.output / "comparison.md").read_text().splitlines() if line.startswith("| broken")]
    reason = "failed in training: base_lr must be above 0, not -1.0"
    assert f"seed 0 {reason}; seed 1 {reason}" in line
    failures = [result["failure"] for result in record(made)["results"] if result["row"] == "broken"]
    assert failures == ["training: base_lr must be above 0, not -1.0", None] * 2


def test_each_value_has_the_command_that_gives_it_again(made, monkeypatch):
    monkeypatch.chdir(made.output)  # the record has no folders of this machine
    done = [result for result in record(made)["results"] if result["value"] is not None]
    assert len(done) == 2 + 2 + 2 + 2 + 2 + 2 + 2
    for result in done:
        assert result["commit"] and result["date"]
        words = shlex.split(result["command"])[1:]
        words[words.index("--output" if "--output" in words else "--output_dir") + 1] = "again"
        if words[0] == "evaluate" and words[1] != "finetune" and result["seed"] != 0:
            assert main(words) == 0
            assert Result.load("again").value == result["value"], result["command"]
            Path("again").unlink()


def test_the_picture_is_made_of_what_the_run_logged_and_of_references_measured_likewise(made):
    (run, *_), results = record(made)["rows"], record(made)["results"]
    probed = [logged(made.output / f"MAE_{seed}", "probe_knn") for seed in (0, 1)]
    assert [list(curve) for curve in probed] == [[0, 3, 6]] * 2
    assert run["curves"] == [[[16 * step, value] for step, value in curve.items()] for curve in probed]
    (pixels,) = [result for result in results if (result["row"], result["measures"]) == ("raw pixels", "probe")]
    options = ["--dataset", "digits", "--train_images", "40", "--test_images", "10"]
    assert all(words in pixels["command"] for words in ("--train_images 40", "--test_images 10", "--pixels true"))
    output = made.output / "last.json"
    assert main(["evaluate", "knn", str(made.output / "MAE_1"), *options, "--output", str(output)]) == 0
    assert Result.load(output).value == probed[1][6]  # the last probe is that of the final weights


def test_another_start_tries_again_only_what_has_failed(made, make):
    before = {path: path.stat().st_mtime_ns for path in made.output.rglob("results/*.json")}
    status, started = make(made.path, made.output)
    assert status == 1 and started == ["broken, seed 0", "broken, seed 1"]
    assert {path: path.stat().st_mtime_ns for path in made.output.rglob("results/*.json")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 200}, "images is 200, and was 100 for the training of MAE in .*: give another output"),
        ({"runs": {"MAE": {"method": "mae", "base_lr": 0.1}}}, "base_lr is 0.1, and was none for the training of MAE"),
        ({"settings": {"probe_images": 48}}, "probe_images is 48, and was 40 for the training of MAE"),
        ({"evaluate": {"20-NN": {"protocol": "knn", "k": 5, **FEW}}}, "k is 5, and was none for the 20-NN of MAE"),
        (
            {"evaluate": {"20-NN": {"protocol": "linear", **FEW}}},
            "protocol is linear, and was knn for the 20-NN of MAE",
        ),
        (
            {"supervised": {"batch_size": 16}},
            "batch_size is 16, and was 32 for the training of supervised from scratch",
        ),
    ],
)
def test_another_start_with_a_changed_setting_is_refused_by_its_name(changes, message, made, make, tmp_path, capsys):
    text = (made.output / "comparison.json").read_text()
    assert make(write(tmp_path, **changes), made.output) == (2, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and (made.output / "comparison.json").read_text() == text
    assert re.search(message, line), line


def test_more_runs_seeds_and_columns_may_join(scripts, made, tmp_path):
    changes = {"runs": {"JEPA": {"method": "ijepa"}}, "evaluate": {"linear": {}}, "seeds": [0, 1, 2]}
    comparison = read(scripts, tmp_path, **changes)
    jobs = scripts.jobs.jobs_of(comparison, made.output)
    left_out = scripts.report.go_on(comparison, jobs, made.output, "new")
    commits = {(step.row, step.measures, step.seed): step.commit for job in jobs for step in job.steps}
    assert commits["MAE", "linear", 0] == commits["JEPA", "training", 0] == commits["MAE", "training", 2] == "new"
    assert commits["MAE", "training", 0] != "new"
    assert [result["row"] for result in left_out] == ["broken"] * 4  # it is remembered, and may come back


def test_runs_that_nobody_has_recorded_are_left_alone(made, make, tmp_path, capsys):
    (tmp_path / "MAE_0").symlink_to(made.output / "MAE_0")
    assert make(made.path, tmp_path) == (2, [])
    assert "holds MAE_0, and comparison.json does not tell how it was made" in capsys.readouterr().err


# ---- with real processes


def wait_for(found, process, seconds=300):
    end = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_comparison_that_is_killed_and_then_ended_goes_on_to_the_same_numbers(tmp_path):
    path = write(tmp_path, images=4800, settings={"save_steps": 10}, references=["untrained"])

    def start(output):
        command = [sys.executable, TRAINING / "compare.py", path, "--output", tmp_path / output, "--jobs", "2"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def begun():
        return all(checkpoints(tmp_path / "ended" / f"MAE_{seed}") for seed in (0, 1))

    def steps():
        return [step_of(checkpoints(tmp_path / "ended" / f"MAE_{seed}")[0]) for seed in (0, 1)]

    environment = os.environ | {"HF_MIM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(TRAINING.parent)}
    reference = start("reference")
    assert reference.wait(600) == 0, reference.communicate()

    process = start("ended")
    wait_for(begun, process)
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for one in family:
        one.kill()
    process.communicate()
    psutil.wait_procs(family[:-1])
    killed_at = steps()

    process = start("ended")
    wait_for(lambda: min(steps()) > max(killed_at), process)
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate(timeout=60)[1] and process.returncode == INTERRUPTED
    assert max(steps()) < 300 and not (tmp_path / "ended" / "MAE_0" / "results").exists()

    process = start("ended")
    assert process.wait(600) == 0, process.communicate()
    values = [
        [
            (result["file"], result["value"])
            for result in json.loads((tmp_path / name / "comparison.json").read_text())["results"]
        ]
        for name in ("reference", "ended")
    ]
    assert values[0] == values[1] and None not in dict(values[0]).values()

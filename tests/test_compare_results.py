"""`training/compare.py`: tables that are those of the files, and starts that go on."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from test_comparison import cells
from tiny_comparison import FEW, TRAINING, read, write

from hf_mim.cli import main
from hf_mim.evaluation.result import Result
from hf_mim.pretraining.signals import INTERRUPTED
from hf_mim.run_folder import checkpoints, logged, step_of

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
            patch.setattr("hf_mim.pretraining.run.health_record", lambda *_, **__: None)  # it takes half of the time
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_that_failed_is_in_the_table_with_its_reason(made):
    (line,) = [line for line in (made.output / "comparison.md").read_text().splitlines() if line.startswith("| broken")]
    reason = "failed in training: base_lr must be above 0, not -1.0"
    assert f"seed 0 {reason}; seed 1 {reason}" in line
    failures = [result["failure"] for result in record(made)["results"] if result["row"] == "broken"]
    assert failures == ["training: base_lr must be above 0, not -1.0", None] * 2


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_picture_is_made_of_what_the_run_logged_and_of_references_measured_in_the_same_way(made):
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


@pytest.mark.slow
def test_another_start_tries_again_only_what_has_failed(made, make):
    before = {path: path.stat().st_mtime_ns for path in made.output.rglob("results/*.json")}
    status, started = make(made.path, made.output)
    assert status == 1 and started == ["broken, seed 0", "broken, seed 1"]
    assert {path: path.stat().st_mtime_ns for path in made.output.rglob("results/*.json")} == before


@pytest.mark.slow
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


@pytest.mark.slow
def test_more_runs_seeds_and_columns_may_join(scripts, made, tmp_path):
    changes = {"runs": {"JEPA": {"method": "ijepa"}}, "evaluate": {"linear": {}}, "seeds": [0, 1, 2]}
    comparison = read(scripts, tmp_path, **changes)
    jobs = scripts.jobs.jobs_of(comparison, made.output)
    left_out = scripts.report.go_on(comparison, jobs, made.output, "new")
    commits = {(step.row, step.measures, step.seed): step.commit for job in jobs for step in job.steps}
    assert commits["MAE", "linear", 0] == commits["JEPA", "training", 0] == commits["MAE", "training", 2] == "new"
    assert commits["MAE", "training", 0] != "new"
    assert [result["row"] for result in left_out] == ["broken"] * 4  # it is remembered, and may come back


@pytest.mark.slow
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

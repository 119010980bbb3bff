"""The same run by each launcher: the command, accelerate and torchrun, with one process and with two."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import ENVIRONMENT, REPOSITORY, TINY_RUN, same_weights


@pytest.mark.slow
def test_cli_accelerate_and_torchrun_do_the_same(tmp_path):
    command = ["-m", "hf_mim.cli", "pretrain"]
    bin_folder = Path(sys.executable).parent
    launchers = {
        "cli": [sys.executable, *command],
        "accelerate": [str(bin_folder / "accelerate"), "launch", "--cpu", "--num_processes", "1", *command],
        "torchrun": [str(bin_folder / "torchrun"), "--standalone", "--nproc_per_node", "1", *command],
    }
    for name, launcher in launchers.items():
        subprocess.run(
            [*launcher, *TINY_RUN, "--output_dir", str(tmp_path / name)], cwd=REPOSITORY, env=ENVIRONMENT, check=True
        )
    assert same_weights(tmp_path / "cli", tmp_path / "accelerate")
    assert same_weights(tmp_path / "cli", tmp_path / "torchrun")


@pytest.mark.slow
def test_two_ranks_write_one_run_folder(tmp_path):
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [str(torchrun), "--standalone", "--nproc_per_node", "2", "-m", "hf_mim.cli", "pretrain", *TINY_RUN]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Three lines of Python") == 1
    assert (tmp_path / "run" / "results" / "knn.json").exists()
    failed = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert failed.returncode != 0 and failed.stderr.count("error: output_dir") == 1


@pytest.mark.parametrize("name", ["pretrain", "plan", "benchmark"])
def test_a_script_of_training_starts_the_command_of_its_name(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(REPOSITORY / "training" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"Usage: hf-mim {name} ")

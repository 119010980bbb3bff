"""training/slurm.sh with stand-ins for srun, scontrol and Python, which write down what they were told."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "training" / "slurm.sh"
# Two nodes of two tasks; as srun does, its status is the highest of the tasks'.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$LOG/srun"
while [[ $1 == -* ]]; do shift; done
highest=0
for task in 0 1 2 3; do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) "$@" || { status=$?; ((status > highest)) && highest=$status; }
done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
echo "$*" >> "$LOG/scontrol"
[[ $1 == show ]] && printf 'gpu07\\ngpu08\\n'
exit 0
"""
PYTHON = """#!/usr/bin/env bash
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$LOG/tasks"
exit $STATUS
"""


def submit(folder: Path, *arguments, status=0):
    """Run the script as a job; returns the finished process, the lines of its tasks and those of scontrol."""
    (folder / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("task", PYTHON)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_SUBMIT_DIR": str(ROOT)}
    job |= {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "12"}
    job |= {
        "PYTHON": "task",
        "STATUS": str(status),
        "LOG": str(folder),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))} | job
    done = subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=20)
    lines = [
        (folder / name).read_text().splitlines() if (folder / name).exists() else [] for name in ("tasks", "scontrol")
    ]
    return done, *lines


def test_each_task_is_a_rank_of_one_run(tmp_path):
    run = tmp_path / "a run"
    done, tasks, _ = submit(tmp_path, "recipe.yaml", "--output_dir", str(run), "--dataset", "my photos")
    assert done.returncode == 0, done.stderr
    port = 20000 + 1234567 % 20000
    command = f"gpu07 {port} -m hf_mim.cli pretrain recipe.yaml --output_dir {run} --dataset my photos"
    assert tasks == [f"{rank} 4 {rank % 2} 2 {command}" for rank in range(4)]


@pytest.mark.parametrize("status, requeues", [(75, True), (0, False), (1, False), (2, False), (137, False)])
def test_only_an_interrupted_run_goes_back_into_the_queue(tmp_path, status, requeues):
    done, _, told = submit(tmp_path, "--output_dir", str(tmp_path / "run"), status=status)
    assert done.returncode == status
    assert ("requeue 1234567" in told) == requeues


@pytest.mark.parametrize("spelling", [["--output_dir", "{}"], ["--output_dir={}"], ["--output-dir", "{}"]])
def test_a_run_that_has_begun_is_resumed(tmp_path, spelling):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").touch()
    _, tasks, _ = submit(tmp_path, *(word.format(run) for word in spelling))
    assert all(task.endswith(" --resume") for task in tasks)


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    _, tasks, _ = submit(tmp_path, "--output_dir", str(tmp_path))
    assert tasks and not any("--resume" in task for task in tasks)


def test_without_output_dir_nothing_is_started(tmp_path):
    done, tasks, _ = submit(tmp_path, "recipe.yaml")
    assert done.returncode == 2 and "output_dir must be given" in done.stderr and not tasks

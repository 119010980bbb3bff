"""A real run, killed and started again, ends as one that was never killed: every byte of weights and optimizer."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from killed_run import STEPS
from tiny import METHODS

from hf_mim.pretraining.checkpoints import checkpoints, is_whole, newest_whole

HERE = Path(__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def start(folder, *options, ranks=1):
    launcher = TWO_RANKS if ranks == 2 else []
    command = [sys.executable, *launcher, str(HERE / "killed_run.py"), str(folder), *options]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes)


def finish(process) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return err


def wait_for_steps(process, count):
    """Until so many steps have begun."""
    for line in process.stdout:
        count -= line.startswith("training")
        if count == 0:
            return
    raise AssertionError(process.stderr.read()[-3000:])


def wait_for_a_save(folder):
    """Until a checkpoint is being written, and a little longer."""
    end = time.monotonic() + 60
    while time.monotonic() < end and not any((folder / "_saving").glob("checkpoint-*/*")):
        time.sleep(0.0005)


def kill(process):
    """With all that it has started; torchrun's ranks would live on."""
    started = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *started):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(started)


def trained(folder) -> dict[str, bytes]:
    last = folder / f"checkpoint-{STEPS}"
    assert is_whole(last)
    return {
        path.name: path.read_bytes()
        for path in (folder / "model.safetensors", *last.glob("*.safetensors"), *last.glob("optimizer.pt"))
    }


def kill_and_restart(folder, kills, *options, ranks=1):
    """Half of the kills at any moment, half in the middle of a save. Returns how many hit what."""
    draw, hit = random.Random(0), {"save": 0, "else": 0}
    for number in range(kills):
        process = start(folder, *options, ranks=ranks)
        if number % 2:
            wait_for_steps(process, ranks)
            wait_for_a_save(folder)
            time.sleep(draw.uniform(0, 0.03))
        else:
            wait_for_steps(process, draw.randint(1, 4) * ranks)
            time.sleep(draw.uniform(0, 0.1))
        kill(process)
        hit["save" if any((folder / "_saving").glob("checkpoint-*")) else "else"] += 1
        assert all(is_whole(path) for path in checkpoints(folder))
    return hit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "kills"),
    [
        pytest.param((), 20, id="map-style"),
        pytest.param(("--stream", "--workers", "3"), 20, id="shuffled stream"),
        *(pytest.param(("--method", name), 4, id=name) for name in METHODS if name != "stop_jepa"),
    ],
)
def test_a_run_killed_many_times_ends_as_one_never_killed(tmp_path, options, kills):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    finish(start(reference, *options))
    hit = kill_and_restart(killed, kills, *options)
    assert kills < 20 or (hit["save"] >= 5 and hit["else"] >= 2), hit
    assert newest_whole(killed).name != f"checkpoint-{STEPS}"  # there is something left to do
    finish(start(killed, *options))
    assert trained(killed) == trained(reference)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--stream", "--workers", "1")], ids=["map-style", "shuffled stream"])
def test_two_ranks_killed_end_as_two_never_killed(tmp_path, options):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    finish(start(reference, *options, ranks=2))
    kill_and_restart(killed, 4, *options, ranks=2)
    finish(start(killed, *options, ranks=2))
    assert trained(killed) == trained(reference)

"""`training/gpu_evidence.sh`, with a small model and a few steps, on the CPU."""

import json
import os
import subprocess
import sys

import pytest
from tiny_comparison import TRAINING, write

SCRIPT = TRAINING / "gpu_evidence.sh"
STEP = "--methods mae --dtype float32 --device cpu --image_size 64 --patch_size 8 --batch_size 2 --steps 1 --warmup 1"


def evidence(folder, seconds: int, **settings) -> subprocess.CompletedProcess:
    given = {"SECONDS_IN_ALL": seconds, "SIZES": "tiny", "JOBS": 1, "PYTHON": sys.executable, "STEP_OPTIONS": STEP}
    given |= {"COMPARISON": write(folder), "COMPARE_OPTIONS": "--seeds 0"} | settings
    environment = os.environ | {name: str(value) for name, value in given.items()}
    command = ["bash", str(SCRIPT), "digits", str(folder / "out")]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_time_is_kept_and_the_same_command_goes_on(tmp_path):
    first = evidence(tmp_path, 2)
    assert first.returncode == 0 and "The time is over" in first.stdout, first.stderr
    second = evidence(tmp_path, 900)
    assert second.returncode == 0 and "All of CIFAR-10 is done" in second.stdout, second.stderr
    out = tmp_path / "out"
    for mode in ("eager", "compiled"):
        assert json.loads((out / f"step_tiny_{mode}.json").read_text())["methods"]
    assert (out / "cifar10" / "comparison.json").is_file()
    kept = (out / "step_tiny_eager.json").stat().st_mtime_ns
    assert evidence(tmp_path, 900).returncode == 0
    assert (out / "step_tiny_eager.json").stat().st_mtime_ns == kept


def test_wrong_words_are_refused_by_their_usage(tmp_path):
    found = subprocess.run(["bash", str(SCRIPT), "digits"], capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr == "usage: training/gpu_evidence.sh DATASET OUTPUT\n"

"""A real `hf-mim embed`, killed and started again, writes the file of one that was never killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import scenes

pytestmark = pytest.mark.slow
KILLS = 6
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def start(checkpoint, source, output):
    words = ["embed", checkpoint, "--dataset", source, "--features", "last/mean/norm,last/tokens/norm"]
    command = [sys.executable, "-m", "hf_mim.cli", *map(str, [*words, "--output", output])]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begun(partial) -> int:
    """How many parts are whole."""
    return len(list(partial.glob("*/[0-9]*.npy")))


def test_killed_at_any_moment_and_resumed_it_writes_the_same_file(checkpoint, tmp_path):
    many = scenes(tmp_path / "many", count=3000)
    straight, killed = tmp_path / "straight.parquet", tmp_path / "killed.parquet"
    process = start(checkpoint, many, straight)
    assert process.wait() == 0, process.stderr.read()
    draw, seen = random.Random(0), []
    partial = killed.with_name(f"_{killed.name}.partial")
    for _ in range(KILLS):
        process = start(checkpoint, many, killed)
        before, end = begun(partial), time.monotonic() + 120
        while begun(partial) == before and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if killed.exists():  # it was killed while it took the parts away
            break
        seen.append(begun(partial))
    assert max(seen) > 0 and seen == sorted(seen), "each start goes on from what the last one has written"
    process = start(checkpoint, many, killed)
    assert process.wait() == 0 or killed.exists(), process.stderr.read()
    assert killed.read_bytes() == straight.read_bytes() and not partial.exists()

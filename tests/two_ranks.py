"""Two gloo ranks on the CPU, forked from one process, so that the libraries are imported once: `two_ranks.py FOLDER
MODULE...`. The `train_ranks(folder, rank)` of each module trains, and leaves in the folder what its tests compare.
"""

import faulthandler
import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent


def launch(folder: Path, *modules: str):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [sys.executable, __file__, str(folder), *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


def run(rank: int, folder: Path, modules):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # looked for, but the ranks meet in a file
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for module in modules:
        module.train_ranks(folder, rank)
    gc.collect()  # what holds the process group has to be gone before it, or its threads may outlive the interpreter
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    faulthandler.enable()  # a rank that dies in native code says where
    folder, *names = sys.argv[1:]
    modules = [importlib.import_module(name) for name in names]
    gc.freeze()  # as in conftest.py
    torch.multiprocessing.start_processes(run, (Path(folder), modules), nprocs=2, start_method="fork")

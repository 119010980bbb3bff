"""Batches on the CPU reuse the memory of the batch before, and give it back at the end."""

import os
import resource
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from hf_mim import memory
from hf_mim.trainer_utils import ProcessTrainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")

PAGES_OF_A_LAYER = 64 * 64 * 768 * 4 // resource.getpagesize()

FORWARDS = """
import contextlib
import resource
import torch
from hf_mim.memory import freed_memory_kept

layer = torch.nn.Sequential(torch.nn.Linear(192, 768), torch.nn.GELU(), torch.nn.Linear(768, 192)).requires_grad_(False)

def faults(batches):
    "Page faults of so many forwards of a small encoder."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(batches):
        tokens = torch.ones(64 * 64, 192)
        for _ in range(4):
            tokens = tokens + layer(tokens)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    "Bytes of this process that are in memory."
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
"""

# A tensor of 64 MB is above all limits to which glibc adapts, and above the one that the end of the last block leaves.
LARGE = """
for _ in range(20):  # small objects settle between the first ones
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES_OF_LARGE = 2**26 // resource.getpagesize()

KEPT = """
with freed_memory_kept():
    faults(5)
    print(faults(10))
"""


def printed(script: str, **environment: str) -> int:
    """What a new process prints: the settings of the allocator are those of a process."""
    code, env = FORWARDS + textwrap.dedent(script), os.environ | environment
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout)


def test_a_batch_takes_the_memory_of_the_batch_before():
    assert printed(LARGE) >= PAGES_OF_LARGE, "without a block each tensor has page faults"
    assert printed("with freed_memory_kept():" + textwrap.indent(LARGE, "    ")) < PAGES_OF_LARGE / 2


def test_a_block_inside_another_ends_nothing():
    inner = "    with freed_memory_kept(): torch.ones(2**24)"
    assert printed(f"with freed_memory_kept():\n{inner}" + textwrap.indent(LARGE, "    ")) < PAGES_OF_LARGE / 2


def test_limits_of_the_environment_stand():
    """With them each batch has page faults. Without them and without a block it depends on what was freed before."""
    assert printed(KEPT, GLIBC_TUNABLES="glibc.malloc.mmap_max=65536") > 10 * PAGES_OF_A_LAYER
    assert printed(KEPT, MALLOC_TRIM_THRESHOLD_="131072") > 10 * PAGES_OF_A_LAYER


class Training:
    def train(self) -> int:
        return memory._open_blocks


class OnDevice(ProcessTrainer, Training):
    def __init__(self, device: str):
        self.args = SimpleNamespace(device=torch.device(device))


def test_a_training_on_the_cpu_is_such_a_block():
    assert (OnDevice("cpu").train(), OnDevice("cuda").train()) == (1, 0)


def test_the_memory_goes_back_to_the_system_at_the_end_of_a_block_that_raises():
    assert 2**24 > printed(
        """
        faults(1)
        before = resident()
        with contextlib.suppress(ValueError), freed_memory_kept():
            large = [torch.ones(2**22) for _ in range(16)]  # 256 MB
            del large
            raise ValueError
        print(resident() - before)
        """
    )


def test_a_training_that_follows_is_not_slowed_down():
    """glibc no longer adapts its limits; those that stay serve batches of this size."""
    assert printed("with freed_memory_kept(): faults(5)\nfaults(5); print(faults(10))") < PAGES_OF_A_LAYER

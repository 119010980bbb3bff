"""Forwards on the CPU reuse the memory of the batch before, and give it back at the end."""

import resource
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")

PAGES_OF_A_LAYER = 64 * 64 * 768 * 4 // resource.getpagesize()

FORWARDS = """
import contextlib
import resource
import torch
from hf_mim.evaluation.memory import freed_memory_kept

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


def printed(script: str) -> int:
    """What a new process prints: the settings of the allocator are those of a process."""
    code = FORWARDS + textwrap.dedent(script)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_batch_takes_the_memory_of_the_batch_before():
    assert printed("faults(5); print(faults(10))") > 10 * PAGES_OF_A_LAYER, "without it each batch has page faults"
    kept = """
        with freed_memory_kept():
            faults(5)
            print(faults(10))
    """
    assert printed(kept) < PAGES_OF_A_LAYER


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

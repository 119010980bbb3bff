"""The machine that a benchmark ran on."""

import os
import platform
from pathlib import Path


def machine() -> dict:
    """The facts about this machine without which the numbers mean nothing."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    facts = {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return facts | {"vector": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version()}


def cpu_name() -> str:
    """The name that the Linux kernel gives; on other systems the one that Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

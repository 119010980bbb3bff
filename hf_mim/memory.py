"""Memory that a loop frees and asks for again."""

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt(3) with the names of their environment variables, and glibc's own limits for the
# thresholds that it adapts.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
NAMES = ("trim_threshold", "mmap_threshold", "mmap_max")
LARGEST_MMAP_THRESHOLD, MOST_MMAPS = 32 * 2**20, 65536

_lock, _open_blocks = threading.Lock(), 0


@contextmanager
def freed_memory_kept(wanted: bool = True) -> Iterator[None]:
    """While it lasts, glibc keeps freed memory for the next allocation, and gives it back to the system at the end.

    Each batch on the CPU frees activations of many megabytes. glibc returns them to the system, and the next batch pays
    a page fault for every 4 KiB: up to a quarter of the time of a small encoder. The limits are those of the process:
    blocks may lie in one another, and the end of the last one sets them back. It does nothing on other C libraries, or
    where the environment sets one of these limits.
    """
    libc = ctypes.CDLL(None) if wanted and sys.platform == "linux" and not _set_by_the_user() else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):  # Android's library has the first alone
        yield
        return
    _count(libc, 1)
    try:
        yield
    finally:
        _count(libc, -1)


def _set_by_the_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return any(f"MALLOC_{name.upper()}_" in os.environ or f"glibc.malloc.{name}" in tunables for name in NAMES)


def _count(libc: ctypes.CDLL, change: int):
    global _open_blocks
    with _lock:
        before, _open_blocks = _open_blocks, _open_blocks + change
        if not before:
            libc.mallopt(MMAP_MAX, 0)
            libc.mallopt(TRIM_THRESHOLD, -1)
        elif not _open_blocks:  # glibc adapts no longer: both get the largest values to which it would have come
            libc.mallopt(MMAP_MAX, MOST_MMAPS)
            libc.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
            libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
            libc.malloc_trim(0)

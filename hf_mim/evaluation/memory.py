"""Memory that a loop frees and asks for again."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt(3), and its own limits for the thresholds that it adapts.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGEST_MMAP_THRESHOLD, MOST_MMAPS = 32 * 2**20, 65536


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While it lasts, glibc keeps freed memory for the next allocation, and gives it back to the system at the end.

    Each batch of a forward on the CPU frees activations of many megabytes. glibc returns them to the system, and the
    next batch pays a page fault for every 4 KiB: a quarter of the time of a small encoder. On other C libraries this
    does nothing. The limits are those of the process: the first block that ends restores them for all.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):  # Android's library has the first alone
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:  # glibc adapts no longer, so that both thresholds get the largest values to which it would have come
        libc.mallopt(MMAP_MAX, MOST_MMAPS)
        libc.mallopt(MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)

"""A DICOM file of several frames, in a folder, becomes several images."""

import functools
import os

from .decode import BrokenImage, as_file, decoding
from .dicom_header import count_frames
from .folders import DICOM_EXTENSIONS, file_type, readable


def frames_of(path: str) -> list[str]:
    """The path of a file; for a DICOM file of several frames, that of each (`scan.dcm/0001`).

    A file that is damaged, or whose name is not UTF-8, stays one image.

    Raises ImageFormatError if pydicom is missing.
    """
    if file_type(path) not in DICOM_EXTENSIONS or readable(path) != path:
        return [path]
    try:
        with decoding(path):
            about = os.stat(path)
            frames = _count(path, about.st_mtime_ns, about.st_size)
    except BrokenImage:  # it is named and counted when it is read
        return [path]
    return [path] if frames == 1 else [f"{path}/{number:04d}" for number in range(1, frames + 1)]


@functools.lru_cache(maxsize=1 << 17)
def _count(path: str, changed: int, size: int) -> int:
    """Kept, because a run reads its sources several times."""
    with as_file(path) as file:
        return count_frames(file)

"""The header of a DICOM file: what it says about its images, without reading their pixels."""

import contextlib
import functools
import os
import warnings
from dataclasses import dataclass
from typing import Any

from hf_mim.models.pixels import ImageFormatError

PREAMBLE = 128  # bytes before the letters DICM
SEGMENTED = "SegmentedRedPaletteColorLookupTableData"
_TAGS = (
    "NumberOfFrames Rows Columns SamplesPerPixel BitsAllocated BitsStored PixelRepresentation "
    "PhotometricInterpretation Modality PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept "
    "ModalityLUTSequence SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence"
).split()
_TAGS += [SEGMENTED]
_TAGS += [
    f"{name}PaletteColorLookupTable{part}" for name in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")
]
_SIZE_TAGS = (0x00280002, 0x00280008, 0x00280010, 0x00280011, 0x00280100)  # samples, frames, rows, columns, bits
_TRANSFER_SYNTAX = 0x00020010
_FRAGMENT = 8  # bytes before each compressed frame


@dataclass(frozen=True)
class Header:
    """What the file says about its images.

    bits, low, high: of the stored values; None, 0, 0 for floats.
    rescale: (slope, intercept) of all frames, or of each.
    padding: the stored value that is no data, and the other end of its range.
    tables: the pydicom dataset, if it has a palette or a modality table.
    """

    rows: int
    columns: int
    frames: int
    samples: int
    bits: int | None
    low: int
    high: int
    photometric: str
    syntax: str
    rescale: tuple[tuple[float, float], ...]
    padding: tuple[int, int] | None
    tables: Any

    def rescale_of(self, frame: int) -> tuple[float, float]:
        return self.rescale[frame if len(self.rescale) > 1 else 0]


def count_frames(file) -> int:
    """How many images the file holds; 1 if its bytes cannot hold as many as it says, which opening it finds out.

    Raises as `read_dicom`.
    """
    with reading() as pydicom:
        syntax = _syntax(file)
        file.seek(0)
        head = pydicom.filereader.read_partial(file, lambda tag, *_: tag > _SIZE_TAGS[-1], specific_tags=[*_SIZE_TAGS])
        frames = int(head.get("NumberOfFrames") or 1)
        return frames if 0 < frames * _frame_bytes(head, syntax) <= file.seek(0, os.SEEK_END) else 1


def _frame_bytes(head, syntax) -> int:
    """The fewest bytes that a frame of the file takes."""
    if syntax.is_encapsulated:
        return _FRAGMENT
    return max(1, head.Rows * head.Columns * head.get("SamplesPerPixel", 1) * head.BitsAllocated // 8)


@contextlib.contextmanager
def reading():
    """Gives pydicom, and turns what it raises on damaged files into ValueError."""
    try:
        import pydicom
    except ImportError:
        raise ImageFormatError("a DICOM file needs pydicom: pip install hf-mim[dicom]") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # values that the standard forbids, in files that can be read
            yield pydicom
    except (AttributeError, KeyError, pydicom.errors.InvalidDicomError) as error:
        raise ValueError(f"a damaged DICOM file: {error}") from error


def _syntax(file):
    """The UID of the transfer syntax. Deflated files are refused: a few bytes may hold gigabytes."""
    import pydicom

    file.seek(PREAMBLE + 4)
    elements = pydicom.filereader.data_element_generator(
        file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2
    )
    found = {int(element.tag): element.value for element in elements}
    if not found.get(_TRANSFER_SYNTAX):
        raise ValueError("a DICOM file without a transfer syntax")
    syntax = pydicom.uid.UID(found[_TRANSFER_SYNTAX].decode("ascii", "replace").strip("\0 "))
    if syntax.is_private or not syntax.is_transfer_syntax:
        raise ImageFormatError(f"a DICOM file of the transfer syntax {syntax}, which is not read")
    if syntax.is_deflated:
        raise ImageFormatError(
            f"a DICOM file of the transfer syntax {syntax.name}, which is not read; save it as another"
        )
    return syntax


def read_header(file) -> Header:
    """The header of a DICOM file. That of a file on disk is kept, because its frames share it: for 300 frames, reading
    it takes .05 s."""
    name = getattr(file, "name", None)
    if not isinstance(name, str):
        return _parsed(file)
    about = os.fstat(file.fileno())
    return _kept(name, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=256)
def _kept(path: str, changed: int, size: int) -> Header:
    with open(path, "rb") as file:
        return _parsed(file)


def _parsed(file) -> Header:
    import pydicom

    syntax = _syntax(file)
    file.seek(0)
    head = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
    if "Rows" not in head:
        raise ValueError(f"a DICOM file without pixels (modality {head.get('Modality', 'unknown')})")
    frames = int(head.get("NumberOfFrames") or 1)
    if frames * _frame_bytes(head, syntax) > file.seek(0, os.SEEK_END):
        told = f"{frames} frame{'' if frames == 1 else 's'} of {head.Columns} x {head.Rows}"
        raise ValueError(f"its header says {told}, and the file ends before")
    bits, is_signed = head.get("BitsStored"), bool(head.get("PixelRepresentation", 0))
    if bits is not None and not 1 <= bits <= 32:
        raise ValueError(f"its BitsStored is {bits}")
    ends = (0, 0) if bits is None else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    has_tables = "ModalityLUTSequence" in head or head.PhotometricInterpretation == "PALETTE COLOR"
    return Header(
        rows=head.Rows,
        columns=head.Columns,
        frames=frames,
        samples=head.get("SamplesPerPixel", 1),
        bits=bits,
        low=ends[0],
        high=ends[1],
        photometric=head.PhotometricInterpretation,
        syntax=str(syntax),
        rescale=_rescales(head),
        padding=_padding(head, is_signed),
        tables=head if has_tables else None,
    )


def _rescales(head) -> tuple[tuple[float, float], ...]:
    """(slope, intercept) of all frames, or of each frame of an enhanced file."""

    def of(holder, otherwise: tuple[float, float]) -> tuple[float, float]:
        if holder is None or holder.get("RescaleSlope") is None:
            return otherwise
        slope, intercept = float(holder.RescaleSlope), float(holder.get("RescaleIntercept") or 0)
        if slope == 0:
            raise ValueError("its RescaleSlope is 0")
        return slope, intercept

    def group(functional) -> object:
        return next(iter(functional.get("PixelValueTransformationSequence") or ()), None)

    shared = next(iter(head.get("SharedFunctionalGroupsSequence") or ()), None)
    common = of(None if shared is None else group(shared), of(head, (1.0, 0.0)))
    each = tuple(of(group(frame), common) for frame in head.get("PerFrameFunctionalGroupsSequence") or ())
    return each if len(set(each)) > 1 else (each or (common,))[:1]


def _padding(head, is_signed: bool) -> tuple[int, int] | None:
    """PixelPaddingValue, and the other end of its range. Signed values are written as unsigned in some files."""
    value = head.get("PixelPaddingValue")
    if value is None:
        return None
    values = value, value if (limit := head.get("PixelPaddingRangeLimit")) is None else limit
    first, last = (int(end) - 65536 if is_signed and int(end) > 32767 else int(end) for end in values)
    return first, last

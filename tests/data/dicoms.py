"""DICOM files that tests make."""

import io
from collections.abc import Sequence

import numpy as np

CT = "1.2.840.10008.5.1.4.1.1.2"
UNCOMPRESSED = "1.2.840.10008.1.2.1"


def dicom(
    stored,
    bits: int = 16,
    photometric: str = "MONOCHROME2",
    syntax: str = UNCOMPRESSED,
    frames: Sequence[bytes] = (),
    **tags,
) -> bytes:
    """The bytes of a DICOM file with these stored values: [h, w], [frames, h, w], or [h, w, 3] for colours.

    bits: that are stored of each value. frames: the compressed frames, of the transfer syntax. tags: of the file; None
    takes one out.
    """
    import pydicom
    from pydicom.encaps import encapsulate

    stored = np.asarray(stored)
    is_colour = photometric not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID, data.Modality, data.PatientName = CT, "1.2.3", "CT", "Doe^Jane"
    data.Rows, data.Columns = stored.shape[:2] if is_colour else stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 3 if is_colour else 1, photometric
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * stored.dtype.itemsize, bits, bits - 1
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    if is_colour:
        data.PlanarConfiguration = 0
    elif stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    data.PixelData = encapsulate(list(frames)) if frames else stored.tobytes() + b"\0" * (stored.nbytes % 2)
    data["PixelData"].VR = "OB" if frames or stored.dtype.itemsize == 1 else "OW"
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()

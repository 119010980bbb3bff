"""The size that a compressed picture says, read before a decoder takes memory for it."""

_NO_FRAME = (0xC4, 0xC8, 0xCC)  # within C0..CF: tables and an extension (ITU-T T.81, table B.1)
_JPEG_LS = 0xF7  # start of a frame of JPEG-LS (ITU-T T.87, C.1.1)
_ALONE = (0x01, *range(0xD0, 0xD9))  # markers without a length


def jpeg_size(data: bytes) -> tuple[int, int, int]:
    """(width, height, components) of a JPEG, a lossless JPEG, a JPEG-LS or a JPEG 2000 stream.

    Raises ValueError if the bytes are none of these.
    """
    if data.startswith(b"\xff\x4f\xff\x51"):  # JPEG 2000: the marker SIZ comes first (ISO 15444-1, A.5.1)
        x, y, x_start, y_start = (int.from_bytes(data[at : at + 4], "big") for at in (8, 12, 16, 20))
        return x - x_start, y - y_start, int.from_bytes(data[40:42], "big")
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while (at := data.find(b"\xff", at)) >= 0 and at + 9 < len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF) or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME or marker == _JPEG_LS:
            height, width = (int.from_bytes(data[place : place + 2], "big") for place in (at + 5, at + 7))
            return width, height, data[at + 9]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError("its pixels are no JPEG stream, or one that breaks off")

"""A PNG that is written row by row, so that a picture larger than memory can be saved.

Pillow and its like want the whole picture at once. The format (W3C PNG, third edition) needs little: a header,
one zlib stream of filtered rows, an end mark. Every row is filtered with "Up" (difference to the
row above), which numpy does at memory speed and which suits smooth enlarged pictures.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from types import TracebackType

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey + alpha, RGB, RGB + alpha
FILTER_UP = 2
LEVEL = 4  # of zlib: level 6 takes four times as long for about 3 % fewer bytes
CHUNK_BYTES = 1 << 20  # filtered and compressed at a time, and the size of an IDAT chunk


class PngWriter:
    """Write rows to an open file; `close` (or leaving the `with` block without error) ends the picture.

    channels  1 grey, 2 grey + alpha, 3 RGB, 4 RGB + alpha
    bits      8 or 16
    icc       colour profile, stored as it is
    """

    def __init__(
        self,
        file: BinaryIO,
        width: int,
        height: int,
        channels: int,
        bits: int = 8,
        icc: bytes | None = None,
    ) -> None:
        self._file = file
        self._shape = (width, channels)
        self._dtype = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}[bits]
        self._rows_left = height
        self._above = np.zeros((1, width * channels * bits // 8), np.uint8)
        self._deflate = zlib.compressobj(LEVEL)
        self._pending = bytearray()
        file.write(SIGNATURE)
        header = struct.pack(">IIBBBBB", width, height, bits, COLOUR_TYPES[channels], 0, 0, 0)
        self._chunk(b"IHDR", header)
        if icc:
            self._chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))

    def write(self, rows: np.ndarray) -> None:
        """The next rows: (n, width, channels), or (n, width) for grey; uint8 or uint16 as `bits` says."""
        shaped = rows if rows.ndim == 3 else rows[..., None]
        assert shaped.shape[1:] == self._shape, f"{shaped.shape} is not (n, *{self._shape})"
        assert shaped.dtype == self._dtype, f"{shaped.dtype} given to a writer of {self._dtype}"
        assert len(shaped) <= self._rows_left, "more rows than the header promised"
        self._rows_left -= len(shaped)
        step = max(1, CHUNK_BYTES // self._above.size)
        for start in range(0, len(shaped), step):
            self._compress(shaped[start : start + step])

    def _compress(self, rows: np.ndarray) -> None:
        """Filter and deflate a few rows (at least one)."""
        ordered = np.ascontiguousarray(rows, dtype=self._dtype.newbyteorder(">"))
        plain = ordered.view(np.uint8).reshape(len(rows), -1)
        filtered = np.empty((len(plain), 1 + plain.shape[1]), np.uint8)
        filtered[:, 0] = FILTER_UP
        np.subtract(plain[:1], self._above, out=filtered[:1, 1:])
        np.subtract(plain[1:], plain[:-1], out=filtered[1:, 1:])
        self._above = plain[-1:].copy()
        self._pending += self._deflate.compress(filtered.data)
        if len(self._pending) >= CHUNK_BYTES:
            self._flush()

    def close(self) -> None:
        """End the stream; every promised row must have been written."""
        assert self._rows_left == 0, f"{self._rows_left} rows are missing"
        self._pending += self._deflate.flush()
        self._flush()
        self._chunk(b"IEND", b"")

    def __enter__(self) -> PngWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

    def _flush(self) -> None:
        for start in range(0, len(self._pending), CHUNK_BYTES):
            self._chunk(b"IDAT", bytes(self._pending[start : start + CHUNK_BYTES]))
        self._pending.clear()

    def _chunk(self, kind: bytes, data: bytes) -> None:
        checksum = zlib.crc32(data, zlib.crc32(kind))
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))

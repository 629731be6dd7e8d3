"""Files that a stranger may upload: too large by their headers, damaged, of other kinds, or not pictures at all."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def hostile_files() -> dict[str, bytes]:
    """Name -> bytes; none of them can be enlarged."""
    return {
        "bomb.png": png_header(30_000, 30_000),
        "long.png": png_header(1_000_000, 1),
        "zero.png": png_header(0, 10),
        "bomb.tif": tiff_header(30_000, 30_000),
        "bomb.webp": webp_header(16_384, 16_384),
        "bomb.bmp": bmp_header(30_000, 30_000),
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "page.html": b"<html><script>alert(1)</script></html>",
        "page.png": b"<html><script>alert(1)</script></html>",
        "moving.gif": encoded("GIF"),
        "moving.png": encoded("GIF"),
        "icon.ico": encoded("ICO"),
        "program.png": b"\x7fELF" + bytes(200),
        "program.py": b"import os\nos.system('true')\n",
        "weights.safetensors": struct.pack("<Q", 2) + b"{}",
        "archive.png": b"PK\x03\x04" + bytes(100),
        "empty.png": b"",
        "half.png": encoded("PNG")[:200],
        "half.jpg": encoded("JPEG")[:200],
        "half.webp": encoded("WEBP")[:100],
        "zeros.png": bytes(1000),
        "<img src=x onerror=alert(1)>.png": b"no picture",
        "../../../etc/cron.d/evil.png": b"no picture",
        "con\x01trol\u202egnp.exe": b"no picture",
    }


def mutated(seed: int, count: int) -> dict[str, bytes]:
    """Pictures with bytes changed at random; a few may still open."""
    numbers = np.random.default_rng(seed)
    files = {}
    for i in range(count):
        kind = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")[i % 5]
        data = np.frombuffer(encoded(kind), np.uint8).copy()
        at = numbers.integers(0, len(data), 1 + i % 12)
        data[at] = numbers.integers(0, 256, len(at))
        files[f"mutated{i}.{kind.lower()}"] = data.tobytes()
    return files


def encoded(kind: str) -> bytes:
    rgb = np.random.default_rng(1).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    held = io.BytesIO()
    Image.fromarray(rgb).save(held, kind)
    return held.getvalue()


def png_header(w: int, h: int) -> bytes:
    """A PNG that says (w, h) and holds a few compressed zeros."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + size + body


def tiff_header(w: int, h: int) -> bytes:
    tags = {256: w, 257: h, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: h, 279: w * h}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(300)


def webp_header(w: int, h: int) -> bytes:
    """A lossless WebP of (w, h), 16,384 at most, whose pixels are missing."""
    body = b"\x2f" + struct.pack("<I", (w - 1) | (h - 1) << 14) + bytes(64)
    chunk = b"VP8L" + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def bmp_header(w: int, h: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, w, h, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + info + bytes(100)

# SPDX-License-Identifier: Apache-2.0
"""What strangers upload: limits, bombs, things that are no pictures."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtprune.demo import guard
from vtprune.errors import InputError


def png(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels, in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100_000), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def cut() -> bytes:
    """The first half of a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[: buffer.tell() // 2]


def torn_exif() -> bytes:
    """A JPEG that is to be turned, beside a description that is said to be no text."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 40
    data = bytearray(exif.tobytes())
    data[17] = 0
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "JPEG", exif=bytes(data))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torn_exif(), "damaged"),
        (png(8_000, 8_000), r"8000 x 8000 pixels, and 50 million is the limit"),
        (png(40_000, 40_000), "far too many pixels"),
        (cut(), "damaged"),
        (b"GIF89a nothing more", "not a picture|damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"", "not a picture"),
    ],
)
def test_refused_pictures(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "given.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        guard.picture(path)


def test_large_files_are_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(guard.MAX_BYTES + 1)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(InputError, match="25 MB is the limit"):
        guard.picture(path)
    with pytest.raises(InputError, match="25 MB is the limit"):
        guard.clip(path, fps=2, frames=8, side=224)
    with pytest.raises(InputError, match="did not arrive"):
        guard.picture(tmp_path / "none.png")


def test_pictures_are_turned_flattened_and_made_smaller(tmp_path: Path) -> None:
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[274] = 6  # a quarter turn
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert guard.picture(tmp_path / "turned.jpg").size == (20, 40)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert guard.picture(tmp_path / "clear.png").getpixel((4, 4)) == (255, 255, 255)
    Image.new("RGB", (3000, 30), "blue").save(tmp_path / "wide.webp")
    assert guard.picture(tmp_path / "wide.webp").size == (2048, 20)
    frames = [Image.new("P", (9, 9), i) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert guard.picture(tmp_path / "moving.gif").mode == "RGB"


def test_a_picture_passes_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert np.array_equal(np.asarray(guard.picture(tmp_path / "a.png")), pixels)


def test_long_videos_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from vtprune import video

    frames = [Image.new("RGB", (64, 64), (i % 256, 0, 0)) for i in range(62)]
    video.write(tmp_path / "long.mp4", frames, fps=0.5)
    with pytest.raises(InputError, match="60 s is the limit"):
        guard.clip(tmp_path / "long.mp4", fps=2, frames=8, side=64)


def test_questions() -> None:
    assert guard.question("  what\n is\x00 it ? ") == "what is it ?"
    for bad in (None, "", " \n\t"):
        with pytest.raises(InputError, match="question is empty"):
            guard.question(bad)
    with pytest.raises(InputError, match="501 characters"):
        guard.question("a" * 501)

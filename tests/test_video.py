# SPDX-License-Identifier: Apache-2.0
"""Frames of video files: both backends read the same ones, at the right times, and refuse the same files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vtprune import video
from vtprune.errors import ConfigError, InputError

pytest.importorskip("av")
BACKENDS = video.backends()


def numbered(count: int, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    """Frames whose brightness is their number, with something that moves."""
    frames = []
    for i in range(count):
        frame = Image.new("RGB", size, (8 * i, 8 * i, 8 * i))
        frame.paste((255, 0, 0), (2 * i, 8, 2 * i + 16, 24))
        frames.append(frame)
    return frames


def numbers(clip: video.Clip) -> list[int]:
    return [round(float(np.asarray(frame)[-8:, -8:].mean()) / 8) for frame in clip.frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    video.write(path, numbered(24), fps=8)
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_are_those_of_their_times(clip: Path, backend: str) -> None:
    read = video.read(clip, fps=2, backend=backend)
    assert numbers(read) == [0, 4, 8, 12, 16, 20]  # three seconds, two frames of each
    assert read.times == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5]) and read.seconds == pytest.approx(3.0)
    assert read.fps == pytest.approx(2.0) and read.backend == backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_frames_cover_all_of_a_long_video(clip: Path, backend: str) -> None:
    read = video.read(clip, fps=8, frames=4, backend=backend)
    assert numbers(read) == [0, 6, 12, 18] and read.fps == pytest.approx(4 / 3)
    assert len(video.read(clip, fps=1, backend=backend)) == 2  # three would leave one without its pair
    assert video.read(clip, fps=1, side=48, backend=backend).frames[0].size == (48, 32)


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("mpeg4", "mov")])
def test_both_backends_read_the_same_bits(tmp_path: Path, codec: str, suffix: str) -> None:
    if BACKENDS != ["av", "decord"]:
        pytest.skip("decord is not installed")
    path = tmp_path / f"clip.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    frames = [Image.fromarray(np.roll(noise, i, 1)).resize((192, 128), Image.Resampling.BICUBIC) for i in range(20)]
    video.write(path, frames, fps=10, codec=codec)
    one, other = (video.read(path, fps=5, backend=backend) for backend in BACKENDS)
    assert len(one) == len(other) == 10 and one.times == pytest.approx(other.times, abs=1e-3)
    for a, b in zip(one.frames, other.frames, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def test_uneven_times(tmp_path: Path) -> None:
    """A frame that is shown for long is the one that is shown, whatever its number."""
    import av

    path = tmp_path / "uneven.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, at in zip(range(6), (0, 1, 2, 3, 20, 29), strict=True):
            frame = av.VideoFrame.from_image(numbered(6)[number])
            frame.pts, frame.time_base = at, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for backend in BACKENDS:
        assert numbers(video.read(path, fps=2, backend=backend))[:6] == [0, 3, 3, 3, 4, 4], backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_refused(clip: Path, tmp_path: Path, backend: str) -> None:
    with pytest.raises(InputError, match="3 s long, and 2 s is the limit"):
        video.read(clip, max_seconds=2, backend=backend)
    with pytest.raises(InputError, match="96 x 64 pixels, and 1,000 is the limit"):
        video.read(clip, max_pixels=1000, backend=backend)
    with pytest.raises(InputError, match="there is no video"):
        video.read(tmp_path / "none.mp4", backend=backend)
    text = tmp_path / "text.mp4"
    text.write_text("no video at all\n" * 100)
    with pytest.raises(InputError, match=r"text\.mp4 .*give"):
        video.read(text, backend=backend)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(clip.read_bytes()[:200])
    with pytest.raises(InputError, match=r"cut\.mp4"):
        video.read(cut, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_names_other_files_opens_none_of_them(tmp_path: Path, backend: str) -> None:
    """FFmpeg would read playlists, and so whatever file of this machine they name."""
    video.write(tmp_path / "secret.ts", numbered(8), 4)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2.0,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    for name, text in (
        ("list.m3u8", playlist),
        ("list.mp4", playlist),
        ("list.mp4", "ffconcat version 1.0\nfile secret.ts\n"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="no video file begins like this"):
            video.read(tmp_path / name, backend=backend)


def test_containers(tmp_path: Path) -> None:
    for suffix in ("mp4", "mov", "avi", "mkv", "ts", "flv", "mpg"):
        path = tmp_path / f"clip.{suffix}"
        video.write(path, numbered(24), 24, "mpeg1video" if suffix == "mpg" else "libx264")
        assert len(video.read(path, backend="av")) == 2, suffix


def test_frames_that_grow_after_the_header(tmp_path: Path) -> None:
    for name, size in (("small", (96, 64)), ("large", (384, 256))):
        video.write(tmp_path / f"{name}.ts", numbered(8, size), 4)
    path = tmp_path / "grows.ts"
    path.write_bytes(b"".join((tmp_path / f"{name}.ts").read_bytes() for name in ("small", "large")))
    with pytest.raises(InputError, match="change in size"):
        video.read(path, backend="av")
    with pytest.raises(InputError, match="not a video that can be read"):  # decoded no further
        video.read(path, max_pixels=10_000, backend="av")


def test_without_a_backend(monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    monkeypatch.setattr(video, "backends", lambda: ["decord"])
    with pytest.raises(ConfigError, match="needs av; pip install"):
        video.read(clip, backend="av")
    monkeypatch.setattr(video, "backends", list)
    with pytest.raises(ConfigError, match="pip install"):
        video.read(clip)
    with pytest.raises(ConfigError, match="choose one of av, decord"):
        video.read(clip, backend="vlc")

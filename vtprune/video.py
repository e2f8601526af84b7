# SPDX-License-Identifier: Apache-2.0
"""Frames of a video file, by PyAV or by decord: the same ones, bit for bit.

Frames are chosen by the time at which they are shown, which both backends read from the file, so a variable frame rate
is no trap. What is wrong with a file is one `InputError` that says so, whichever backend met it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .errors import ConfigError, InputError

#: In order of preference: PyAV is maintained and brings its own FFmpeg; decord is taken where it alone is installed.
BACKENDS = ("av", "decord")
#: A file says how long it is, and may lie: no more frames than this are decoded, whatever it says.
MOST_DECODED = 60 * 120
#: How files of one container each begin: MP4 and MOV; Matroska and WebM; AVI; MPEG-TS, also with time codes; MPEG-PS;
#: FLV; Ogg; GIF. FFmpeg opens playlists, too (HLS, concat, DASH), and then whatever files of this machine they name.
_CONTAINERS = re.compile(
    rb"....(?:ftyp|moov|mdat|wide|free|skip|pnot)|\x1aE\xdf\xa3|RIFF....AVI "
    rb"|G.{187}G|.{4}G.{191}G|\x00\x00\x01\xba|FLV\x01|OggS|GIF8",
    re.DOTALL,
)


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Parameters
    ----------
    frames
        RGB pictures, in order.
    times
        When each is shown, in seconds from the first frame of the video.
    fps
        Frames per second of `frames`, not of the file.
    seconds
        How long the video is.
    backend
        What read it.
    """

    frames: tuple[Image.Image, ...]
    times: tuple[float, ...]
    fps: float
    seconds: float
    backend: str

    def __len__(self) -> int:
        return len(self.frames)


def backends() -> list[str]:
    """The backends that are installed, best first."""
    return [name for name in BACKENDS if importlib.util.find_spec(name) is not None]


def read(
    path: str | Path,
    *,
    fps: float = 2.0,
    frames: int = 32,
    side: int | None = None,
    max_seconds: float | None = None,
    max_pixels: int | None = None,
    backend: str | None = None,
) -> Clip:
    """Read frames of a video that are equally far apart in time.

    Parameters
    ----------
    path
        An MP4, MOV, WebM, Matroska, AVI, MPEG, FLV, Ogg or GIF file.
    fps
        How many frames of each second.
    frames
        At most so many, and an even number of them unless there is one alone (models merge pairs); a longer video is
        read at a lower rate, so that they cover all of it.
    side
        Shrink frames until the longer side has at most so many pixels.
    max_seconds, max_pixels
        Refuse longer videos, and larger frames (width times height).
    backend
        ``"av"`` or ``"decord"``; default the first that is installed.

    Raises
    ------
    ConfigError
        No backend is installed, or not this one.
    InputError
        The file is no video, is damaged, or is beyond a limit.
    """
    installed = backends()
    if backend is not None and backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if not installed or backend not in (None, *installed):
        raise ConfigError(
            f"reading videos needs {backend or 'av'}; pip install 'vtprune[video]', or pip install decord"
        )
    if not fps > 0 or frames < 1:
        raise ConfigError(f"fps={fps} and frames={frames} must be larger than 0")
    if not Path(path).is_file():
        raise InputError(f"there is no video {path}; give the path of an MP4, WebM or MOV file")
    with Path(path).open("rb") as file:
        if not _CONTAINERS.match(file.read(256)):
            raise InputError(_unreadable(str(path), "no video file begins like this"))
    chosen = backend or installed[0]
    reader = _Av if chosen == "av" else _Decord
    limits = _Limits(max_seconds, max_pixels)
    stamps = np.asarray(reader.stamps(str(path), limits))
    if not len(stamps):
        raise InputError(f"{Path(path).name} has no frame that can be decoded; save it again, or give another video")
    seconds = float(stamps[-1] - stamps[0]) + (float(np.median(np.diff(stamps))) if len(stamps) > 1 else 0.0)
    limits.check_length(seconds)
    count = min(max(1, round(seconds * fps)), frames)
    count -= count % 2 if count > 1 else 0
    # Each wanted moment shows the last frame that began before it; a hair later, because times are rounded.
    wanted = stamps[0] + np.arange(count) * max(seconds / count, 0.0) + 1e-4
    index = np.clip(np.searchsorted(stamps, wanted, side="right") - 1, 0, None)
    pictures, size = {}, None
    for i, pixels in reader.pixels(str(path), sorted(set(index.tolist())), limits):
        if pixels.shape != (size or pixels.shape):
            raise InputError(f"the frames of {Path(path).name} change in size; save it again at one size")
        size, pictures[i] = pixels.shape, _fitted(pixels, side)
    missing = [i for i in index.tolist() if i not in pictures]
    if missing:
        raise InputError(f"{Path(path).name} is damaged at frame {missing[0]}; save it again, or give another video")
    return Clip(
        tuple(pictures[i] for i in index.tolist()),
        tuple(float(stamps[i] - stamps[0]) for i in index.tolist()),
        count / seconds if seconds > 0 else fps,
        seconds,
        chosen,
    )


def write(path: str | Path, frames: Sequence[Image.Image], fps: float, codec: str = "libx264") -> None:
    """Write frames as a video that browsers play; needs PyAV.

    Parameters
    ----------
    path
        Its suffix says the container.
    frames
        RGB pictures of one size, both sides even.
    fps
        Frames per second.
    codec
        Name of one of FFmpeg's encoders.
    """
    from fractions import Fraction

    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_image(frame)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@dataclass(frozen=True)
class _Limits:
    seconds: float | None
    pixels: int | None

    def check_length(self, seconds: float) -> None:
        if self.seconds is not None and seconds > self.seconds + 0.5:
            raise InputError(f"the video is {seconds:.0f} s long, and {self.seconds:.0f} s is the limit; cut it")

    def check_size(self, width: int, height: int) -> None:
        if self.pixels is not None and width * height > self.pixels:
            raise InputError(
                f"the video's frames have {width} x {height} pixels, and {self.pixels:,} is the limit; make it smaller"
            )


class _Av:
    """PyAV."""

    @staticmethod
    def stamps(path: str, limits: _Limits) -> list[float]:
        """When each frame is shown, ascending. Packets are read, not decoded: they carry the times."""
        import av

        found: list[float] = []
        with _reading(path), av.open(path) as container:
            stream = _stream_of(container, path)
            limits.check_size(stream.width, stream.height)
            if stream.duration and stream.time_base:
                limits.check_length(float(stream.duration * stream.time_base))
            for packet in container.demux(stream):
                if packet.pts is not None and packet.size and not packet.is_discard:
                    found.append(float(packet.pts * packet.time_base))
                if len(found) > MOST_DECODED:
                    raise InputError(f"the video has more than {MOST_DECODED:,} frames; cut it")
        return sorted(found)

    @staticmethod
    def pixels(path: str, index: list[int], limits: _Limits) -> Iterator[tuple[int, np.ndarray]]:
        """Wanted frames ``[h, w, 3]`` uint8 with their numbers."""
        import av

        wanted, last = set(index), index[-1]
        with _reading(path), av.open(path) as container:
            stream = _stream_of(container, path)
            stream.thread_type = "AUTO"
            if limits.pixels is not None:  # frames may grow after the header said how large they are
                stream.codec_context.options = {"max_pixels": str(limits.pixels)}
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    yield number, frame.to_ndarray(format="rgb24")
                if number >= last:
                    return


class _Decord:
    """decord, whose errors are of a class of its own."""

    @staticmethod
    def stamps(path: str, limits: _Limits) -> list[float]:
        video = _Decord._open(path)
        if len(video) > MOST_DECODED:
            raise InputError(f"the video has more than {MOST_DECODED:,} frames; cut it")
        limits.check_length(len(video) / max(video.get_avg_fps(), 1e-6))
        if not len(video):
            return []
        try:
            height, width, _ = video[0].shape
            stamps = video.get_frame_timestamp(list(range(len(video))))[:, 0].astype(float).tolist()
        except Exception as error:  # decord's own
            raise InputError(_unreadable(path, error)) from None
        limits.check_size(width, height)
        return stamps

    @staticmethod
    def pixels(path: str, index: list[int], _limits: _Limits) -> Iterator[tuple[int, np.ndarray]]:
        video = _Decord._open(path)
        try:
            for number in index:
                yield number, video[number].asnumpy()
        except Exception as error:  # decord's own
            raise InputError(_unreadable(path, error)) from None

    @staticmethod
    def _open(path: str) -> Any:
        import decord

        try:
            return decord.VideoReader(path, num_threads=1)
        except Exception as error:
            raise InputError(_unreadable(path, error)) from None


class _reading:
    """What FFmpeg says of a bad file, as an `InputError`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import av

        if isinstance(error, av.FFmpegError | IndexError | UnicodeDecodeError):
            raise InputError(_unreadable(self.path, error)) from None


def _stream_of(container: Any, path: str) -> Any:
    if not container.streams.video:
        raise InputError(f"{Path(path).name} has no pictures in it, only sound or text; give a video")
    if container.streams.video[0].codec_context is None:
        raise InputError(_unreadable(path, "nothing here decodes its pictures"))
    return container.streams.video[0]


def _unreadable(path: str, error: BaseException | str) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return f"{Path(path).name} is not a video that can be read ({reason}); give an MP4, WebM or MOV file"


def _fitted(pixels: np.ndarray, side: int | None) -> Image.Image:
    picture = Image.fromarray(pixels, "RGB")
    if side is not None and max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return picture

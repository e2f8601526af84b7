# SPDX-License-Identifier: Apache-2.0
"""Batches of PocketVQA: small arrays made on the CPU, pictures and targets made from them on any device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import vocab
from .data import (
    CELL,
    CHARACTERS,
    COLORS,
    GLYPH_WIDTH,
    GRID,
    NOISE,
    SHAPES,
    SIDE,
    SIZES,
    TEXT_LENGTH,
    Question,
    Scene,
    glyph_masks,
    questions,
    scene,
    shape_masks,
)

PATCH = 14
PATCHES = (SIDE // PATCH) ** 2
PREFIX = 1 + PATCHES  # <s> and the image
TEXT_ROW = 79  # with the prefix 656 = 41 * 16 keys, which suits the attention kernels; 8 questions need at most 72
IGNORE = -100

_TEXT = len(SHAPES) * len(SIZES)  # the "what" code of a text
CLASSES = 2 + len(SHAPES)  # none, shapes, text
CLS_LABELS = len(SHAPES) + len(COLORS) + len(CHARACTERS)

_SHAPE_ID = {name: i for i, name in enumerate(SHAPES)}
_SIZE_ID = {name: i for i, name in enumerate(SIZES)}
_COLOR_ID = {name: i for i, name in enumerate(COLORS)}


def picture_arrays(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Describe pictures by small tensors.

    Parameters
    ----------
    scenes
        B scenes.

    Returns
    -------
    dict
        ``what`` int64 [B, 36]: -1 for an empty cell, ``3 * shape + size``, or 24 for a text;
        ``color`` int64 [B, 36] and ``rgb`` uint8 [B, 36, 3]; ``chars`` int64 [B, 3], -1 without a text;
        ``corners`` float32 [B, 3, 2, 2].
    """
    batch, cells = len(scenes), GRID * GRID
    what = np.full((batch, cells), -1, np.int64)
    color = np.zeros((batch, cells), np.int64)
    rgb = np.zeros((batch, cells, 3), np.uint8)
    chars = np.full((batch, TEXT_LENGTH), -1, np.int64)
    for b, item in enumerate(scenes):
        for s in item.shapes:
            what[b, s.cell] = len(SIZES) * _SHAPE_ID[s.shape] + _SIZE_ID[s.size]
            color[b, s.cell] = _COLOR_ID[s.color]
            rgb[b, s.cell] = s.rgb
        if item.text is not None:
            what[b, item.text.cell] = _TEXT
            color[b, item.text.cell] = _COLOR_ID[item.text.color]
            rgb[b, item.text.cell] = item.text.rgb
            chars[b] = [CHARACTERS.index(character) for character in item.text.string]
    corners = np.asarray([item.corners for item in scenes], np.float32).reshape(batch, 2, 2, 3).transpose(0, 3, 1, 2)
    arrays = {"what": what, "color": color, "rgb": rgb, "chars": chars, "corners": np.ascontiguousarray(corners)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def text_arrays(rows: Sequence[Sequence[Question]], chat: Sequence[bool], length: int = TEXT_ROW) -> dict[str, Tensor]:
    """Pack questions and answers into rows that follow the picture.

    Parameters
    ----------
    rows
        B lists of questions.
    chat
        Per row: whether it is one conversation (each turn sees the earlier ones, positions run on) or a set of
        questions that each see the picture alone, at the positions they would have as the only question.
    length
        Tokens per row.

    Returns
    -------
    dict
        int64 [B, length] each: ``ids``; ``labels`` (answers and ``</s>``, -100 elsewhere); ``turn`` (which tokens see
        one another); ``positions``.

    Raises
    ------
    ValueError
        If a row does not fit.
    """
    shape = (len(rows), length)
    ids, labels = np.full(shape, vocab.PAD, np.int64), np.full(shape, IGNORE, np.int64)
    turn, positions = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    positions[:] = np.arange(PREFIX, PREFIX + length)
    for b, (row, conversation) in enumerate(zip(rows, chat, strict=True)):
        start = 0
        for number, question in enumerate(row):
            asked, answer = vocab.encode(question.text), [*vocab.encode_answer(question), vocab.EOS]
            middle, end = start + len(asked), start + len(asked) + len(answer)
            if end > length:
                raise ValueError(f"{len(row)} questions need more than {length} tokens")
            ids[b, start:end] = asked + answer
            labels[b, middle:end] = answer
            turn[b, start:end] = 0 if conversation else number
            if not conversation:
                positions[b, start:end] = np.arange(PREFIX, PREFIX + end - start)
            start = end
    arrays = {"ids": ids, "labels": labels, "turn": turn, "positions": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TrainingBatches(torch.utils.data.Dataset):
    """Batch number ``i`` holds the training scenes ``i * batch .. (i + 1) * batch - 1``, whatever came before.

    Every fourth row is a conversation, so that questions after the first are learnt too.
    """

    def __init__(self, batch: int, seed: int):
        self.batch, self.seed = batch, seed

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        scenes = [scene("train", step * self.batch + b, self.seed) for b in range(self.batch)]
        chat = [b % 4 == 3 for b in range(self.batch)]
        return picture_arrays(scenes) | text_arrays([questions(item) for item in scenes], chat)


class Renderer:
    """Draws pictures and their training targets from ``picture_arrays`` on a device."""

    def __init__(self, device: torch.device | str):
        self.shapes = torch.from_numpy(shape_masks()).flatten(0, 1).to(device).float() / 255
        self.glyphs = torch.from_numpy(glyph_masks()).to(device).float() / 255

    def coverage(self, arrays: dict[str, Tensor]) -> Tensor:
        """How much of each pixel an object covers: float32 [B, 336, 336] in [0, 1]."""
        what = arrays["what"]
        margin = (CELL - TEXT_LENGTH * GLYPH_WIDTH) // 2
        text = self.glyphs[arrays["chars"].clamp_min(0)].permute(0, 2, 1, 3).flatten(2)
        text = F.pad(text, (margin, margin))[:, None]
        cells = torch.where((what == _TEXT)[..., None, None], text, self.shapes[what.clamp(0, _TEXT - 1)])
        cells = cells * (what >= 0)[..., None, None]
        return cells.view(-1, GRID, GRID, CELL, CELL).transpose(2, 3).reshape(-1, SIDE, SIDE)

    def pixels(self, arrays: dict[str, Tensor], coverage: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the pictures.

        Parameters
        ----------
        arrays
            From ``picture_arrays``, on the renderer's device.
        coverage
            From ``coverage``.
        generator
            Source of the pixel noise on the same device; ``None`` for no noise.

        Returns
        -------
        Tensor
            float32 [B, 3, 336, 336] in [0, 1].
        """
        background = F.interpolate(arrays["corners"], (SIDE, SIDE), mode="bilinear", align_corners=True)
        paint = (arrays["rgb"].float() / 255).view(-1, GRID, GRID, 3).permute(0, 3, 1, 2)
        paint = paint.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)
        pixels = torch.lerp(background, paint, coverage[:, None])
        if generator is not None:
            noise = torch.empty_like(pixels).normal_(0, NOISE, generator=generator)
            pixels = (pixels + noise).clamp(0, 1)
        return pixels

    def patch_targets(self, arrays: dict[str, Tensor], coverage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each patch shows, for the auxiliary loss.

        Returns
        -------
        tuple of Tensor
            int64: class [B, 576] (0 nothing, 1-8 a shape, 9 text), colour [B, 576] and characters [B, 576, 3]; the
            last two mean something only where the class is not 0, and 9.
        """
        per_cell = CELL // PATCH

        def spread(cells: Tensor) -> Tensor:
            grid = cells.view(-1, GRID, GRID)
            return grid.repeat_interleave(per_cell, 1).repeat_interleave(per_cell, 2).flatten(1)

        what, color = spread(arrays["what"]), spread(arrays["color"])
        covered = F.avg_pool2d(coverage[:, None], PATCH).flatten(1)
        is_text = what == _TEXT
        kind = torch.where(is_text, CLASSES - 1, what // len(SIZES) + 1)
        # A shape's patch must show enough of it to be told; the strokes of a character are thin.
        kind = torch.where((what >= 0) & (covered > torch.where(is_text, 0.01, 0.12)), kind, 0)
        chars = arrays["chars"].clamp_min(0)[:, None].expand(-1, PATCHES, -1)
        return kind, color, chars


def scene_targets(arrays: dict[str, Tensor]) -> Tensor:
    """What a whole picture shows, for the CLS loss: float32 [B, 43], 1 for each shape, colour, character in it."""
    what, color, chars = arrays["what"], arrays["color"], arrays["chars"]

    def seen(index: Tensor, valid: Tensor, count: int) -> Tensor:
        return (F.one_hot(index.clamp(0, count - 1), count) * valid[..., None]).amax(1)

    is_shape = (what >= 0) & (what < _TEXT)
    shapes = seen(what // len(SIZES), is_shape, len(SHAPES))
    colors = seen(color, what >= 0, len(COLORS))
    characters = seen(chars, chars >= 0, len(CHARACTERS))
    return torch.cat([shapes, colors, characters], 1).float()


def text_mask(turn: Tensor) -> Tensor:
    """Which keys each text token sees: bool [B, 1, L, 577 + L]; all of the picture, and its own turn so far."""
    length = turn.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=turn.device).tril()
    own = (turn[:, :, None] == turn[:, None, :]) & causal
    return F.pad(own, (PREFIX, 0), value=True)[:, None]

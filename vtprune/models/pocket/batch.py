# SPDX-License-Identifier: Apache-2.0
"""Batches for training: small arrays made on the CPU, pictures and targets made from them on any device."""

from __future__ import annotations

import math
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
    shape_masks,
    sprite_cells,
)
from .sprites import NAMES

PATCH = 14
PATCHES = (SIDE // PATCH) ** 2
IGNORE = -100
PICTURE_TURN = -1  # tokens that every question sees

_TEXT = len(SHAPES) * len(SIZES)  # the "what" code of a text; sprites follow it
TEXT_CLASS = 1 + len(SHAPES)
CLASSES = 2 + len(SHAPES) + len(NAMES)  # none, shapes, text, sprites
CLS_LABELS = len(SHAPES) + len(COLORS) + len(CHARACTERS) + len(NAMES)

_SHAPE_ID = {name: i for i, name in enumerate(SHAPES)}
_SIZE_ID = {name: i for i, name in enumerate(SIZES)}
_COLOR_ID = {name: i for i, name in enumerate(COLORS)}
_NAME_ID = {name: i for i, name in enumerate(NAMES)}


def picture_arrays(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Describe pictures of one size by small tensors.

    Parameters
    ----------
    scenes
        P scenes of R x C cells.

    Returns
    -------
    dict
        ``what`` int64 [P, R * C]: -1 for an empty cell, ``3 * shape + size``, 24 for a text, 25 and up for a sprite;
        ``color`` int64 [P, R * C] and ``rgb`` uint8 [P, R * C, 3]; ``chars`` int64 [P, R * C, 3], -1 without a text;
        ``corners`` float32 [P, 3, n, n], n the largest side among the scenes' background grids.
    """
    batch, cells = len(scenes), scenes[0].rows * scenes[0].columns
    what = np.full((batch, cells), -1, np.int64)
    color = np.zeros((batch, cells), np.int64)
    rgb = np.zeros((batch, cells, 3), np.uint8)
    chars = np.full((batch, cells, TEXT_LENGTH), -1, np.int64)
    for b, item in enumerate(scenes):
        for s in item.shapes:
            what[b, s.cell] = len(SIZES) * _SHAPE_ID[s.shape] + _SIZE_ID[s.size]
            color[b, s.cell] = _COLOR_ID[s.color]
            rgb[b, s.cell] = s.rgb
        for t in item.texts:
            what[b, t.cell] = _TEXT
            color[b, t.cell] = _COLOR_ID[t.color]
            rgb[b, t.cell] = t.rgb
            chars[b, t.cell] = [CHARACTERS.index(character) for character in t.string]
        for sprite in item.sprites:
            what[b, sprite.cell] = _TEXT + 1 + _NAME_ID[sprite.name]
    arrays = {"what": what, "color": color, "rgb": rgb, "chars": chars}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"corners": _backgrounds(scenes)}


def _backgrounds(scenes: Sequence[Scene]) -> Tensor:
    """Background grids of all scenes at the side of the largest; a finer grid draws a coarse one just as well."""
    sides = [math.isqrt(len(item.corners)) for item in scenes]
    grids = torch.empty(len(scenes), 3, max(sides), max(sides))
    for side in set(sides):
        rows = [i for i, s in enumerate(sides) if s == side]
        made = np.asarray([scenes[i].corners for i in rows], np.float32).reshape(-1, side, side, 3)
        coarse = torch.from_numpy(made).permute(0, 3, 1, 2)
        grids[rows] = F.interpolate(coarse, grids.shape[2:], mode="bilinear", align_corners=True)
    return grids


def text_arrays(
    rows: Sequence[Sequence[Question]], chat: Sequence[bool], start: int, length: int, strict: bool = True
) -> dict[str, Tensor]:
    """Pack questions and answers into rows that follow the pictures.

    Parameters
    ----------
    rows
        B lists of questions.
    chat
        Per row: whether it is one conversation (each turn sees the earlier ones, positions run on) or a set of
        questions that each see the pictures alone, at the positions they would have as the only question.
    start
        Position of the first text token.
    length
        Tokens per row.
    strict
        Whether a row that does not fit is an error; otherwise the questions that do not fit are left out.

    Returns
    -------
    dict
        int64 [B, length] each: ``ids``; ``labels`` (answers and ``</s>``, -100 elsewhere); ``turn`` (which tokens see
        one another, from 0; padding has numbers of its own); ``positions``.

    Raises
    ------
    ValueError
        If a row does not fit.
    """
    shape = (len(rows), length)
    ids, labels = np.full(shape, vocab.PAD, np.int64), np.full(shape, IGNORE, np.int64)
    turn = np.broadcast_to(np.arange(1000, 1000 + length), shape).copy()
    positions = np.broadcast_to(np.arange(start, start + length), shape).copy()
    for b, (row, conversation) in enumerate(zip(rows, chat, strict=True)):
        first = 0
        for number, question in enumerate(row):
            asked, answer = vocab.encode(question.text), [*vocab.encode_answer(question), vocab.EOS]
            middle, end = first + len(asked), first + len(asked) + len(answer)
            if end > length:
                if strict:
                    raise ValueError(f"{len(row)} questions need more than {length} tokens")
                break
            ids[b, first:end] = asked + answer
            labels[b, middle:end] = answer
            turn[b, first:end] = 0 if conversation else number
            if not conversation:
                positions[b, first:end] = np.arange(start, start + end - first)
            first = end
    arrays = {"ids": ids, "labels": labels, "turn": turn, "positions": positions}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class Renderer:
    """Draws pictures and their training targets from ``picture_arrays`` on a device."""

    def __init__(self, device: torch.device | str):
        self.shapes = torch.from_numpy(shape_masks()).flatten(0, 1).to(device).float() / 255
        self.glyphs = torch.from_numpy(glyph_masks()).to(device).float() / 255
        self.sprites = torch.from_numpy(sprite_cells()).to(device).float().permute(0, 3, 1, 2) / 255

    def coverage(self, arrays: dict[str, Tensor], rows: int = GRID, columns: int = GRID) -> Tensor:
        """How much of each pixel a thing covers: float32 [P, 56 * rows, 56 * columns] in [0, 1]."""
        what = arrays["what"]
        cells = self.shapes[what.clamp(0, _TEXT - 1)] * ((what >= 0) & (what < _TEXT))[..., None, None]
        texts = what == _TEXT
        margin = (CELL - TEXT_LENGTH * GLYPH_WIDTH) // 2
        written = self.glyphs[arrays["chars"][texts]].transpose(1, 2).flatten(2)
        cells[texts] = F.pad(written, (margin, margin))
        sprites = what > _TEXT
        cells[sprites] = self.sprites[what[sprites] - _TEXT - 1, 3]
        return cells.view(-1, rows, columns, CELL, CELL).transpose(2, 3).reshape(-1, rows * CELL, columns * CELL)

    def pixels(
        self,
        arrays: dict[str, Tensor],
        coverage: Tensor,
        generator: torch.Generator | None,
        rows: int = GRID,
        columns: int = GRID,
    ) -> Tensor:
        """Draw the pictures.

        Parameters
        ----------
        arrays
            From ``picture_arrays``, on the renderer's device.
        coverage
            From ``coverage``.
        generator
            Source of the pixel noise on the same device; ``None`` for no noise.
        rows, columns
            Size in cells.

        Returns
        -------
        Tensor
            float32 [P, 3, 56 * rows, 56 * columns] in [0, 1].
        """
        size = (rows * CELL, columns * CELL)
        background = F.interpolate(arrays["corners"], size, mode="bilinear", align_corners=True)
        paint = (arrays["rgb"].float() / 255).view(-1, rows, columns, 3)
        paint = paint.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).permute(0, 3, 1, 2).contiguous()
        what = arrays["what"].view(-1, rows, columns)
        picture, row, column = (what > _TEXT).nonzero(as_tuple=True)
        cells = paint.view(-1, 3, rows, CELL, columns, CELL)
        cells[picture, :, row, :, column] = self.sprites[what[picture, row, column] - _TEXT - 1, :3]
        pixels = torch.lerp(background, paint, coverage[:, None])
        if generator is not None:
            noise = torch.empty_like(pixels).normal_(0, NOISE, generator=generator)
            pixels = (pixels + noise).clamp(0, 1)
        return pixels


def patch_targets(
    arrays: dict[str, Tensor], coverage: Tensor, rows: int = GRID, columns: int = GRID, patch: int = PATCH
) -> dict[str, Tensor]:
    """What each patch shows, for the auxiliary loss.

    Parameters
    ----------
    arrays, coverage, rows, columns
        As for ``Renderer.pixels``.
    patch
        Side of a patch in pixels of the picture; divides 56.

    Returns
    -------
    dict
        int64 [P, N]: ``kind`` (0 nothing, 1-8 a shape, 9 text, 10 and up a sprite), ``size``, ``color`` and ``chars``
        [P, N, 3]; the last three mean something only for shapes, for shapes and texts, and for texts.
    """
    per_cell = CELL // patch

    def spread(cells: Tensor) -> Tensor:
        grid = cells.view(-1, rows, columns, *cells.shape[2:])
        return grid.repeat_interleave(per_cell, 1).repeat_interleave(per_cell, 2).flatten(1, 2)

    what = spread(arrays["what"])
    covered = F.avg_pool2d(coverage[:, None], patch).flatten(1)
    is_text = what == _TEXT
    kind = torch.where(what > _TEXT, what - _TEXT + TEXT_CLASS, what // len(SIZES) + 1)
    kind = torch.where(is_text, TEXT_CLASS, kind)
    # A shape's patch must show enough of it to be told: 24 pixels of it. The strokes of a character are thin.
    enough = torch.where(is_text, 0.01, 0.12 * (PATCH / patch) ** 2)
    kind = torch.where((what >= 0) & (covered > enough), kind, 0)
    size = what.clamp_min(0) % len(SIZES)
    return {"kind": kind, "size": size, "color": spread(arrays["color"]), "chars": spread(arrays["chars"])}


def scene_targets(arrays: dict[str, Tensor]) -> Tensor:
    """What a whole picture shows, for the CLS loss: float32 [P, 163], 1 for each shape, colour, character, sprite."""
    what, color, chars = arrays["what"], arrays["color"], arrays["chars"].flatten(1)

    def seen(index: Tensor, valid: Tensor, count: int) -> Tensor:
        hits = torch.zeros(len(index), count, device=index.device)
        return hits.scatter_reduce(1, index.clamp(0, count - 1), valid.float(), "amax")

    is_shape = (what >= 0) & (what < _TEXT)
    shapes = seen(what // len(SIZES), is_shape, len(SHAPES))
    colors = seen(color, (what >= 0) & (what <= _TEXT), len(COLORS))
    characters = seen(chars, chars >= 0, len(CHARACTERS))
    sprites = seen(what - _TEXT - 1, what > _TEXT, len(NAMES))
    return torch.cat([shapes, colors, characters, sprites], 1)


def text_mask(turn: Tensor, length: int) -> Tensor:
    """Which keys each of the last ``length`` tokens sees: bool [B, 1, length, S].

    Those of the pictures (``PICTURE_TURN``), and its own turn so far. ``turn`` is int64 [B, S].
    """
    first = turn.shape[1] - length
    own = turn[:, first:, None] == turn[:, None, :]
    causal = torch.ones(length, turn.shape[1], dtype=torch.bool, device=turn.device).tril(first)
    return ((own | (turn == PICTURE_TURN)[:, None, :]) & causal)[:, None]

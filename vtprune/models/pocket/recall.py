# SPDX-License-Identifier: Apache-2.0
"""Prompts of words alone that teach a language model to look back: the way to labels that are new in each prompt.

Labelling pictures by demonstration asks for two things at once: to see the class of every picture, and to copy what
stood behind the last one of the same class. Trained on pictures alone a small model learns neither part of the second
and stays at guessing among the labels shown. Here the second part comes by itself, in four kinds of prompt that take
turns; copying random words is what makes the other three learnable within a few hundred steps.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from . import vocab
from .batch import IGNORE
from .data import COLORS, SHAPES
from .worlds import LABELS

PERIODS = (6, 27)  # words after which a copied text begins anew
CLASSES = 6  # most classes in a prompt
GAP = 14  # positions that a picture of 336 x 336 and the tokens around it take up in M-RoPE
_WORDS = torch.tensor([i for i, token in enumerate(vocab.TOKENS) if not token.startswith("<")])
_SHAPES, _COLORS, _LABELS = (torch.tensor([vocab.IDS[w] for w in words]) for words in (SHAPES, COLORS, LABELS))
_KINDS = 4


def recall(prompts: int, turns: int, turn: int, seed: str) -> dict[str, Tensor]:
    """Prompts of four kinds, in turn.

    0. Random words, repeated; each counts from its second time on.
    1. ``word label </s>`` pairs of random words.
    2. ``which word label ? label </s>`` with random words for classes and labels.
    3. The same with classes and labels of the ``icl`` world.

    Of 1 to 3 a label counts where its class was shown before. Of every second prompt of 2 and 3, positions leave room
    before each turn, as if a picture stood there.

    Parameters
    ----------
    prompts
        Number of prompts, B.
    turns, turn
        Turns in a prompt and tokens in each; a prompt has ``1 + turns * turn`` tokens.
    seed
        Of everything drawn.

    Returns
    -------
    dict
        ``ids``, ``labels`` and ``positions`` int64 [B, S].
    """
    length = 1 + turns * turn
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    each = [len(range(kind, prompts, _KINDS)) for kind in range(_KINDS)]
    ids = torch.full((prompts, length), vocab.PAD)
    labels = torch.full((prompts, length), IGNORE)
    ids[0::_KINDS], labels[0::_KINDS] = _copied(each[0], length, generator)
    for kind in range(1, _KINDS):
        pairs = kind == 1
        shown, counted = _labelled(each[kind], turns * turn // 3 if pairs else turns, kind, generator)
        ids[kind::_KINDS, 1 : 1 + shown.shape[1]] = shown
        labels[kind::_KINDS, 1 : 1 + shown.shape[1]] = counted
        ids[kind::_KINDS, 0] = vocab.BOS
    apart = torch.arange(prompts) % (2 * _KINDS) >= _KINDS + 2
    before = (torch.arange(length) - 1).div(turn, rounding_mode="floor") + 1
    return {"ids": ids, "labels": labels, "positions": torch.arange(length) + GAP * apart[:, None] * before}


def _copied(prompts: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    period = torch.randint(PERIODS[0], PERIODS[1] + 1, (prompts, 1), generator=generator)
    words = _WORDS[torch.randint(len(_WORDS), (prompts, length), generator=generator)]
    at = torch.arange(length)
    ids = words.gather(1, at % period)
    return ids, torch.where(at >= period, ids, IGNORE)


def _labelled(prompts: int, turns: int, kind: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    def some(count: int, pool: Tensor) -> Tensor:
        return pool[torch.rand(prompts, len(pool), generator=generator).argsort(1)[:, :count]]

    count = torch.randint(2, CLASSES + 1, (prompts, 1), generator=generator)
    if kind == 3:
        of_shape = torch.rand(prompts, 1, generator=generator) < 0.5
        classes, names = torch.where(of_shape, some(CLASSES, _SHAPES), some(CLASSES, _COLORS)), some(CLASSES, _LABELS)
    else:
        classes, names = some(2 * CLASSES, _WORDS).chunk(2, 1)
    which = (torch.rand(prompts, turns, generator=generator) * count).long()
    word, label = classes.gather(1, which), names.gather(1, which)
    known = (which[:, :, None] == which[:, None, :]).tril(-1).any(-1)
    spoken = (word, label, vocab.EOS) if kind == 1 else (
        vocab.IDS["which"], word, vocab.IDS["label"], vocab.IDS["?"], label, vocab.EOS
    )  # fmt: skip
    ids = torch.stack([torch.as_tensor(token).expand(prompts, turns) for token in spoken], -1)
    counted = torch.full_like(ids, IGNORE)
    counted[..., -2:] = torch.where(known[..., None], ids[..., -2:], IGNORE)
    return ids.flatten(1), counted.flatten(1)

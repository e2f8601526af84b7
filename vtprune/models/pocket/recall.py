# SPDX-License-Identifier: Apache-2.0
"""Prompts that teach a language model to look back: the way to labels that are new in each prompt.

Labelling pictures by demonstration asks for two things at once: to see the class of every picture, and to copy what
stood behind the last one of the same class. Trained on pictures alone a small model learns neither part of the second
and stays at guessing among the labels shown. Here the second part comes by itself, in six kinds of prompt that take
turns. Copying random words is what makes the others learnable within a few hundred steps. A model that has learnt to
look back in plain text still does not do so once a single visual token is in the prompt, where it has learnt to look
at that; so in two kinds a few visual tokens that have nothing to do with the words stand before each turn.
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
KINDS = ("copy", "pairs", "words", "words behind pictures", "classes", "classes behind pictures")
TURN = 6  # tokens of "which <word> label ? <label> </s>"
_WORDS = torch.tensor([i for i, token in enumerate(vocab.TOKENS) if not token.startswith("<")])
_SHAPES, _COLORS, _LABELS = (torch.tensor([vocab.IDS[w] for w in words]) for words in (SHAPES, COLORS, LABELS))


def recall(prompts: int, turns: int, look: list[int], seed: str) -> tuple[Tensor, Tensor]:
    """Prompts of ``KINDS``, in turn.

    ``copy`` is random words, repeated; each counts from its second time on. ``pairs`` are ``word label </s>`` of random
    words. The others are turns ``which word label ? label </s>``, of random words or of the classes and labels of the
    ``icl`` world, with or without ``look`` before each. There a label counts where its class was shown before.

    Parameters
    ----------
    prompts
        Number of prompts, B.
    turns
        Turns behind pictures in a prompt; without pictures more of them fit.
    look
        Ids of the picture before a turn.
    seed
        Of everything drawn.

    Returns
    -------
    tuple
        Ids and labels, int64 [B, 1 + turns * (len(look) + 6)].
    """
    length = 1 + turns * (len(look) + TURN)
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    ids = torch.full((prompts, length), vocab.PAD)
    labels = torch.full((prompts, length), IGNORE)
    for number, kind in enumerate(KINDS):
        mine = slice(number, None, len(KINDS))
        count = len(range(prompts)[mine])
        if kind == "copy":
            ids[mine], labels[mine] = _copied(count, length, generator)
            continue
        before = look if kind.endswith("pictures") else []
        shown, counted = _labelled(count, length - 1, kind, before, generator)
        ids[mine, 0] = vocab.BOS
        ids[mine, 1 : 1 + shown.shape[1]] = shown
        labels[mine, 1 : 1 + shown.shape[1]] = counted
    return ids, labels


def _copied(prompts: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    period = torch.randint(PERIODS[0], PERIODS[1] + 1, (prompts, 1), generator=generator)
    words = _WORDS[torch.randint(len(_WORDS), (prompts, length), generator=generator)]
    at = torch.arange(length)
    ids = words.gather(1, at % period)
    return ids, torch.where(at >= period, ids, IGNORE)


def _labelled(
    prompts: int, room: int, kind: str, before: list[int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    def some(count: int, pool: Tensor) -> Tensor:
        return pool[torch.rand(prompts, len(pool), generator=generator).argsort(1)[:, :count]]

    turns = room // (3 if kind == "pairs" else TURN + len(before))
    count = torch.randint(2, CLASSES + 1, (prompts, 1), generator=generator)
    if kind.startswith("classes"):
        of_shape = torch.rand(prompts, 1, generator=generator) < 0.5
        classes, names = torch.where(of_shape, some(CLASSES, _SHAPES), some(CLASSES, _COLORS)), some(CLASSES, _LABELS)
    else:
        classes, names = some(2 * CLASSES, _WORDS).chunk(2, 1)
    which = (torch.rand(prompts, turns, generator=generator) * count).long()
    word, label = classes.gather(1, which), names.gather(1, which)
    known = (which[:, :, None] == which[:, None, :]).tril(-1).any(-1)
    which_word, label_word, mark = (vocab.IDS[w] for w in ("which", "label", "?"))
    asked = (word,) if kind == "pairs" else (which_word, word, label_word, mark)
    spoken = (*before, *asked, label, vocab.EOS)
    ids = torch.stack([torch.as_tensor(token).expand(prompts, turns) for token in spoken], -1)
    counted = torch.full_like(ids, IGNORE)
    counted[..., -2:] = torch.where(known[..., None], ids[..., -2:], IGNORE)
    return ids.flatten(1), counted.flatten(1)

# SPDX-License-Identifier: Apache-2.0
"""What trained methods learn from: prompts as the language model sees them, and the answers that it gives to them.

A `Lesson` is made once, by the unpruned model, and then run again and again with fewer visual rows: no picture is
encoded twice, and no label is needed, because the unpruned model's own answer is what pruning must not change.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..api import encode
from ..engine import positions as pos
from ..errors import ConfigError, InputError, UnsupportedModelError
from ..eval import metrics, tasks
from ..eval.controls import processed
from ..models import find_family
from ..models.base import Family
from ..pruners.selector import places


@dataclass(frozen=True)
class Lesson:
    """One prompt of S rows and its answer of A tokens, the end included.

    Parameters
    ----------
    rows : Tensor
        ``[S, D]``: what the language model is given, projected visual rows included; model dtype.
    positions : Tensor
        ``[S]``, or ``[3, S]`` for M-RoPE, int64.
    images : tuple of Tensor
        Per image (or clip) the rows that are its visual tokens, ``[N]`` int64, separators excluded.
    places : tuple of Tensor
        Per image where its tokens lie, ``[N, PLACE]`` fp32 (see `vtprune.pruners.selector.places`).
    words : Tensor
        ``[L, D]`` input embeddings of the question.
    answer : Tensor
        ``[A]`` int64.
    """

    rows: Tensor
    positions: Tensor
    images: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    words: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Batch:
    """Lessons side by side, answers appended, padded at the right; I images in B prompts.

    Parameters
    ----------
    rows, positions, valid : Tensor
        ``[B, S, D]``, ``[B, S]`` or ``[3, B, S]``, and ``[B, S]`` bool.
    labels : Tensor
        ``[B, S]`` int64: what row s should say next; -100 elsewhere.
    owner, slots, sound, places : Tensor
        Of each image its prompt ``[I]``, the rows that are its tokens ``[I, N]`` int64, which of these are there
        ``[I, N]`` bool, and where they lie ``[I, N, PLACE]``.
    words, spoken : Tensor
        Per image the question ``[I, L, D]``, and which of its words are there ``[I, L]`` bool.
    """

    rows: Tensor
    positions: Tensor
    valid: Tensor
    labels: Tensor
    owner: Tensor
    slots: Tensor
    sound: Tensor
    places: Tensor
    words: Tensor
    spoken: Tensor

    @property
    def visual(self) -> Tensor:
        """``[I, N, D]`` visual rows of each image."""
        index = self.slots[..., None].expand(-1, -1, self.rows.shape[-1])
        return self.rows[self.owner].gather(1, index)


class Drawn(torch.utils.data.Dataset[Any]):
    """Batches of examples with what the processor makes of them, drawn by whoever asks."""

    def __init__(self, processor: Any, batches: Sequence[Sequence[tasks.Example]], dtype: torch.dtype):
        self.processor, self.batches, self.dtype = processor, batches, dtype

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if torch.utils.data.get_worker_info() is not None:
            torch.set_num_threads(1)
        examples = [example.ready() for example in self.batches[number]]
        inputs = processed(self.processor, examples)
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@torch.no_grad()
def make(
    model: Any, processor: Any, names: Sequence[str], count: int, *, split: str = "train", seed: int = 0,
    batch: int = 32, workers: int = 0, cache: str = "cpu", labelled: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[Lesson]:  # fmt: skip
    """Lessons from questions of some tasks, which take turns.

    Parameters
    ----------
    model, processor
        As from `vtprune.load`.
    names
        Of tasks (see `vtprune.eval.tasks`).
    count
        Questions of each task.
    split, seed
        Which questions.
    batch
        Questions that are answered together.
    workers
        Processes that draw pictures and run the processor.
    cache
        Device on which lessons wait.
    labelled
        Leave out what the model answers wrongly; else its answer is taken as it is.
    say
        Is told of progress.

    Raises
    ------
    ConfigError, UnsupportedModelError
        No such task; a model that takes encoder features inside the language model (DeepStack).
    """
    family = find_family(model)
    found = [tasks.get(name) for name in names]
    asked_of = [(task.drafts or task.examples)(split, count, seed) for task in found]
    drafts = [one for some in itertools.zip_longest(*asked_of) for one in some if one is not None]
    batches = [drafts[i : i + batch] for i in range(0, len(drafts), batch)]
    longest = max(task.max_new_tokens for task in found)
    drawn = torch.utils.data.DataLoader(
        Drawn(processor, batches, model.dtype), batch_size=None, num_workers=workers,
        prefetch_factor=2 if workers else None, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    lessons: list[Lesson] = []
    asked = 0
    for number, (examples, inputs) in enumerate(zip(batches, drawn, strict=True)):
        given = {k: v.to(model.device) for k, v in inputs.items()}
        with _prefill(family) as seen:
            out = model.generate(**given, max_new_tokens=longest, do_sample=False, num_beams=1)
        answers = _until_end(out[:, given["input_ids"].shape[1] :], model.generation_config)
        texts = processor.batch_decode(answers, skip_special_tokens=True)
        right = [not labelled or metrics.score(t.strip(), e) >= 1 for t, e in zip(texts, examples, strict=True)]
        asked += len(examples)
        lessons += [one for one, good in zip(_lessons(family, given, seen, answers, cache), right, strict=True) if good]
        if (number + 1) % max(1, len(batches) // 8) == 0:
            say(f"{len(lessons)} lessons from {asked} of {len(drafts)} questions")
    if not lessons:
        raise InputError(f"the model answers none of {len(drafts)} questions of {', '.join(names)}; choose other tasks")
    return lessons


class _prefill:
    """Within this block, the first forward of the text model over several rows is noted."""

    def __init__(self, family: Family):
        self.family = family
        self.kwargs: dict[str, Any] = {}

    def __enter__(self) -> dict[str, Any]:
        def note(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self.kwargs and kwargs["inputs_embeds"].shape[1] > 1:
                if kwargs.get("deepstack_visual_embeds") is not None:
                    raise UnsupportedModelError(
                        "this model adds features of its encoder inside the language model (DeepStack), which lessons "
                        "do not hold; train on another checkpoint"
                    )
                self.kwargs.update({k: kwargs.get(k) for k in ("inputs_embeds", "position_ids")})

        self.handle = self.family.lm.register_forward_pre_hook(note, with_kwargs=True)
        return self.kwargs

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _until_end(said: Tensor, config: Any) -> list[list[int]]:
    """Generated ids up to the first end token, which is in."""
    ends = config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for row in said.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        answers.append(row[: stop + 1])
    return answers


def _lessons(
    family: Family, given: dict[str, Tensor], seen: dict[str, Any], answers: list[list[int]], cache: str
) -> Iterator[Lesson]:
    tokens = encode(family.model, given)
    place = places(tokens)
    ids, valid = given["input_ids"], given["attention_mask"].bool()
    placeholder = torch.isin(ids, torch.tensor(list(family.placeholders.values()), device=ids.device))
    at = placeholder.reshape(-1).nonzero().squeeze(1)[tokens.source] % ids.shape[1]
    positions = seen["position_ids"]
    if positions is None:
        positions = (valid.cumsum(1) - 1).clamp_min(0)
    positions = pos.without_text_row(positions)
    positions = positions.expand(*positions.shape[:-2], len(ids), -1)
    lens = tokens.text_lens or (0,) * len(ids)
    assert tokens.text is not None
    words = tokens.text.split(list(lens))
    image_at, image_place = at.split(list(tokens.image_lens)), place.split(list(tokens.image_lens))
    for b, answer in enumerate(answers):
        mine = [i for i, sample in enumerate(tokens.image_sample) if sample == b]
        pad = int((~valid[b]).sum())  # at the left
        rows = seen["inputs_embeds"][b, pad:]
        yield Lesson(
            rows.to(cache, torch.bfloat16, copy=True),
            positions[..., b, pad:].to(cache, copy=True),
            tuple((image_at[i] - pad).to(cache) for i in mine),
            tuple(image_place[i].to(cache) for i in mine),
            words[b].to(cache, torch.bfloat16, copy=True),
            torch.tensor(answer, device=cache),
        )


def collate(lessons: Sequence[Lesson], table: Tensor) -> Batch:
    """Lessons side by side, on the device and in the dtype of `table`, the input embeddings ``[V, D]``."""
    device = table.device
    rows, positions, labels = [], [], []
    for one in lessons:
        answer = one.answer.to(device)
        rows.append(torch.cat([one.rows.to(device, table.dtype), table[answer[:-1]]]))
        step = torch.arange(1, len(answer), device=device)
        after = one.positions.to(device)
        positions.append(torch.cat([after, (after.amax() + step).expand(*after.shape[:-1], -1)], -1).movedim(-1, 0))
        silent = torch.full((len(one.rows) - 1,), -100, device=device)
        labels.append(torch.cat([silent, answer]))
    lens = torch.tensor([len(row) for row in rows], device=device)
    images = [(b, at, place) for b, one in enumerate(lessons) for at, place in zip(one.images, one.places, strict=True)]
    owner = torch.tensor([b for b, _, _ in images], device=device)
    count = torch.tensor([len(at) for _, at, _ in images], device=device)
    spoken = torch.tensor([len(one.words) for one in lessons], device=device)
    words = pad_sequence([one.words.to(device, table.dtype) for one in lessons], batch_first=True)
    padded = pad_sequence(positions, batch_first=True)
    slots = pad_sequence([at.to(device) for _, at, _ in images], batch_first=True)
    return Batch(
        rows=pad_sequence(rows, batch_first=True),
        positions=padded if padded.ndim == 2 else padded.permute(2, 0, 1),
        valid=torch.arange(int(lens.max()), device=device) < lens[:, None],
        labels=pad_sequence(labels, batch_first=True, padding_value=-100),
        owner=owner,
        slots=slots,
        sound=torch.arange(slots.shape[1], device=device) < count[:, None],
        places=pad_sequence([place.to(device) for _, _, place in images], batch_first=True),
        words=words[owner],
        spoken=(torch.arange(words.shape[1], device=device) < spoken[:, None])[owner],
    )


def answer_logits(
    model: Any, batch: Batch, chosen: Tensor | None = None, bias: Tensor | None = None, stays: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run the language model over what is kept of a batch.

    Parameters
    ----------
    model
        The model; gradients flow to `bias` (and to its weights where they ask for them).
    batch
        The prompts, B of them.
    chosen
        ``[I, K]`` int64, which of its tokens each image keeps; None: all. Of an image that is shorter than the others,
        what is not there is not kept.
    bias
        ``[I, K]`` fp32, added to the attention logits of the chosen keys in every layer: 0 is a token that is there,
        minus infinity one that is gone. None: 0.
    stays
        ``[I, K]`` bool, which of the chosen are kept after all; None: all that are there.

    Returns
    -------
    Tensor, Tensor
        Logits ``[n, V]`` fp32 of all rows that have a label, prompt after prompt, and the labels ``[n]``.
    """
    family = find_family(model)
    slots, sound = batch.slots, batch.sound
    if chosen is not None:
        slots, sound = slots.gather(1, chosen), sound.gather(1, chosen)
    sound = sound if stays is None else sound & stays
    size, length = batch.valid.shape
    flat = (batch.owner[:, None] * length + slots)[sound]
    every = (batch.owner[:, None] * length + batch.slots)[batch.sound]
    keep = batch.valid.reshape(-1).clone()
    keep[every] = False
    keep[flat] = True
    keep = keep.view(size, length)
    weight = torch.zeros(size * length, device=keep.device)
    if bias is not None:
        weight = weight.index_put((flat,), bias[sound])
    index = (~keep).int().sort(dim=1, stable=True).indices[:, : int(keep.sum(1).max())]
    there = keep.gather(1, index)
    rows = batch.rows.gather(1, index[..., None].expand(-1, -1, batch.rows.shape[-1]))
    positions = batch.positions.gather(-1, index.expand(*batch.positions.shape[:-2], -1, -1))
    if bias is not None and bias.requires_grad:
        # Fused attention keeps what its backward needs only if queries or keys ask for a gradient, not for a mask's.
        rows.requires_grad_()
    labels = batch.labels.gather(1, index).masked_fill(~there, -100)
    width = index.shape[1]
    lowest = max(torch.finfo(rows.dtype).min, torch.finfo(weight.dtype).min)
    causal = torch.ones(width, width, dtype=torch.bool, device=rows.device).tril()
    seen = causal & there[:, None, :]
    mask = weight.view(size, length).gather(1, index)[:, None].expand(-1, width, -1)
    mask = mask.masked_fill(~seen, lowest)[:, None].to(rows.dtype)
    hidden = family.lm(
        inputs_embeds=rows, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    asked = labels != -100
    return model.get_output_embeddings()(hidden[asked]).float(), labels[asked]


def exact_matches(model: Any, batch: Batch, chosen: Tensor | None = None, stays: Tensor | None = None) -> Tensor:
    """Which prompts get all tokens of their answer right, ``[B]`` bool, each token after the right ones before it."""
    logits, labels = answer_logits(model, batch, chosen, None, stays)
    wrong = (logits.argmax(-1) != labels).float()
    sample = (batch.labels != -100).nonzero()[:, 0]
    return torch.zeros(len(batch.valid), device=wrong.device).index_add_(0, sample, wrong) == 0


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the answer's tokens."""
    return F.cross_entropy(logits, labels)


def check_count(name: str, value: int) -> None:
    """Refuse a command-line number that is not positive."""
    if value < 1:
        raise ConfigError(f"{name}={value} is no count; give a whole number from 1 on")

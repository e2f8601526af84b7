# SPDX-License-Identifier: Apache-2.0
"""What a pruned model must compute, worked out by hand: one sample at a time, no padding, no cache, no hook.

The reference takes an untouched twin of the model. It lets the twin embed the prompt, throws the dropped rows away with
boolean indexing, keeps the position ids that the rows had in the full prompt, and calls the decoder layers one
by one, in a Python loop, under an explicit causal mask. Decoding recomputes everything at every step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import tiny
import torch
from torch import Tensor, nn

#: Stage (None: before the language model; K: after decoder layer K) -> which slots of the prompt stay, ``[L]`` bool.
Kept = Mapping[int | None, Tensor]


class _Captured(Exception):
    def __init__(self, embeds: Tensor, deepstack: Sequence[Tensor]):
        super().__init__()
        self.embeds, self.deepstack = embeds, deepstack


@dataclass
class Prompt:
    """One prompt as the language model would get it unpruned."""

    ids: Tensor  # [L]
    embeds: Tensor  # [L, D]
    positions: Tensor  # [1 or 3, L]
    placeholder: Tensor  # [L] bool: pictures, clips and AnyRes newlines
    newline: Tensor  # [L] bool
    deepstack: Sequence[Tensor] = ()  # layer -> [placeholders, D], what Qwen3-VL adds to their rows after it

    @property
    def visual(self) -> Tensor:
        return self.placeholder & ~self.newline


@dataclass
class Run:
    """The result of one pass: which slots reached the end (tail included), and their logits."""

    slots: Tensor  # [n]
    logits: Tensor  # [n, V]
    states: dict[int, tuple[Tensor, Tensor]]  # layer -> (slots, hidden states after it, before dropping)


def mrope(ids: Tensor, grids: Sequence[tuple[int, int, int]], seconds_per_tick: int = 1) -> tuple[Tensor, Tensor]:
    """M-RoPE positions by hand, ``[3, L]``: text counts on; a picture spans rows and columns from where it starts.

    Where text goes on after a clip depends on the version of transformers: after the largest position of the clip,
    whichever axis it is on, or (newer) after its rows and columns, whatever its duration. Both are returned.
    """
    rules = []
    for after_duration in (True, False):
        columns: list[tuple[int, int, int]] = []
        start, i, left = 0, 0, list(grids)
        tokens = ids.tolist()
        while i < len(tokens):
            if tokens[i] not in (tiny.IMAGE, tiny.VIDEO):
                columns.append((start, start, start))
                start, i = start + 1, i + 1
                continue
            t, h, w = left.pop(0)
            tick = seconds_per_tick if tokens[i] == tiny.VIDEO else 1
            columns += [(start + f * tick, start + y, start + x) for f in range(t) for y in range(h) for x in range(w)]
            i += t * h * w
            start += max(h, w, (t - 1) * tick + 1 if after_duration else 0)
        rules.append(torch.tensor(columns).T)
    return rules[0], rules[1]


def grids_in_order(inputs: tiny.Inputs) -> list[tuple[int, int, int]]:
    """Grids after the 2 x 2 merge of all pictures and clips in the order of one prompt."""
    images = iter(inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long)).tolist())
    videos = iter(inputs.get("video_grid_thw", torch.zeros(0, 3, dtype=torch.long)).tolist())
    ids, grids, i = inputs["input_ids"][0].tolist(), [], 0
    while i < len(ids):
        if ids[i] in (tiny.IMAGE, tiny.VIDEO):
            t, h, w = next(images if ids[i] == tiny.IMAGE else videos)
            frame, apart = h * w // 4, t > 1 and ids[i + h * w // 4] != ids[i]
            if apart:  # Qwen3-VL: every frame by itself, with words between them
                for _ in range(t):
                    i = ids.index(tiny.VIDEO, i)
                    grids.append((1, h // 2, w // 2))
                    i += frame
            else:
                grids.append((t, h // 2, w // 2))
                i += t * frame
        else:
            i += 1
    return grids


class Reference:
    """By-hand computation on an untouched model."""

    def __init__(self, twin: nn.Module):
        self.twin = twin
        self.decoder = tiny.decoder(twin)

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """Attention that takes an additive 4-D mask; eager attention takes its softmax in fp32, too coarse for fp64."""
        config = self.decoder.config
        before = config._attn_implementation
        config._attn_implementation = "sdpa" if tiny.dtype_of(self.twin) == torch.float64 else "eager"
        try:
            yield
        finally:
            config._attn_implementation = before

    def embeddings(self, inputs: tiny.Inputs) -> Tensor:
        """``[B, L, D]``: what the twin's own vision path hands to its language model."""
        return self._captured(inputs).embeds

    def _captured(self, inputs: tiny.Inputs) -> _Captured:

        def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Captured(kwargs["inputs_embeds"], kwargs.get("deepstack_visual_embeds") or ())

        handle = self.decoder.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.twin.model(**{k: v for k, v in inputs.items() if k != "labels"})
        except _Captured as captured:
            return captured
        finally:
            handle.remove()
        raise AssertionError("the language model was not called")

    def rope_index(self, inputs: tiny.Inputs) -> Tensor:
        """``[3, L]`` M-RoPE positions of one prompt by the twin's own rule, which the tests compare with `mrope`."""
        if "image_grid_thw" not in inputs and "video_grid_thw" not in inputs:
            return torch.arange(inputs["input_ids"].shape[1]).expand(3, -1)
        known = inspect.signature(self.twin.model.get_rope_index).parameters
        return self.twin.model.get_rope_index(**{k: v for k, v in inputs.items() if k in known})[0][:, 0]

    def prompt(self, inputs: tiny.Inputs) -> Prompt:
        """Embed one prompt that has no padding."""
        assert inputs["input_ids"].shape[0] == 1 and bool(inputs["attention_mask"].all())
        ids = inputs["input_ids"][0]
        captured = self._captured(inputs)
        embeds = captured.embeds[0]
        placeholder = torch.isin(ids, torch.tensor(tiny.placeholders(self.twin), device=ids.device))
        newline = torch.zeros_like(placeholder)
        if hasattr(self.twin.model, "image_newline"):
            newline = placeholder & (embeds == self.twin.model.image_newline.to(embeds.dtype)).all(-1)
        if tiny.family_of(self.twin) in tiny.QWEN:
            positions = self.rope_index(inputs)
        else:
            positions = torch.arange(len(ids), device=ids.device)[None]
        return Prompt(ids, embeds, positions, placeholder, newline, captured.deepstack)

    def run(
        self,
        prompt: Prompt,
        kept: Kept,
        tail: Sequence[int] = (),
        positions: str = "original",
        next_position: int | None = None,
        merged: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> Run:
        """One pass over the kept rows of the prompt and all of `tail`, tokens that follow it.

        Parameters
        ----------
        next_position
            Position of the first token of `tail`; by default the one after the largest of the prompt's last slot.
        merged
            Layer -> slots of the prompt that stay after it, and the rows that take the place of theirs.
        """
        device = prompt.embeds.device
        length = len(prompt.ids)
        extra = torch.tensor(list(tail), dtype=torch.long, device=device)
        start = int(prompt.positions[:, -1].max()) + 1 if next_position is None else next_position
        follow = torch.arange(len(extra), device=device) + start
        axes = prompt.positions.shape[0]
        all_positions = torch.cat([prompt.positions, follow[None].expand(axes, -1)], 1)
        hidden = torch.cat([prompt.embeds, self.twin.get_input_embeddings()(extra)])
        slots = torch.arange(length + len(extra), device=device)

        def stays(stage: int | None) -> Tensor:
            return torch.cat([kept[stage], torch.ones(len(extra), dtype=torch.bool, device=device)])[slots]

        if None in kept:
            keep = stays(None)
            hidden, slots, all_positions = hidden[keep], slots[keep], all_positions[:, keep]
        if positions == "compact":
            all_positions = torch.arange(len(slots), device=device)[None].expand(axes, -1)

        states = {}
        with self._plain_attention():
            for i, layer in enumerate(self.decoder.layers):
                ids = all_positions[:, None] if axes == 3 else all_positions
                rope = self.decoder.rotary_emb(hidden[None], ids)
                n = len(slots)
                lowest = torch.finfo(hidden.dtype).min
                mask = torch.full((n, n), lowest, dtype=hidden.dtype, device=device).triu(1)[None, None]
                out = layer(hidden[None], attention_mask=mask, position_embeddings=rope, use_cache=False)
                hidden = (out[0] if isinstance(out, tuple) else out)[0]
                if i < len(prompt.deepstack):
                    rank = torch.cat([prompt.placeholder.long().cumsum(0) - 1, extra * 0])[slots]
                    visual = torch.cat([prompt.placeholder, extra != extra])[slots]
                    hidden = hidden + visual[:, None] * prompt.deepstack[i][rank.clamp_min(0)]
                states[i] = (slots, hidden)
                if i in kept:
                    keep = stays(i)
                    hidden, slots, all_positions = hidden[keep], slots[keep], all_positions[:, keep]
                if merged is not None and i in merged:
                    hidden = hidden.index_copy(0, torch.searchsorted(slots, merged[i][0]), merged[i][1])
        return Run(slots, self.twin.lm_head(self.decoder.norm(hidden)), states)

    @torch.no_grad()
    def greedy(
        self, prompt: Prompt, kept: Kept, steps: int, tail: Sequence[int] = (), positions: str = "original"
    ) -> tuple[list[int], Tensor]:
        """`steps` tokens after the prompt and `tail`, all recomputed at every step, and their logits ``[steps, V]``."""
        tokens, logits = list(tail), []
        for _ in range(steps):
            logits.append(self.run(prompt, kept, tokens, positions).logits[-1])
            tokens.append(int(logits[-1].argmax()))
        return tokens[len(tail) :], torch.stack(logits)

    @torch.no_grad()
    def follow(self, prompt: Prompt, kept: Kept, tokens: Sequence[int], positions: str = "original") -> Tensor:
        """Logits ``[len(tokens), V]`` from which each of these tokens was drawn."""
        run = self.run(prompt, kept, list(tokens)[:-1], positions)
        return run.logits[len(run.logits) - len(tokens) :]

    @torch.no_grad()
    def beam(self, prompt: Prompt, kept: Kept, steps: int, beams: int) -> tuple[list[int], float]:
        """Beam search without an end token: the best continuation and its mean log-probability."""
        live: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(steps):
            grown = []
            for score, tokens in live:
                logp = self.run(prompt, kept, tokens).logits[-1].float().log_softmax(-1)
                best = logp.topk(beams)
                grown += [(score + float(p), [*tokens, int(t)]) for p, t in zip(best.values, best.indices, strict=True)]
            live = sorted(grown, key=lambda x: -x[0])[:beams]
        return live[0][1], live[0][0] / steps

# SPDX-License-Identifier: Apache-2.0
"""VASparse worked out by hand: one sample, nothing is ever taken out of a cache, dropped keys are masked by -inf.

Plain loops over layers and heads on an untouched twin of the model, in fp32, without transformers' caches or masks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from conformance.reference import Prompt
from torch import Tensor, nn


@dataclass
class Layer:
    """Keys and values ``[Hkv, n, d]`` of all tokens so far, and which of them each KV head still has."""

    keys: Tensor
    values: Tensor
    alive: Tensor  # [Hkv, n] bool
    columns: Tensor  # [Hkv, n]
    mass: Tensor  # [n]
    newest: Tensor = field(default_factory=lambda: torch.zeros(0))  # [H, n] attention of the newest query
    products: Tensor = field(default_factory=lambda: torch.zeros(0))  # [H, n] raw products of the newest query


@dataclass
class Slow:
    """Logits of `twin` under VASparse (without merging), token by token."""

    twin: nn.Module
    prompt: Prompt
    keep: float = 1.0
    beta: float = 0.0
    lam: float = 0.1
    every: int = 16
    select: str = "generated"
    scores: str = "attention"

    def attend(self, module: Any, layer: Layer, query: Tensor, decoding: bool) -> Tensor:
        """``query [H, q, d]``, the newest rows -> ``[q, H * d]``; updates what the layer remembers."""
        heads, rows, width = query.shape
        kv_heads, total = layer.keys.shape[:2]
        group = heads // kv_heads
        visual = torch.zeros(total, dtype=torch.bool)
        visual[: len(self.prompt.placeholder)] = self.prompt.placeholder
        out = torch.zeros(heads, rows, width)
        weights, newest = torch.zeros(heads, rows, total), torch.zeros(heads, total)
        for head in range(heads):
            kv = head // group
            factor = torch.ones(total)
            if decoding and self.beta:
                w = torch.zeros(total)
                w[layer.alive[kv]] = layer.columns[kv][layer.alive[kv]].softmax(0)
                factor = 1 + self.beta - self.beta * w
            products = query[head] @ layer.keys[kv].T * factor
            later = torch.arange(total) > torch.arange(total - rows, total)[:, None]
            weights[head] = (products * module.scaling).masked_fill(later | ~layer.alive[kv], -math.inf).softmax(-1)
            out[head] = weights[head] @ layer.values[kv]
            newest[head] = products[-1]
        for kv in range(kv_heads):
            layer.columns[kv] += weights[kv * group : (kv + 1) * group].sum(1).mean(0)
        layer.mass[total - rows :] = (weights[-1] * (visual & layer.alive[-1])).sum(-1)
        layer.newest, layer.products = weights[:, -1], newest
        return out.transpose(0, 1).reshape(rows, heads * width)

    def drop(self, layer: Layer, candidates: Tensor, protect: int | None) -> None:
        """Keep the best of `candidates` ``[n]`` in each KV head, found by trying them in order of value."""
        score = layer.newest if self.scores == "attention" else layer.products
        group = score.shape[0] // layer.alive.shape[0]
        for kv in range(layer.alive.shape[0]):
            mine = [i for i in candidates.tolist() if layer.alive[kv, i]]
            total = sum(math.exp(float(layer.mass[i])) for i in mine)
            value = {
                i: float((score[kv * group : (kv + 1) * group, i] ** 2).mean())
                + self.lam * math.exp(float(layer.mass[i])) / total
                for i in mine
            }
            if protect is not None:
                value[protect] = math.inf
            best = sorted(mine, key=lambda i: (-value[i], i))[: max(1, math.floor(len(mine) * self.keep + 1e-6))]
            for i in set(mine) - set(best):
                layer.alive[kv, i] = False

    @torch.no_grad()
    def follow(self, tokens: Sequence[int]) -> Tensor:
        """Logits ``[1 + len(tokens), V]``: after the prompt, and after each of these tokens."""
        decoder = self.twin.model.language_model
        start = int(self.prompt.positions[:, -1].max()) + 1
        layers: list[Layer] = []
        out = []
        since = 0
        length = len(self.prompt.ids)
        for step in range(-1, len(tokens)):
            if step < 0:
                hidden, positions = self.prompt.embeds, self.prompt.positions
            else:
                hidden = self.twin.get_input_embeddings()(torch.tensor([tokens[step]]))
                positions = torch.full((len(self.prompt.positions), 1), start + step)
            cos, sin = decoder.rotary_emb(hidden[None], positions[:, None] if len(positions) == 3 else positions)
            for index, block in enumerate(decoder.layers):
                attention = block.self_attn
                rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
                rows = block.input_layernorm(hidden)
                query, key, value = (
                    project(rows).view(len(rows), -1, attention.head_dim).transpose(0, 1)
                    for project in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                if cos.ndim == 4:  # older transformers
                    module = sys.modules[type(attention).__module__]
                    sections = (getattr(attention, "rope_scaling", None) or attention.rope_parameters)["mrope_section"]
                    turned = module.apply_multimodal_rotary_pos_emb(query[None], key[None], cos, sin, sections)
                else:
                    turned = rotate(query[None], key[None], cos, sin)
                query, key = (x[0] for x in turned)
                ones = torch.ones(key.shape[:2], dtype=torch.bool)
                new = Layer(key, value, ones, torch.zeros(key.shape[:2]), torch.zeros(key.shape[1]))
                if step < 0:
                    layers.append(new)
                else:
                    old = layers[index]
                    for name, dim in (("keys", 1), ("values", 1), ("alive", 1), ("columns", 1), ("mass", 0)):
                        setattr(old, name, torch.cat([getattr(old, name), getattr(new, name)], dim))
                mixed = self.attend(attention, layers[index], query, step >= 0)
                hidden = hidden + attention.o_proj(mixed)
                hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
            out.append(self.twin.lm_head(decoder.norm(hidden[-1:]))[0])
            if self.keep == 1.0:
                continue
            if step < 0 and self.select != "generated":
                for layer in layers:
                    self.drop(layer, self.prompt.placeholder.nonzero()[:, 0], None)
            since += step >= 0
            if since >= self.every and self.select != "visual":
                since = 0
                for layer in layers:
                    self.drop(layer, torch.arange(length, length + step + 1), length + step)
        return torch.stack(out)


def contrasted(twin: nn.Module, logits: Tensor, last: int, alpha: float, plausibility: float) -> Tensor:
    """Log-probabilities ``[V]`` after the contrast with what the embedding of `last` says by itself."""
    prior = twin.lm_head(twin.get_input_embeddings()(torch.tensor([last])))[0]
    mixed = (1 + alpha) * logits - alpha * prior
    probability = logits.softmax(0)
    mixed[probability < plausibility * probability.max()] = -math.inf
    return mixed.log_softmax(0)

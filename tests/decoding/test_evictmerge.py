# SPDX-License-Identifier: Apache-2.0
"""Visual entries of the KV cache evicted and merged, against a cache that was edited by hand, head by head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import ATTENTIONS, assert_close, cache_lengths, generate, hooks, manual_decode, same, twin
from conformance.reference import Reference
from torch import Tensor, nn

import vtprune
from vtprune.decoding import evictmerge, vasparse
from vtprune.decoding.evictmerge import Heard, Session, merged
from vtprune.errors import ConfigError, InputError, VTPruneWarning

FAMILIES = ("llava", "qwen2_5_vl")
OPTIONS: dict[str, dict[str, Any]] = {
    "merge": {"threshold": 0.1},
    "plain eviction": {"merge": False},
    "global": {"score": "global", "threshold": -1.0},
    "local": {"score": "local", "window": 3},
    "random": {"score": "random", "merge": False},
}


# -- the docstring's example ------------------------------------------------------------------------------------------


def test_importance_is_the_larger_of_two_shares() -> None:
    session = Session(None, keep=0.7, merge=True, threshold=0.6, window=1, score="global-local", seed=0)
    heard = Heard(None, {0: torch.tensor([[[9.0, 1.0, 0.6, 0.4]]])}, {0: torch.tensor([[[9.0, 0.2, 0.2, 1.6]]])})
    slots = torch.tensor([1, 2, 3])  # slot 0 is text
    assert torch.allclose(session._worth(0, heard, 0, slots, 1), torch.tensor([[0.5, 0.3, 0.8]]))
    session.score = "local"
    assert torch.allclose(session._worth(0, heard, 0, slots, 1), torch.tensor([[0.1, 0.1, 0.8]]))


def test_what_goes_is_merged_into_what_it_is_like_or_lost() -> None:
    keys = torch.tensor([[[1.0, 1], [1, 0], [0, 1]]])
    values, worth = 10 * keys, torch.tensor([[0.5, 0.3, 0.8]])
    kept, gone = torch.tensor([[0, 2]]), torch.tensor([[1]])
    k, v = merged(keys, values, worth, kept, gone, 0.6)
    assert torch.allclose(k, torch.tensor([[[1, 0.625], [0, 1]]])) and torch.allclose(v, 10 * k)
    assert same(merged(keys, values, worth, kept, gone, 0.72)[0], keys[:, [0, 2]])  # 0.71: of the class of zero


# -- a cache edited by hand -------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(model: Any, sample: tiny.Inputs, keep: float, steps: int, **options: Any) -> tuple[list[int], Tensor]:
    """The untouched model, its attention maps, and loops over heads and tokens."""
    merge, threshold, window = (options.get(k, d) for k, d in (("merge", True), ("threshold", 0.6), ("window", 16)))
    score = options.get("score", "global-local")
    out = model(**sample, use_cache=True, output_attentions=True)
    cache, ids = out.past_key_values, sample["input_ids"][0]
    visual = torch.isin(ids, torch.tensor(tiny.placeholders(model))).nonzero().flatten().tolist()
    n, length = len(visual), len(ids)
    count = max(1, math.floor(n * keep + 1e-6))
    for index, layer in enumerate(cache.layers):
        heads = []
        for h in range(layer.keys.shape[1]):
            group = out.attentions[index][0].shape[0] // layer.keys.shape[1]
            a = out.attentions[index][0][h * group : (h + 1) * group].mean(0).double()
            wide = [float(a[t:, t].mean()) for t in visual]
            late = [float(a[length - window :, t].sum()) for t in visual]
            wide, late = ([x / sum(row) for x in row] for row in (wide, late))
            s = {"global": wide, "local": late, "global-local": list(map(max, wide, late))}[score]
            best = sorted(range(n), key=lambda t: (-s[t], t))[:count]
            k, v = layer.keys[0, h].clone(), layer.values[0, h].clone()
            members: dict[int, list[int]] = {c: [c] for c in sorted(best)}
            for t in sorted(set(range(n)) - set(best)):
                near = [
                    (float(nn.functional.cosine_similarity(k[visual[t]], k[visual[c]], dim=0)), -c) for c in members
                ]
                like, c = max(near)
                if merge and like >= threshold:
                    members[-c].append(t)
            for c, own in members.items():
                for rows, old in ((k, layer.keys[0, h]), (v, layer.values[0, h])):
                    weights = sum(s[t] for t in own)
                    rows[visual[c]] = sum(s[t] * old[visual[t]] for t in own) / weights
            stays = [i for i in range(length) if i not in visual or visual.index(i) in members]
            heads.append((k[stays], v[stays]))
        layer.keys, layer.values = (torch.stack([pair[i] for pair in heads])[None] for i in (0, 1))
    start = int(Reference(model).prompt(sample).positions[:, -1].max()) + 1
    logits, tokens = [out.logits[0, -1]], []
    for step in range(steps):
        tokens.append(int(logits[-1].argmax()))
        if step == steps - 1:
            break
        at = torch.tensor([[start + step]])
        at = at.expand(3, 1, 1) if tiny.family_of(model) in tiny.QWEN else at
        mask = torch.ones(1, cache.layers[0].keys.shape[2] + 1, dtype=torch.long)
        embeds = model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True
        ).last_hidden_state
        logits.append(model.lm_head(hidden)[0, -1])
    return tokens, torch.stack(logits)


@pytest.mark.parametrize(
    "family, case", [*(("llava", case) for case in OPTIONS if case != "random"), ("qwen2_5_vl", "merge")]
)
def test_it_is_what_loops_over_heads_work_out(family: str, case: str) -> None:
    model, plain = tiny.build(family), tiny.build(family, "eager")
    sample = tiny.prompt(model, 3, seed=2)
    with evictmerge(model, keep=0.4, **OPTIONS[case]):
        tokens, logits = manual_decode(model, sample, 6)
    expected, expected_logits = by_hand(plain, sample, 0.4, 6, **OPTIONS[case])
    assert tokens[0].tolist() == expected
    assert_close(logits[0], expected_logits, 2e-4)
    dense = manual_decode(plain, sample, 6, tokens=tokens)[1][0]
    assert_close(logits[0, 0], dense[0], 1e-4)  # the first token is the model's own
    assert float((logits[0, 1:] - dense[1:]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "case, attention", [*(("merge", a) for a in ATTENTIONS if a != "sdpa"), ("local", "sdpa"), ("random", "sdpa")]
)
def test_the_same_alone_in_a_padded_batch_and_under_any_attention(case: str, attention: str) -> None:
    model, plain = tiny.build("llava", attention), tiny.build("llava")
    samples = tiny.mixed(model)
    with evictmerge(model, keep=0.4, **OPTIONS[case]):
        together, logits = generate(model, tiny.collate(samples), 2)
    with evictmerge(plain, keep=0.4, **OPTIONS[case]):
        for b, sample in enumerate(samples):
            if bool((sample["input_ids"] == tiny.IMAGE).any()):
                alone, own = generate(plain, sample, 2)
                assert same(alone[0], together[b])
                assert_close(own[0], logits[b], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_entries_leave_the_cache_and_text_stays(family: str) -> None:
    model, plain = tiny.build(family), twin(family)
    sample = tiny.prompt(model, 3, seed=1)
    full = plain(**sample, use_cache=True).past_key_values
    visual = torch.isin(sample["input_ids"][0], torch.tensor(tiny.placeholders(model)))
    n, length = int(visual.sum()), len(visual)
    with evictmerge(model, keep=0.25):
        cache = model(**sample, use_cache=True).past_key_values
        left = length - n + int(n * 0.25)
        assert cache_lengths(cache) == [left] * tiny.LAYERS
        for layer, old in zip(cache.layers, full.layers, strict=True):
            for h in range(old.keys.shape[1]):
                same_rows = (layer.keys[0, h, :, None] == old.keys[0, h][None]).all(-1)
                assert bool(same_rows.any(0)[~visual].all()), "a text entry was changed"


def test_keeping_everything_is_the_model_itself() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    dense = generate(model, sample, 8)
    clean = hooks(model)
    with evictmerge(model, keep=1.0):
        assert hooks(model) == clean
        off = generate(model, sample, 8)
    assert same(dense[0], off[0]) and same(dense[1], off[1])


def test_after_the_block_nothing_is_left_and_its_cache_is_refused() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2)
    before, clean = generate(model, sample, 4), hooks(model)
    with evictmerge(model, keep=0.4):
        cache = model(**sample, use_cache=True).past_key_values
        assert not same(generate(model, sample, 4)[1], before[1])
    assert hooks(model) == clean and same(generate(model, sample, 4)[1], before[1])
    with pytest.raises(InputError, match="pruned by vtprune"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)


@torch.no_grad()
def test_under_a_pruner_at_the_projector_and_over_two_turns() -> None:
    model = tiny.build("llava")
    first, second = tiny.prompt(model, 1, seed=1), tiny.prompt(model, 1, seed=2)
    mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1], dtype=torch.long)
    with vtprune.apply(model, "norm", keep=0.5), evictmerge(model, keep=0.5):
        cache = model(**first, use_cache=True).past_key_values
        text = first["input_ids"].shape[1] - 16
        assert cache_lengths(cache) == [text + 4] * tiny.LAYERS
        logits = model(**{**second, "attention_mask": mask}, past_key_values=cache).logits
        assert cache_lengths(cache) == [text + 4 + second["input_ids"].shape[1] - 16 + 4] * tiny.LAYERS
        assert bool(logits.isfinite().all())
    for method in ("fastv", "tokensparse"):
        refused = pytest.raises(InputError, match="does not combine with pruning inside")
        with vtprune.apply(model, method, keep=0.5), evictmerge(model, keep=0.5), refused:
            model(**first, use_cache=True)


@pytest.mark.parametrize(
    "options",
    [{"keep": 0}, {"keep": 2}, {"merge": 1}, {"threshold": 2}, {"window": 0}, {"score": "best"}, {"seed": -1}],
)
def test_values_are_checked_at_the_door(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))), evictmerge(tiny.build("llava"), **options):
        pass


def test_what_it_cannot_serve_is_one_clear_error() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    with evictmerge(model):
        with pytest.raises(InputError, match="use_cache is False"):
            model(**sample, use_cache=False)
        with pytest.raises(InputError, match="StaticCache"):
            model.generate(**sample, max_new_tokens=2, cache_implementation="static")
        with vasparse(model, alpha=0), pytest.raises(InputError, match="TrackedLayer"):
            model(**sample, use_cache=True)
    with pytest.warns(VTPruneWarning, match="evictmerge changed nothing"), evictmerge(model):
        model(input_ids=torch.tensor([[5, 6]]))

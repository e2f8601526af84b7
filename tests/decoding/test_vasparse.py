# SPDX-License-Identifier: Apache-2.0
"""VASparse in `generate()`: switched off it is nothing, switched on it is what loops by hand work out."""

from __future__ import annotations

import copy
import math
import threading
import warnings
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import ATTENTIONS, FLASH, Reference, hooks, reference, twin
from conformance.reference import Prompt

import vtprune
from vtprune.decoding import contrast, vasparse
from vtprune.decoding.cache import VISUAL
from vtprune.errors import ConfigError, InputError, UnsupportedModelError, VTPruneWarning

from .slow import Slow, contrasted

FAMILIES = ("llava", "qwen2_5_vl")
OFF: dict[str, Any] = dict(alpha=0, keep=1.0, beta=0)
PARTS: dict[str, dict[str, Any]] = {
    "contrast": dict(alpha=0.5, keep=1.0, beta=0),
    "generated": dict(alpha=0, keep=0.5, beta=0, every=3, merge=None),
    "visual": dict(alpha=0, keep=0.4, beta=0, select="visual", merge=None),
    "both": dict(alpha=0, keep=0.5, beta=0, every=3, select="both", merge=None, lam=5.0),
    "logits": dict(alpha=0, keep=0.5, beta=0, every=3, select="both", merge=None, scores="logits"),
    "sink": dict(alpha=0, keep=1.0, beta=0.5),
    "all": dict(alpha=0.3, keep=0.5, beta=0.3, every=2, select="both", merge=None),
}
MERGED = dict(alpha=0.3, keep=0.4, beta=0.3, every=3, select="both", merge="mean")
STEPS = 11


@torch.no_grad()
def generate(model: Any, batch: tiny.Inputs, options: dict[str, Any] = OFF, steps: int = STEPS, **more: Any) -> Any:
    asked = dict(max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True) | more
    with vasparse(model, **options) as processors:
        return model.generate(**batch, logits_processor=processors, **asked)


def new_tokens(out: Any, batch: tiny.Inputs) -> torch.Tensor:
    return out.sequences[:, batch["input_ids"].shape[1] :]


def slow(model: Any, sample: tiny.Inputs, options: dict[str, Any]) -> Slow:
    known = {k: v for k, v in options.items() if k in Slow.__dataclass_fields__}
    return Slow(model, reference(tiny.family_of(model)).prompt(sample), **known)


# -- off -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_with_every_part_off_tokens_and_logits_are_the_models_own(family: str) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    plain = model.generate(
        **batch, max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    before = hooks(model)  # transformers puts some of its own on at the first forward
    with vasparse(model, **OFF) as processors:
        assert len(processors) == 0 and hooks(model) == before
    out = generate(model, batch)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("options", [*PARTS.values(), MERGED], ids=[*PARTS, "merged"])
def test_after_the_block_nothing_is_left(family: str, options: dict) -> None:
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    plain = model(**batch).logits
    before = hooks(model)
    generate(model, batch, options)
    assert hooks(model) == before
    assert torch.equal(model(**batch).logits, plain)
    assert torch.equal(
        model.generate(**batch, max_new_tokens=5, do_sample=False), generate(model, batch, OFF, 5).sequences
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_inside_the_block_leaves_nothing_either(family: str) -> None:
    model = tiny.build(family)
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), warnings.catch_warnings():
        warnings.simplefilter("error")  # the exception says enough
        with vasparse(model):
            raise ZeroDivisionError
    assert hooks(model) == before


def test_selection_that_keeps_all_and_a_penalty_of_nothing_change_no_token() -> None:
    """The machinery runs, and does nothing: no selection is due, and the penalty is too small to be seen."""
    model = tiny.build("llava")
    batch = tiny.collate(tiny.mixed(model))
    plain = generate(model, batch)
    out = generate(model, batch, dict(alpha=0, keep=0.999, beta=1e-12, every=100))
    assert torch.equal(out.sequences, plain.sequences)


# -- on: as worked out by hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", PARTS)
def test_it_is_what_loops_by_hand_work_out(family: str, part: str, attention: str) -> None:
    """In a batch with padding, different numbers of pictures and none."""
    options = PARTS[part]
    model = tiny.build(family, attention)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    out = generate(model, batch, options)
    tokens, logits = new_tokens(out, batch), torch.stack(out.logits, 1)
    plain = new_tokens(generate(model, batch), batch)
    changed = 0
    for row, sample in enumerate(samples):
        by_hand = slow(twin(family), sample, options)
        expected = by_hand.follow(tokens[row, :-1].tolist())
        assert float((logits[row] - expected).abs().max()) <= 2e-4, row
        last = int(sample["input_ids"][0, -1])
        for step, token in enumerate(tokens[row].tolist()):
            best = expected[step]
            if options["alpha"]:
                best = contrasted(twin(family), best, last, options["alpha"], 0.1)
            assert float(best[token]) >= float(best.max()) - 1e-3
            last = token
        changed += int((tokens[row] != plain[row]).any())
    assert changed, "the part changed nothing, so this test could not fail"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "wrong", [dict(beta=0.0), dict(lam=0.0), dict(keep=0.75), dict(every=4), dict(select="generated")]
)
def test_the_loops_by_hand_can_tell(family: str, wrong: dict) -> None:
    options = PARTS["all"] | dict(lam=5.0)
    sample = tiny.prompt(twin(family), 2, seed=3)
    tokens = list(range(10, 21))
    right = slow(twin(family), sample, options).follow(tokens)
    assert float((slow(twin(family), sample, options | wrong).follow(tokens) - right).abs().max()) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [PARTS["all"], MERGED], ids=["all", "merged"])
def test_the_same_alone_and_in_a_batch(family: str, options: dict) -> None:
    model = tiny.build(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    together = generate(model, batch, options)
    tokens = new_tokens(together, batch)
    for row, sample in enumerate(samples):
        single = generate(model, sample, options)
        assert torch.equal(new_tokens(single, sample)[0], tokens[row])
        difference = torch.stack(single.logits, 1)[0] - torch.stack(together.logits, 1)[row]
        assert float(difference.abs().max()) <= 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_those_of_a_search_by_hand(family: str) -> None:
    options, beams, steps = PARTS["all"], 3, 6
    model = tiny.build(family)
    sample = tiny.prompt(model, 1, seed=5)
    out = generate(model, sample, options, steps, num_beams=beams, output_scores=True)
    by_hand = slow(twin(family), sample, options)
    start = int(sample["input_ids"][0, -1])
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for score, tokens in live:
            logits = by_hand.follow(tokens)[-1]
            logp = contrasted(twin(family), logits, tokens[-1] if tokens else start, options["alpha"], 0.1)
            best = logp.topk(beams)
            grown += [(score + float(p), [*tokens, int(t)]) for p, t in zip(best.values, best.indices, strict=True)]
        live = sorted(grown, key=lambda x: -x[0])[:beams]
    assert new_tokens(out, sample)[0].tolist() == live[0][1]
    assert float(out.sequences_scores[0]) == pytest.approx(live[0][0] / steps, abs=1e-4)
    assert live[0][1] != new_tokens(generate(model, sample, OFF, steps, num_beams=beams), sample)[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_draws_from_the_contrasted_distribution(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 1, seed=5)
    draws = dict(do_sample=True, top_k=0, num_return_sequences=64, temperature=0.7)
    torch.manual_seed(1)
    out = generate(model, sample, PARTS["all"], 1, **draws)
    again = generate(model, sample, PARTS["all"], 4, **draws)
    expected = contrasted(twin(family), out.logits[0][0], int(sample["input_ids"][0, -1]), 0.3, 0.1)
    possible = expected.isfinite()
    assert 1 < int(possible.sum()) < tiny.VOCABULARY and bool(possible[new_tokens(out, sample)[:, 0]].all())
    counts = torch.bincount(new_tokens(out, sample)[:, 0], minlength=tiny.VOCABULARY).float() / 64
    assert float((counts - (expected / 0.7).softmax(0)).abs().max()) < 0.25
    torch.manual_seed(2)
    first = generate(model, sample, PARTS["all"], 6, **draws).sequences
    torch.manual_seed(2)
    assert torch.equal(generate(model, sample, PARTS["all"], 6, **draws).sequences, first)
    assert again.sequences.shape[0] == 64


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [*PARTS.values(), MERGED], ids=[*PARTS, "merged"])
def test_a_gpu_says_what_a_cpu_says(family: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the patch embedding of Qwen is a convolution
    model = tiny.build(family)
    batch = tiny.collate(tiny.mixed(model))
    expected = generate(model, batch, options)
    found = generate(model.cuda(), {k: v.cuda() for k, v in batch.items()}, options)
    assert torch.equal(found.sequences.cpu(), expected.sequences)
    assert float((torch.stack(found.logits).cpu() - torch.stack(expected.logits)).abs().max()) <= 1e-3


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_leave_the_cache_and_what_stays_is_untouched(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 1, seed=5)
    length, visual = sample["input_ids"].shape[1], int((sample["input_ids"] == tiny.IMAGE).sum())
    options = dict(alpha=0, keep=0.5, beta=0, every=4, merge=None)
    full = generate(model, sample, OFF, 10).past_key_values
    out = generate(model, sample, options, 10).past_key_values
    # 9 tokens were fed; after the 4th and the 8th, half of those that are there go: 4 - 2, then 6 - 3, then one more.
    assert {layer.keys.shape[2] for layer in out.layers} == {length + 4}
    for mine, all_keys in zip(out.layers[:1], full.layers, strict=False):
        # Layer 0 does not depend on what earlier steps saw, so its keys are rows of the full cache, positions included.
        assert torch.equal(mine.keys[:, :, :length], all_keys.keys[:, :, :length])
    out = generate(model, sample, options | dict(select="visual"), 10).past_key_values
    assert {layer.keys.shape[2] for layer in out.layers} == {length + 9 - (visual - visual // 2)}
    for head in range(out.layers[0].keys.shape[1]):
        rows = {tuple(row.tolist()) for row in full.layers[0].keys[0, head, :length]}
        kept = [tuple(row.tolist()) for row in out.layers[0].keys[0, head, : length - (visual - visual // 2)]]
        assert set(kept) <= rows and len(set(kept)) == len(kept)
        assert not any(all(x == 0 for x in row) for row in kept)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merge", ["mean", "sum"])
def test_merged_tokens_are_means_or_sums_of_what_was_dropped(family: str, merge: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 1, seed=5)
    length, visual = sample["input_ids"].shape[1], int((sample["input_ids"] == tiny.IMAGE).sum())
    options = dict(alpha=0, keep=0.25, beta=0, select="visual", merge=merge)
    full = generate(model, sample, OFF, 2).past_key_values.layers[0]
    out = generate(model, sample, options, 2).past_key_values.layers[0]
    kept = visual // 4
    peaks = math.ceil((visual - kept) / 4)
    assert out.keys.shape[2] == length + 1 - (visual - kept) + peaks
    for head in range(full.keys.shape[1]):
        for name in ("keys", "values"):
            before, after = getattr(full, name)[0, head], getattr(out, name)[0, head]
            same = (before[:, None] == after[None]).all(-1)
            gone, made = before[~same.any(1)], after[~same.any(0)]
            if merge == "sum":
                assert torch.allclose(gone.sum(0), made.sum(0), atol=1e-4)
            assert 0 < len(made) <= peaks
            # Each merged row lies within the range of what it was made of.
            if merge == "mean":
                assert bool((made <= gone.amax(0) + 1e-5).all() and (made >= gone.amin(0) - 1e-5).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_under_a_pruner_at_the_projector(family: str) -> None:
    """Selection among what a pruner left: the same as the loops by hand on the pruned prompt."""
    model = tiny.build(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    options = PARTS["all"]
    with vtprune.apply(model, "norm", keep=0.5):
        out = generate(model, batch, options)
        report = vtprune.report(model)
        alone = [generate(model, sample, options) for sample in samples]
    assert report.tokens_out < report.tokens_in
    tokens, logits = new_tokens(out, batch), torch.stack(out.logits, 1)
    kept = [s.kept for image in report.images for s in image.segments]
    assert kept
    for row, sample in enumerate(samples):
        assert torch.equal(new_tokens(alone[row], sample)[0], tokens[row])
    # Sample 2 has one picture; its kept slots come from the report, in raster order.
    prompt = reference(family).prompt(samples[2])
    stays = torch.ones_like(prompt.placeholder)
    mine = torch.from_numpy(next(i for i in report.images if i.sample == 2).segments[0].kept)
    stays[prompt.placeholder.nonzero()[:, 0][~mine]] = False
    pruned = Prompt(
        prompt.ids[stays], prompt.embeds[stays], prompt.positions[:, stays], prompt.placeholder[stays], stays
    )
    by_hand = Slow(twin(family), pruned, **{k: v for k, v in options.items() if k in Slow.__dataclass_fields__})
    assert float((logits[2] - by_hand.follow(tokens[2, :-1].tolist())).abs().max()) <= 2e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_under_a_pruner_inside_the_language_model(family: str) -> None:
    model = tiny.build(family)
    samples = tiny.mixed(model)
    batch = tiny.collate(samples)
    options = PARTS["all"] | dict(select="generated")
    with vtprune.apply(model, "dart", keep=0.5, layer=1):
        pruned = generate(model, batch, OFF)
        out = generate(model, batch, options)
        for row, sample in enumerate(samples):
            assert torch.equal(new_tokens(generate(model, sample, options), sample)[0], new_tokens(out, batch)[row])
        with pytest.raises(InputError, match="does not combine with pruning inside"):
            generate(model, batch, PARTS["both"])
    assert not torch.equal(out.sequences, pruned.sequences)
    shorter = [
        a.keys.shape[2] - b.keys.shape[2]
        for a, b in zip(pruned.past_key_values.layers, out.past_key_values.layers, strict=True)
    ]
    assert len(set(shorter)) == 1 and shorter[0] > 0
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths[1] > lengths[2]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [PARTS["all"], MERGED], ids=["all", "merged"])
def test_a_decoding_loop_by_hand_and_a_copied_cache_go_the_same_way(family: str, options: dict) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 2, seed=5)
    options = options | dict(alpha=0)
    expected = new_tokens(generate(model, sample, options), sample)[0].tolist()
    with vasparse(model, **options), torch.no_grad():
        out = model(**sample)
        tokens = [int(out.logits[0, -1].argmax())]
        cache = out.past_key_values
        for step in range(STEPS - 1):
            if step == 5:
                cache = copy.deepcopy(cache)
            out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache)
            tokens.append(int(out.logits[0, -1].argmax()))
    assert tokens == expected


@pytest.mark.parametrize("part", ["all", dict(alpha=0, keep=1.0, beta=1e-12)], ids=["all", "nothing"])
def test_under_a_pruner_that_shortens_early_caches_too(part: Any) -> None:
    """What is remembered about the slots of a layer goes with them."""
    model = tiny.build("llava")
    sample = tiny.prompt(model, 2, seed=5)
    options = PARTS[part] if isinstance(part, str) else part
    settings = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    with vtprune.apply(model, "corematching", mode="top_k", keep=0.4, prune_early_kv=True):
        plain = model.generate(**sample, **settings)
        with vasparse(model, **(options | dict(alpha=0, select="generated"))):
            out = model.generate(**sample, **settings)
    layers = out.past_key_values.layers
    assert all(layer.track.kind.shape[2] == layer.keys.shape[2] for layer in layers)
    assert [int((layer.track.kind[0, 0] == VISUAL).sum()) for layer in layers] == [2 * 6] * tiny.LAYERS
    assert isinstance(part, str) or torch.equal(out.sequences, plain.sequences)


def test_a_second_turn_goes_on_with_what_was_selected() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, seed=5)
    options = PARTS["all"] | dict(alpha=0)
    with vasparse(model, **options), torch.no_grad():
        first = model.generate(**sample, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        length = first.past_key_values.layers[0].keys.shape[2]
        turn = torch.cat([first.sequences[:, -1:], torch.tensor([[7, 8, 9]])], 1)
        mask = torch.ones(1, first.sequences.shape[1] + 3, dtype=torch.long)
        out = model(input_ids=turn, attention_mask=mask, past_key_values=first.past_key_values)
    assert out.past_key_values.layers[0].keys.shape[2] == length + 4
    kinds = out.past_key_values.layers[0].track.kind[0]
    assert kinds[0].tolist()[-4:] == [0, 0, 0, 0]  # what the user says is never selected among


@pytest.mark.parametrize("options", [PARTS["all"], dict(alpha=0, keep=1.0, beta=0.5)])
def test_a_cache_outlives_the_block_only_where_that_is_right(options: dict) -> None:
    """An evicted cache needs the engine for its positions; under `apply` it has it, else it refuses."""
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, seed=5)
    with vasparse(model, **(options | dict(alpha=0))), torch.no_grad():
        cache = model(**sample).past_key_values
        for token in (7, 8, 9):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache)
    if options["keep"] < 1:
        with pytest.raises(InputError, match="no longer on the model"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    else:
        assert model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.isfinite().all()


def test_two_threads_do_not_mix() -> None:
    model = tiny.build("llava")
    prompts = [tiny.prompt(model, 1, seed=s) for s in (1, 2)]
    expected = [generate(model, p, MERGED).sequences for p in prompts]
    found: dict[int, torch.Tensor] = {}
    with vasparse(model, **MERGED) as processors:

        def work(i: int) -> None:
            for _ in range(3):
                out = model.generate(**prompts[i], max_new_tokens=STEPS, do_sample=False, logits_processor=processors)
                found[i] = out

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


def test_rows_of_the_prior_may_be_let_go_of_while_another_thread_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's turn, put where it hurts: after a row was found, before it is read."""
    model = tiny.build("llava")
    monkeypatch.setattr(contrast, "CACHED_ROWS", 2)
    prior, meanwhile = contrast.SparseContrast(model, 1.0, 0.1), contrast.SparseContrast(model, 1.0, 0.1).prior
    expected = meanwhile(torch.tensor([5, 6]))
    prior.prior(torch.tensor([5]))
    embed = prior.embed

    class Interrupted:
        weight = embed.weight

        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            prior.embed = embed
            prior.prior(torch.tensor([7, 8]))
            return embed(ids)

    prior.embed = Interrupted()
    with torch.no_grad():
        assert torch.allclose(prior.prior(torch.tensor([5, 6])), expected, atol=1e-5) and list(prior.rows) == [5, 6]


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(alpha=-1), "alpha=-1"),
        (dict(alpha=math.nan), "alpha=nan"),
        (dict(beta="x"), "beta='x'"),
        (dict(lam=-0.1), "lam=-0.1"),
        (dict(keep=0), "keep=0 must be a share"),
        (dict(keep=1.5), "keep=1.5"),
        (dict(plausibility=2), "plausibility=2"),
        (dict(every=0), "every=0"),
        (dict(every=2.5), "every=2.5"),
        (dict(select="text"), "select='text'.*'generated', 'visual', 'both'"),
        (dict(merge="max"), "merge='max'"),
        (dict(scores="cosine"), "scores='cosine'"),
    ],
)
def test_values_are_checked_at_the_door(options: dict, words: str) -> None:
    model = tiny.build("llava")
    before = hooks(model)
    with pytest.raises(ConfigError, match=words), vasparse(model, **options):
        pass
    assert hooks(model) == before


def test_what_it_cannot_serve_is_one_clear_error() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, seed=5)
    with vasparse(model, alpha=0), pytest.raises(ConfigError, match="on this model already"), vasparse(model):
        pass
    with pytest.raises(UnsupportedModelError, match="no language-model head"), vasparse(model.model):
        pass
    with pytest.raises(InputError, match="use_cache is False"):
        generate(model, sample, PARTS["sink"], use_cache=False)
    with pytest.raises(InputError, match=r"StaticLayer|4-D attention mask"):
        generate(model, sample, PARTS["sink"], cache_implementation="static", disable_compile=True)
    cache = model(**sample).past_key_values
    with vasparse(model, **PARTS["sink"]), pytest.raises(InputError, match="filled outside"):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    assert torch.equal(
        generate(model, sample, PARTS["contrast"], use_cache=False).sequences,
        generate(model, sample, PARTS["contrast"]).sequences,
    )


@pytest.mark.parametrize("part", ["generated", "sink"])
def test_assisted_generation_is_refused(part: str) -> None:
    model = tiny.build("llava")
    model.generation_config.eos_token_id = tiny.VOCABULARY - 1
    sample = tiny.prompt(model, 1, seed=5, end=30)
    sample["input_ids"][0, -10:] = sample["input_ids"][0, -20:-10]
    with pytest.raises(InputError, match="assisted generation"):
        generate(model, sample, PARTS[part], 20, prompt_lookup_num_tokens=3)


def test_processors_that_are_not_passed_on_are_missed() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, seed=5)
    with pytest.warns(VTPruneWarning, match="logits_processor=processors"), vasparse(model):
        model.generate(**sample, max_new_tokens=2, do_sample=False)


def test_the_reference_is_a_reference() -> None:
    """With everything off the loops by hand are the model."""
    for family in FAMILIES:
        sample = tiny.prompt(twin(family), 2, seed=3)
        by_hand: Reference = reference(family)
        prompt = by_hand.prompt(sample)
        tokens = [5, 6, 7]
        expected = by_hand.follow(prompt, {}, [*tokens, 8])
        assert float((Slow(twin(family), prompt).follow(tokens) - expected).abs().max()) < 1e-4
    assert FLASH in ATTENTIONS

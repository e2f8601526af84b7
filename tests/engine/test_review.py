# SPDX-License-Identifier: Apache-2.0
"""What a review of the engine found: each of these was silently wrong once."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import tiny
import torch
from helpers import Declared
from torch import Tensor, nn

import vtprune
from vtprune import registry
from vtprune.engine import force_pack
from vtprune.errors import ConfigError, InputError, UnsupportedModelError, VTPruneError

KEEP = 0.4
WORDS = torch.tensor([[7, 8, 9]])


def step(model: nn.Module, cache: object, ids: Tensor = WORDS) -> Tensor:
    return model(input_ids=ids, past_key_values=cache).logits


@pytest.mark.parametrize("family", tiny.QWEN)
@torch.no_grad()
def test_decoding_after_a_clip_goes_on_where_the_stock_model_does(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.sample(model, [3, tiny.Video(6, 4, 4), 5], seed=1)
    stock = model.generate(**sample, max_new_tokens=6, do_sample=False)
    with vtprune.apply(model, "norm", keep=1.0), force_pack():
        assert torch.equal(model.generate(**sample, max_new_tokens=6, do_sample=False), stock)
    with vtprune.apply(model, "norm", keep=KEEP):
        cached, again = (
            model.generate(**sample, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, again)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_text_model_called_by_itself_on_a_pruned_cache(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 1)
    lm = model.model.language_model
    with vtprune.apply(model, "norm", keep=KEEP):
        caches = [model(**sample, use_cache=True).past_key_values for _ in range(3)]
        expected = step(model, caches[0])
        by_ids = model.lm_head(lm(input_ids=WORDS, past_key_values=caches[1]).last_hidden_state)
        embeds = model.get_input_embeddings()(WORDS)
        by_rows = model.lm_head(lm(inputs_embeds=embeds, past_key_values=caches[2]).last_hidden_state)
        torch.testing.assert_close(by_ids, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(by_rows, expected, atol=1e-5, rtol=0)
        other = lm(inputs_embeds=embeds[:, :2]).last_hidden_state
    assert torch.equal(other, lm(inputs_embeds=embeds[:, :2]).last_hidden_state)


@torch.no_grad()
def test_a_report_is_of_what_is_applied_now() -> None:
    model = tiny.build("llava")
    vtprune.apply(model, "random", keep=KEEP)
    model(**tiny.prompt(model, 1))
    assert vtprune.report(model).method == "random"
    vtprune.apply(model, "grid", keep=0.5)
    with pytest.raises(InputError, match="nothing to report"):
        vtprune.report(model)
    model(**tiny.prompt(model, 1))
    assert vtprune.report(model).method == "grid"
    vtprune.remove(model)


@torch.no_grad()
def test_a_copied_cache_refuses_too_once_vtprune_is_off() -> None:
    model = tiny.build("llava")
    with vtprune.apply(model, "norm", keep=KEEP):
        cache = model(**tiny.prompt(model, 1), use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        grandchild = copy.deepcopy(twin)
        expected = step(model, copy.deepcopy(cache))
    for each in (cache, twin, grandchild):
        with pytest.raises(InputError, match="apply it again"):
            step(model, each)
    with vtprune.apply(model, "norm", keep=KEEP):
        for each in (cache, twin, grandchild):
            assert torch.equal(step(model, each), expected)
        model(**tiny.prompt(model, 1))


@torch.no_grad()
def test_a_cache_cannot_be_cropped_into_a_picture() -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1, end=6)
    with vtprune.apply(model, "norm", keep=KEEP):
        cache = model(**sample, use_cache=True).past_key_values
        tail = int(sample["input_ids"].flip(1).eq(tiny.IMAGE).int().argmax())
        cache.crop(-tail)
        step(model, cache)
        cache.crop(-WORDS.shape[1] - 1)
        with pytest.raises(InputError, match="cropped into a picture"):
            step(model, cache)


@registry.register("test-after-1")
@dataclasses.dataclass
class AfterLayerOne(Declared):
    def stages(self) -> tuple[vtprune.Stage, ...]:
        return (vtprune.Stage(layer=1),)

    def score(self, tokens: vtprune.VisualTokens) -> Tensor:
        return tokens.features.float().norm(dim=-1)


registry._METHODS.pop("test-after-1")


@pytest.fixture
def after_layer_one() -> object:
    registry.register("test-after-1")(AfterLayerOne)
    yield
    registry._METHODS.pop("test-after-1")


@torch.no_grad()
def test_cropping_a_cache_that_was_pruned_inside_the_language_model(after_layer_one: object) -> None:
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    with vtprune.apply(model, "test-after-1", keep=KEEP):
        cache = model(**sample, use_cache=True).past_key_values
        expected = step(model, copy.deepcopy(cache), WORDS[:, :1])
        step(model, cache)
        for layer in cache.layers[:2]:  # as older transformers crop: to one length, which upper layers are below of
            layer.crop(-3)
        torch.testing.assert_close(step(model, cache, WORDS[:, :1]), expected, atol=1e-5, rtol=0)
        cache.layers[-1].crop(-2)
        with pytest.raises(InputError, match="cropped too far"):
            step(model, cache)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_the_loss_is_right_whether_vtprune_met_the_inner_or_the_outer_model_first(family: str) -> None:
    model = tiny.build(family)
    sample = tiny.prompt(model, 1)
    with vtprune.apply(model, "norm", keep=KEEP):
        expected = model(**sample, labels=sample["input_ids"]).loss
    vtprune.apply(model.model, "norm", keep=KEEP)
    with vtprune.apply(model, "norm", keep=KEEP):
        assert torch.equal(model(**sample, labels=sample["input_ids"]).loss, expected)


@torch.no_grad()
def test_the_first_kept_row_is_predicted_by_nothing() -> None:
    """A prompt that begins with a picture: the first kept row has no predecessor, so its label cannot count."""
    model = tiny.build("llava")
    sample = tiny.prompt(model, 1)
    first = int(sample["input_ids"].eq(tiny.IMAGE).int().argmax())
    sample = {k: v[:, first:] if k in ("input_ids", "attention_mask") else v for k, v in sample.items()}
    labels = sample["input_ids"]
    with vtprune.apply(model, "norm", keep=KEEP) as handle:
        out = model(**sample, labels=labels)
        kept = torch.ones_like(labels, dtype=torch.bool)
        kept[labels == tiny.IMAGE] = torch.from_numpy(handle.report().images[0].segments[0].kept)
    rows, targets = out.logits[kept][:-1], labels[kept][1:]
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(rows.float(), targets), atol=1e-5, rtol=0)


@torch.no_grad()
def test_probes_that_nobody_wants_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.models import base

    model = tiny.build("llava")
    calls: list[bool] = []
    original = base._cls_row
    monkeypatch.setattr(base, "_cls_row", lambda *a: calls.append(a[3]) or original(*a))
    vtprune.apply(model, "idpruner", importance="cls", keep=KEEP)
    model(**tiny.prompt(model, 1))
    assert calls == [True]
    with vtprune.apply(model, "random", keep=KEEP):
        model(**tiny.prompt(model, 1))
    assert calls == [True]


@torch.no_grad()
def test_a_selection_that_breaks_the_budget_of_a_pool_is_an_error() -> None:
    @registry.register("test-greedy-first")
    @dataclasses.dataclass
    class First(Declared):
        def select(self, tokens, budget, stage=None):  # type: ignore[no-untyped-def]
            return vtprune.Selection.from_order(torch.arange(sum(budget.pools(tokens).counts)), tokens)

    @registry.register("test-flat")
    @dataclasses.dataclass
    class Flat(Declared):
        def score(self, tokens: vtprune.VisualTokens) -> Tensor:
            return tokens.features.float()

    try:
        model = tiny.build("llava")
        batch = tiny.collate([tiny.prompt(model, 1, 1), tiny.prompt(model, 1, 2)])
        with pytest.raises(VTPruneError, match="per pool"), vtprune.apply(model, "test-greedy-first", keep=0.5):
            model(**batch)
        with pytest.raises(ConfigError, match="one number per token"), vtprune.apply(model, "test-flat", keep=0.5):
            model(**batch)
    finally:
        registry._METHODS.pop("test-greedy-first")
        registry._METHODS.pop("test-flat")


def test_settings_that_are_none_are_not_taken_for_the_default() -> None:
    model = tiny.build("llava")
    for name in ("positions", "scope", "allocation"):
        with pytest.raises(ConfigError, match=name):
            vtprune.apply(model, "norm", **{name: None})


def test_encode_needs_a_prompt() -> None:
    with pytest.raises(InputError, match="neither input_ids nor inputs_embeds"):
        vtprune.encode(tiny.build("llava"), {})


def test_a_siglip_tower_that_would_lose_a_patch_is_refused() -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    tower = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = LlavaConfig(vision_config=tower, text_config=tiny.build("llava").config.text_config)
    with pytest.raises(UnsupportedModelError, match="set it to 'full'"):
        vtprune.apply(LlavaForConditionalGeneration(config), "norm")


@torch.no_grad()
def test_a_failed_using_leaves_no_hook() -> None:
    from conformance.helpers import hooks

    model = tiny.build("qwen2_5_vl")
    model(**tiny.prompt(model, 1))
    before = hooks(model)
    with pytest.raises(VTPruneError), vtprune.using(model, "idpruner", importance="cls"), warnings.catch_warnings():
        pass
    assert hooks(model) == before

# SPDX-License-Identifier: Apache-2.0
"""Prefill as a graph. Without a GPU a stand-in runs the captured work again instead of replaying it, into the same
static tensors: everything but the capture itself is what runs on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from conformance.helpers import assert_close, hooks
from torch import nn
from torch.utils._pytree import tree_leaves

import vtprune
from vtprune import registry
from vtprune.engine import decoder, graph, replay
from vtprune.engine.attach import engine_of
from vtprune.errors import ConfigError, VTPruneWarning
from vtprune.models import find_family
from vtprune.pruners.norm import NormPruner

KEEP = 0.4
SAME = 2e-5  # fp32; other kernels, the same sums


class StandIn:
    """What `replay.Replay` is on a GPU."""

    fuses = False
    made: int = 0

    def __init__(self, work: Any, device: torch.device, pool: Any) -> None:
        type(self).made += 1
        self.work, self.out = work, work()

    def __call__(self) -> Any:
        for static, new in zip(tree_leaves(self.out), tree_leaves(self.work()), strict=True):
            if isinstance(static, torch.Tensor):
                static.copy_(new)
        return self.out

    @staticmethod
    def pool(device: torch.device) -> None:
        return None

    @staticmethod
    def pool_bytes(pool: None) -> int:
        return 0


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(replay, "Replay", StandIn)
    monkeypatch.setattr(replay, "obstacle", lambda device: "")
    monkeypatch.setattr(StandIn, "made", 0)
    return StandIn


@pytest.fixture(params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model = tiny.build(request.param)
    yield model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VTPruneWarning)  # some tests never run a forward
        vtprune.remove(model)


@pytest.fixture
def llava() -> nn.Module:
    return tiny.build("llava")


def compiled(model: nn.Module) -> dict[str, str]:
    return vtprune.report(model).compiled


def tensors(cache: Any) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@torch.no_grad()
def test_a_graph_says_what_the_model_says(anywhere: Any, model: nn.Module) -> None:
    """Prompts of several lengths share a bucket, whose tail must not leak into them; decoding goes on from each."""
    prompts = [tiny.prompt(model, n, seed, start) for n, seed, start in ((2, 0, 3), (1, 1, 0), (3, 2, 3), (1, 0, 3))]
    prompts.append(tiny.collate([tiny.prompt(model, 1, 3), tiny.prompt(model, 1, 4)]))
    greedy = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    expected, found = [], []
    for where, how in ((expected, None), (found, "graph")):
        vtprune.apply(model, "norm", keep=KEEP, compile=how)
        for inputs in prompts:
            out = model(**inputs, use_cache=True)
            kv = [t.clone() for t in tensors(out.past_key_values)]
            where.append((out.logits, kv, model.generate(**inputs, **greedy).logits))
            assert bool(compiled(model)) == (how is not None)
    assert compiled(model)["language model"].startswith("graph of "), compiled(model)
    for (logits, kv, written), (logits_2, kv_2, written_2) in zip(expected, found, strict=True):
        assert_close(logits, logits_2, SAME)
        assert_close(torch.stack(written), torch.stack(written_2), SAME)
        for a, b in zip(kv, kv_2, strict=True):
            assert_close(a, b, SAME)
    assert len(engine_of(find_family(model)).graphs.shelf.graphs) < len(prompts)


@torch.no_grad()
def test_two_prompts_of_one_bucket_do_not_share_results(anywhere: Any, model: nn.Module) -> None:
    first, second = tiny.prompt(model, 1, 0), tiny.prompt(model, 1, 1)
    vtprune.apply(model, "norm", keep=KEEP, compile="graph", restore=False)
    out = model(**first, use_cache=True)
    before = [t.clone() for t in (out.logits, *tensors(out.past_key_values))]
    model(**second, use_cache=True)
    for a, b in zip(before, (out.logits, *tensors(out.past_key_values)), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_removed_without_a_trace(anywhere: Any, model: nn.Module) -> None:
    inputs = tiny.prompt(model, 2)
    dense = model(**inputs).logits
    state, found = {k: v.clone() for k, v in model.state_dict().items()}, hooks(model)
    storages = [p.untyped_storage().nbytes() for p in model.parameters()]
    with vtprune.apply(model, "norm", keep=KEEP, compile="graph"):
        model(**inputs)
        now = model.state_dict()
        assert all(torch.equal(state[k], now[k]) for k in state), "weights changed"
        # Three projections of a layer share one piece of memory: nothing is held twice.
        pieces = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        assert sum(pieces.values()) == sum(storages)
    now = model.state_dict()
    assert all(torch.equal(state[k], now[k]) for k in state) and hooks(model) == found
    assert [p.untyped_storage().nbytes() for p in model.parameters()] == storages
    assert torch.equal(model(**inputs).logits, dense)


@torch.no_grad()
def test_keeping_everything_runs_as_a_graph_too(anywhere: Any, model: nn.Module) -> None:
    inputs = tiny.prompt(model, 2)
    dense = model(**inputs).logits
    with vtprune.apply(model, "grid", keep=1.0, compile="graph"):
        assert_close(model(**inputs).logits, dense, SAME)
        assert compiled(model)["language model"].startswith("graph")


@torch.no_grad()
def test_the_tower_is_captured_with_what_its_probes_saw(anywhere: Any, llava: nn.Module) -> None:
    first, second = tiny.prompt(llava, 2, 0), tiny.prompt(llava, 2, 1)
    expected, found = [], []
    for where, how in ((expected, None), (found, "graph")):
        vtprune.apply(llava, "visionzip", keep=KEEP, compile=how)
        for inputs in (first, second, first):
            where.append((llava(**inputs).logits, vtprune.report(llava).images))
    assert compiled(llava)["vision tower"].startswith("graph; 1 captured")
    for (logits, images), (logits_2, images_2) in zip(expected, found, strict=True):
        assert_close(logits, logits_2, SAME)
        for a, b in zip(images, images_2, strict=True):
            assert (a.segments[0].kept == b.segments[0].kept).all()
    # Another method wants no attention row: a graph of its own.
    vtprune.apply(llava, "norm", keep=KEEP, compile="graph")
    llava(**first)
    assert compiled(llava)["vision tower"].startswith("graph; 2 captured")


def eager(model: nn.Module, inputs: tiny.Inputs, expected: str, **call: Any) -> None:
    with vtprune.apply(model, **({"method": "norm", "keep": KEEP} | call.pop("apply", {}))):
        plain = model(**inputs, **call)
    with vtprune.apply(model, **({"method": "norm", "keep": KEEP} | call.pop("apply", {})), compile="graph"):
        out = model(**inputs, **call)
        assert expected in compiled(model)["language model"], compiled(model)
    assert torch.equal(out.logits, plain.logits)


def test_what_cannot_be_a_graph_runs_as_ever_and_says_why(anywhere: Any, llava: nn.Module) -> None:
    inputs = tiny.prompt(llava, 2)
    eager(llava, inputs, "gradients are on")
    with torch.no_grad():
        eager(llava, tiny.collate([inputs, tiny.prompt(llava, 1)]), "different lengths")
        eager(llava, inputs, "hidden states or attention maps", output_hidden_states=True)
        from transformers import StaticCache

        cache = StaticCache(config=llava.config.text_config, max_cache_len=99)
        eager_with_cache(llava, inputs, cache)
        hook = llava.model.language_model.layers[1].register_forward_hook(lambda *_: None)
        eager(llava, inputs, "hook that is not vtprune's")
        hook.remove()
        llava.model.language_model.layers[2].mlp.forward = lambda x: x
        with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
            llava(**inputs)
            assert "forward of a module was replaced" in compiled(llava)["language model"]
        del llava.model.language_model.layers[2].mlp.forward
        with vtprune.apply(llava, "fastv", keep=KEEP, layer=1, compile="graph"):
            llava(**inputs)
            assert "acts inside" in compiled(llava)["language model"]
        with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
            llava(**inputs)
            assert compiled(llava)["language model"].startswith("graph")
            llava.model.language_model.layers[0].mlp.up_proj.weight.data = torch.zeros(64, 32)
            llava(**inputs)
            assert "weights of the model were moved" in compiled(llava)["language model"]
        lm = llava.model.language_model
        with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
            whole, lm.layers = lm.layers, nn.ModuleList(list(lm.layers)[:-1])
            llava(**inputs)
            assert "module of the model was replaced" in compiled(llava)["language model"]
            lm.layers = whole
            lm.layers[1], lm.layers[2] = lm.layers[2], lm.layers[1]
            llava(**inputs)
            assert "module of the model was replaced" in compiled(llava)["language model"]
            lm.layers[1], lm.layers[2] = lm.layers[2], lm.layers[1]
            llava(**inputs)
            assert compiled(llava)["language model"].startswith("graph")
        # Applied again, it captures the model as it is now.
        with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
            llava(**inputs)
            assert compiled(llava)["language model"].startswith("graph")


def eager_with_cache(model: nn.Module, inputs: tiny.Inputs, cache: Any) -> None:
    with vtprune.apply(model, "norm", keep=KEEP, compile="graph"):
        model(**inputs, past_key_values=cache, use_cache=True)
        assert "StaticCache" in compiled(model)["language model"]


@torch.no_grad()
def test_a_capture_that_fails_is_not_tried_again(
    anywhere: Any, llava: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fail(*args: Any) -> None:
        tries.append(args)
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(StandIn, "__init__", fail)
    inputs = tiny.prompt(llava, 2)
    with vtprune.apply(llava, "norm", keep=KEEP):
        expected = llava(**inputs).logits
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
        for _ in range(2):
            assert torch.equal(llava(**inputs).logits, expected)
        assert compiled(llava)["language model"] == "eager: capture failed (RuntimeError: no luck)"
        assert compiled(llava)["vision tower"] == "eager: capture failed (RuntimeError: no luck)"
    assert len(tries) == 2


@torch.no_grad()
def test_no_more_graphs_than_said(anywhere: Any, llava: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_GRAPHS", 2)
    long = [tiny.prompt(llava, 1, end=n) for n in (5, 40, 80, 5)]
    with vtprune.apply(llava, "norm", keep=KEEP):
        expected = [llava(**inputs).logits for inputs in long]
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
        for inputs, logits in zip(long, expected, strict=True):
            assert_close(llava(**inputs).logits, logits, SAME)
            assert len(engine_of(find_family(llava)).graphs.shelf.graphs) <= 2
    assert anywhere.made == 6  # one tower, one choice of tokens, three lengths, and the first of them again


def kept(model: nn.Module) -> list[Any]:
    return [segment.kept.tolist() for image in vtprune.report(model).images for segment in image.segments]


@torch.no_grad()
@pytest.mark.parametrize("method", ["norm", "idpruner", "divprune"])
def test_the_choice_is_captured_for_pictures_of_the_same_shapes(
    anywhere: Any, model: nn.Module, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the text around them; another number of pictures, or a batch of prompts, is another graph."""
    monkeypatch.setattr(graph, "CAPTURED_AFTER", 1)
    rounds = [[tiny.prompt(model, 2, seed, start) for seed, start in ((0, 3), (1, 0), (2, 3), (3, 5))]]
    rounds.append([tiny.prompt(model, 1, seed) for seed in range(3)])
    rounds.append([tiny.collate([tiny.prompt(model, 1, 3 + n), tiny.prompt(model, 1, 4 + n)]) for n in range(3)])
    prompts = [inputs for same in rounds for inputs in same]
    expected, found, how = [], [], []
    for where, compile in ((expected, None), (found, "graph")):
        with vtprune.apply(model, method, keep=KEEP, compile=compile):
            for inputs in prompts:
                where.append((model(**inputs).logits, kept(model)))
                how.append(compiled(model).get("choice of tokens", ""))
    for (logits, chosen), (logits_2, chosen_2) in zip(expected, found, strict=True):
        assert chosen == chosen_2
        assert_close(logits, logits_2, SAME)
    first = "eager: captured when pictures of these shapes come again"
    captured = [f"graph; {n} captured, 0 MiB of buffers, 0 MiB of pool" for n in (1, 2, 3)]
    assert how[len(prompts) :] == [
        *(first, *[captured[0]] * 3),
        *(first, *[captured[1]] * 2),
        *(first, *[captured[2]] * 2),
    ]


@torch.no_grad()
def test_more_shapes_than_graphs_are_not_captured_again_and_again(
    anywhere: Any, llava: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MAX_GRAPHS", 2)
    monkeypatch.setattr(graph, "CAPTURED_AFTER", 1)
    prompts = [tiny.prompt(llava, pictures) for pictures in (1, 2, 3)]
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
        for _ in range(16):
            for inputs in prompts:
                llava(**inputs)
        assert 3 <= engine_of(find_family(llava)).graphs.captures <= 5


@torch.no_grad()
def test_budgets_that_look_at_the_tokens_are_not_captured(
    anywhere: Any, llava: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "CAPTURED_AFTER", 0)
    inputs = tiny.prompt(llava, 2)
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph", allocation="vidcom2"):
        llava(**inputs)
        assert compiled(llava)["choice of tokens"] == "eager: allocation='vidcom2' looks at the tokens"


@torch.no_grad()
def test_a_tower_called_by_itself_runs_as_ever(anywhere: Any, llava: nn.Module) -> None:
    pixels = tiny.prompt(llava, 1)["pixel_values"]
    expected = llava.model.vision_tower(pixels, output_hidden_states=True)
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph", tower_keep=0.5):
        llava(**tiny.prompt(llava, 1))
        found = llava.model.vision_tower(pixels, output_hidden_states=True)
    for one, other in zip(expected.hidden_states, found.hidden_states, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(expected.last_hidden_state, found.last_hidden_state)


class Drawn(NormPruner):
    """Derived from a method that can be captured, and cannot be itself: what it drew first would be there for ever."""

    def score(self, tokens: Any) -> torch.Tensor:
        return torch.rand(len(tokens.source))


@torch.no_grad()
def test_what_does_not_say_that_it_can_be_captured_is_not(
    anywhere: Any, llava: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "CAPTURED_AFTER", 0)
    inputs = tiny.prompt(llava, 2)
    for method, options in (("random", {}), ("idpruner", {"importance": "zoo"}), ("drawn", {})):
        monkeypatch.setitem(registry._METHODS, "drawn", Drawn)
        with vtprune.apply(llava, method, keep=KEEP, compile="graph", **options):
            llava(**inputs)
            assert "does not say that it can be captured" in compiled(llava)["choice of tokens"]
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
        with vtprune.engine.attach.watching(find_family(llava), lambda call: None):
            llava(**inputs)
        assert compiled(llava)["choice of tokens"] == "eager: something else looks at the tokens"
        llava(**inputs)
        assert compiled(llava)["choice of tokens"].startswith("graph")


@torch.no_grad()
def test_inference_mode_and_no_grad_share_graphs(anywhere: Any, llava: nn.Module) -> None:
    inputs = tiny.prompt(llava, 2)
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
        with torch.inference_mode():
            inside = llava(**inputs).logits.clone()
        assert torch.equal(llava(**inputs).logits, inside)
        with torch.inference_mode():
            llava.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert compiled(llava)["language model"].startswith("graph")


def test_applied_in_inference_mode_the_weights_can_still_be_trained(anywhere: Any, llava: nn.Module) -> None:
    inputs = tiny.prompt(llava, 2)
    with torch.inference_mode():
        handle = vtprune.apply(llava, "norm", keep=KEEP, compile="graph")
        llava(**inputs)
    llava(**inputs).logits.sum().backward()
    with torch.inference_mode():
        handle.remove()
    llava(**inputs).logits.sum().backward()


@torch.no_grad()
def test_on_a_cpu_it_says_why_and_changes_nothing(llava: nn.Module) -> None:
    inputs = tiny.prompt(llava, 2)
    dense = llava(**inputs).logits
    found = hooks(llava)
    with vtprune.apply(llava, "norm", keep=1.0, compile="graph"):
        assert torch.equal(llava(**inputs).logits, dense)
        assert "CUDA graphs need a CUDA device" in compiled(llava)["language model"]
        assert "CUDA graphs need" in str(vtprune.report(llava))
    assert hooks(llava) == found


def test_buckets() -> None:
    assert [graph.bucket(n) for n in (1, 32, 33, 104, 128, 224, 257, 640, 2944, 4160)] == [
        *(32, 32, 64, 128, 128, 224, 288, 640, 3072, 4608)
    ]
    for n in range(1, 20000):
        assert n <= graph.bucket(n) and (n <= 256 or graph.bucket(n) < 1.126 * n)


def test_config_refuses_other_words_and_goes_to_json() -> None:
    with pytest.raises(ConfigError, match="choose None or 'graph'"):
        vtprune.PruneConfig(compile="max-autotune")
    config = vtprune.PruneConfig("norm", compile="graph")
    assert vtprune.PruneConfig.from_json(config.to_json()) == config


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_a_layer_and_it_is_the_same() -> None:
    """The very function that a GPU captures, whole (no graph break), with grouped queries and a bias."""
    torch.manual_seed(0)
    shape = decoder.Shape(heads=4, kv_heads=2, head_dim=8, eps=1e-6)

    def weights() -> decoder.Weights:
        qkv, gate_up = torch.randn(64, 32) / 6, torch.randn(128, 32) / 6
        out, down = torch.randn(32, 32) / 6, torch.randn(32, 64) / 6
        return decoder.Weights(
            torch.rand(32), qkv, torch.rand(64), out, None, torch.rand(32), gate_up, None, down, None
        )

    function = decoder.fused(decoder.decoder_layer, 1000)
    for layer in range(2):  # the second has other weights, and must not be compiled again
        hidden, update, cos, sin = torch.randn(2, 40, 32), torch.randn(2, 40, 32), *torch.randn(2, 2, 1, 40, 8)
        made, w = torch.zeros(3, 2, 2, 2, 40, 8), weights()
        expected = decoder.decoder_layer(hidden, update, cos, sin, made[0], w, shape)
        with torch.compiler.set_stance("default" if layer == 0 else "fail_on_recompile"):
            found = function(hidden, update, cos, sin, made[1 + layer], w, shape)
        for a, b in zip((*expected, made[0]), (*found, made[1 + layer]), strict=True):
            assert_close(a, b, 1e-5)


@torch.no_grad()
def test_wrong_placeholders_are_still_the_models_own_error(anywhere: Any, llava: nn.Module) -> None:
    inputs = tiny.prompt(llava, 2)
    inputs["input_ids"][0, inputs["input_ids"][0].tolist().index(tiny.IMAGE)] = tiny.FIRST_WORD
    with pytest.raises(ValueError, match="do not match"):
        llava(**inputs)
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
        with pytest.raises(ValueError, match="do not match"):
            llava(**inputs)
        llava(**tiny.prompt(llava, 2))

# SPDX-License-Identifier: Apache-2.0
"""On a GPU: graphs say what the eager model says, one wait for the device per prefill, no more memory than dense."""

from __future__ import annotations

import gc
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.helpers import error
from helpers import Declared
from torch import nn

import vtprune
from vtprune import bench, registry
from vtprune.bench.clocks import kv_bytes
from vtprune.budget import ALLOCATIONS
from vtprune.engine import attach, graph
from vtprune.models import find_family
from vtprune.tokens import PROJECTOR

pytestmark = pytest.mark.gpu
MODELS = ("pocket-llava", "pocket-llava-next", "pocket-qwen2.5-vl")
#: Allocations that look at the tokens wait once by design: how many tokens a segment keeps is a number of the host.
FIXED = [
    name
    for name, cls in vtprune.methods().items()
    if cls().stages() == (PROJECTOR,) and not cls.adaptive and cls.allocation in ALLOCATIONS and cls.training_free
]
KEEP = 1 / 4


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    model, _ = vtprune.load(request.param, device="cuda", dtype=torch.float32)
    yield model


@pytest.fixture(scope="module")
def llava() -> nn.Module:
    return vtprune.load("pocket-llava", device="cuda", dtype=torch.float32)[0]


def prompts(model: nn.Module) -> list[dict[str, Any]]:
    """Three prompts of one bucket or two, and a batch."""
    return [bench.make_inputs(model, batch, None, text) for batch, text in ((1, 64), (1, 70), (1, 120), (3, 64))]


def as_graph(model: nn.Module) -> None:
    compiled = vtprune.report(model).compiled
    assert compiled["language model"].startswith("graph of "), compiled


@torch.no_grad()
def test_graphs_say_what_the_eager_model_says(model: nn.Module) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 6}
    expected, found = [], []
    for where, how in ((expected, None), (found, "graph")):
        with vtprune.apply(model, "norm", keep=KEEP, compile=how):
            for inputs in [*prompts(model), *prompts(model)]:  # the second round replays what the first captured
                out = model(**inputs, use_cache=True)
                keys = [layer.keys.clone() for layer in out.past_key_values.layers]
                where.append((out.logits, keys, model.generate(**inputs, **greedy)))
                if how:
                    as_graph(model)
    for (logits, keys, tokens), (logits_2, keys_2, tokens_2) in zip(expected, found, strict=True):
        assert error(logits, logits_2) <= 2e-3 * logits.abs().max()
        assert all(error(a, b) <= 2e-3 * a.abs().max() for a, b in zip(keys, keys_2, strict=True))
        assert torch.equal(tokens, tokens_2)


@torch.no_grad()
def test_bf16_graphs_are_as_near_to_fp32_as_the_eager_model() -> None:
    model, _ = vtprune.load("pocket-llava", device="cuda", dtype=torch.float32)
    inputs = bench.make_inputs(model)
    with vtprune.apply(model, "grid", keep=KEEP):
        exact = model(**inputs).logits
    half = model.bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    off = []
    for how in (None, "graph"):
        with vtprune.apply(half, "grid", keep=KEEP, compile=how):
            off.append(error(half(**inputs).logits.float(), exact))
            if how:
                as_graph(half)
    assert off[1] <= 1.5 * off[0] + 1e-3 * exact.abs().max()


@torch.no_grad()
def test_without_a_trace(llava: nn.Module) -> None:
    inputs = bench.make_inputs(llava)
    state = {k: v.clone() for k, v in llava.state_dict().items()}
    dense = llava(**inputs).logits.clone()
    with vtprune.apply(llava, "norm", keep=1.0, compile="graph"):
        llava(**inputs)  # cuBLAS makes its workspace for the streams of captures, and keeps it
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with vtprune.apply(llava, "norm", keep=1.0, compile="graph"):
        packed = llava(**inputs).logits
        as_graph(llava)
        assert error(packed, dense) <= 2e-3 * dense.abs().max()
        del packed
    gc.collect()
    torch.cuda.empty_cache()
    now = llava.state_dict()
    assert all(torch.equal(state[k], now[k]) for k in state)
    assert torch.equal(llava(**inputs).logits, dense)
    assert torch.cuda.memory_allocated() - before < 1 << 20, "graphs left memory behind"


@torch.no_grad()
def test_threads_share_graphs_and_not_results(llava: nn.Module) -> None:
    many = [bench.make_inputs(llava, 1, None, text) for text in (40, 44, 48, 52)]
    for i, inputs in enumerate(many):
        inputs["pixel_values"] = inputs["pixel_values"].roll(i + 1, -1)
    with vtprune.apply(llava, "norm", keep=KEEP, compile="graph"):
        expected = [llava(**inputs).logits.clone() for inputs in many]
        wrong: list[Any] = []

        def client(i: int) -> None:
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda.current_stream().synchronize()
                for _ in range(10):
                    out = llava(**many[i]).logits
                    torch.cuda.current_stream().synchronize()
                    if error(out, expected[i]) > 1e-4 * expected[i].abs().max():
                        wrong.append(i)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(len(many))]
        torch.cuda.synchronize()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("compile", [None, "graph"])
@pytest.mark.parametrize("method", FIXED)
@torch.no_grad()
def test_one_wait_for_the_device_per_prefill(
    llava: nn.Module, method: str, compile: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None in score, select and pack; one in all that vtprune does before the language model: the segment table."""
    waits: list[str] = []
    prune_prompt, enter = attach.prune_prompt, attach.Engine._enter_text_model

    def strict(*args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            prune_prompt(*args)
        except RuntimeError as error:
            frames = traceback.extract_tb(error.__traceback__)
            mine = [f"{Path(f.filename).name}:{f.lineno}: {f.line}" for f in frames if "vtprune" in f.filename]
            raise AssertionError(f"{error.args[0].splitlines()[0]} at {mine[-1]}") from None
        finally:
            torch.cuda.set_sync_debug_mode("warn")

    def counted(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                return enter(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found = [w for w in seen if "called a synchronizing" in str(w.message)]
                waits.extend(f"{Path(w.filename).name}:{w.lineno}" for w in found)

    inputs = bench.make_inputs(llava, 2)
    try:
        with vtprune.apply(llava, method, keep=KEEP) as handle:
            handle._engine.job.trusted = True  # its first selection is checked, which waits, once
            llava(**inputs)  # kernels are compiled, and tables are made
    except vtprune.errors.VTPruneError as error:
        assert method in ("embedlens",), error  # it needs a calibration that fits
        return
    monkeypatch.setattr(attach, "prune_prompt", strict)
    monkeypatch.setattr(attach.Engine, "_enter_text_model", counted)
    with vtprune.apply(llava, method, keep=KEEP, compile=compile) as handle:
        handle._engine.job.trusted = True
        llava(**inputs)
        waits.clear()
        llava(**inputs)
    assert len(waits) <= 1, f"{len(waits)} waits, at {', '.join(waits)}"


@torch.no_grad()
def test_no_more_memory_than_dense_and_the_cache_shrinks_to_the_byte() -> None:
    model, _ = vtprune.load("pocket-llava", device="cuda", dtype=torch.bfloat16)
    inputs = bench.make_inputs(model, 12)

    def run() -> tuple[int, int]:
        model(**inputs, use_cache=True, logits_to_keep=1)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        return torch.cuda.max_memory_allocated(), kv_bytes(out.past_key_values)

    peak, held = run()
    for method in ("grid", "norm", "idpruner", "divprune", "visionzip"):
        with vtprune.apply(model, method, keep=KEEP):
            peak_now, held_now = run()
        assert peak_now <= peak, method
        assert held_now * (576 + 64) == held * (144 + 64)


@dataclass
class Waiting(Declared):
    """Says that it can be captured, and waits for the device."""

    capturable = True

    def score(self, tokens: Any) -> torch.Tensor:
        first = float(tokens.features[0, 0])
        return tokens.features[:, 0].float() - first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_choice_as_a_graph_is_the_same_to_the_bit(
    model: nn.Module, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other pictures and other lengths replay it; another budget, or a batch, is another graph. Everything else runs as
    the same graphs with it and without, so logits and caches are the same to the bit."""
    model = model.to(dtype)
    prompts = [bench.make_inputs(model, batch, None, text) for batch, text in ((1, 64), (1, 70), (1, 120), (2, 64))]
    for i, inputs in enumerate(prompts):
        inputs["pixel_values"] = inputs["pixel_values"].roll(1 + i, -1).to(dtype)
    found: list[list[Any]] = []
    for after in (1 << 30, 1):
        monkeypatch.setattr(graph, "CAPTURED_AFTER", after)
        runs, how = [], []
        for method, keep in (("norm", KEEP), ("idpruner", KEEP), ("divprune", KEEP), ("norm", 100)):
            with vtprune.apply(model, method, keep=keep, compile="graph"):
                for inputs in prompts * 3:
                    out = model(**inputs, use_cache=True)
                    keys = [layer.keys.clone() for layer in out.past_key_values.layers]
                    images = vtprune.report(model).images
                    chosen = [s.kept.tolist() for image in images for s in image.segments]
                    order = [s.order.tolist() for image in images for s in image.segments]
                    runs.append((out.logits.clone(), keys, chosen, order))
                    how.append(vtprune.report(model).compiled["choice of tokens"].split()[0])
        found.append(runs)
        assert how.count("graph;") == (0 if after > 1 else 4 * (len(prompts) * 3 - 2)), how
    for (logits, keys, chosen, order), (logits_2, keys_2, chosen_2, order_2) in zip(*found, strict=True):
        assert chosen == chosen_2 and order == order_2
        assert torch.equal(logits, logits_2)
        assert all(torch.equal(a, b) for a, b in zip(keys, keys_2, strict=True))


@torch.no_grad()
def test_a_choice_that_waits_runs_without_a_graph_and_spoils_no_other(
    llava: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "CAPTURED_AFTER", 0)
    monkeypatch.setitem(registry._METHODS, "waiting", Waiting)
    inputs = bench.make_inputs(llava)
    with attach.attached(find_family(llava)):  # what was captured, and refused, stays
        for method in ("norm", "waiting", "divprune", "norm"):
            with vtprune.apply(llava, method, keep=KEEP):
                expected = llava(**inputs).logits
            with vtprune.apply(llava, method, keep=KEEP, compile="graph"):
                for _ in range(3):
                    logits = llava(**inputs).logits
                    as_graph(llava)
                    assert error(logits, expected) <= 2e-3 * expected.abs().max()
                said = vtprune.report(llava).compiled["choice of tokens"]
            assert said.startswith("eager: capture failed" if method == "waiting" else "graph;"), said

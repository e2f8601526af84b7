# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures what it says: shapes, parts, bytes, FLOPs; and what it concludes follows from its rows."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vtprune
from vtprune import bench, cli
from vtprune.bench import Case, Row, clocks, report, runner
from vtprune.config import PruneConfig
from vtprune.errors import ConfigError
from vtprune.models import find_family

CPU = torch.device("cpu")
PRESETS = ("tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl")
TOKENS = {"tiny-llava": 16, "tiny-llava-next": 80, "tiny-qwen2.5-vl": 144}


@pytest.fixture(scope="module", params=PRESETS)
def made(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    return request.param, bench.build(request.param, CPU)


@pytest.fixture(scope="module")
def tiny_llava() -> nn.Module:
    return bench.build("tiny-llava", CPU)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_RUNS", 3)


def rows_of(model: nn.Module, name: str, case: Case, configs: list[tuple[str, str, PruneConfig]]) -> list[Row]:
    lines = report.lines_of(model, case, configs, None)
    return list(runner.measure(model, name, case, lines, seconds=0, new_tokens=1, min_runs=3))


def configured(*methods: str, keep: str = "1/4") -> list[tuple[str, str, PruneConfig]]:
    return [(m, keep, PruneConfig(m, keep=1 / 4)) for m in methods]


def test_prompts_have_the_rows_that_were_asked_for(made: tuple[str, nn.Module]) -> None:
    name, model = made
    for batch, text in ((1, 64), (2, 30)):
        inputs = bench.make_inputs(model, batch, None if "qwen" not in name else (336, 336), text)
        assert inputs["input_ids"].shape == (batch, TOKENS[name] + text)
        assert bench.visual_tokens(model, inputs) == TOKENS[name]
        with torch.no_grad():
            assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    with pytest.raises(ConfigError, match="separators of the picture"):
        bench.make_inputs(model, 1, None, 1)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"])
def test_presets_have_the_shape_of_their_model(name: str) -> None:
    """Built without memory; sizes are those of the checkpoints' cards."""
    with torch.device("meta"):
        model = bench.build(name, torch.device("meta"), torch.bfloat16)
    weights = sum(p.numel() for p in model.parameters()) / 1e9
    assert weights == pytest.approx(8.29 if "qwen" in name else 7.06, abs=0.02)
    family = find_family(model)
    if name == "llava-next-7b":
        layout = family.layouts("image", {"image_sizes": torch.tensor([[672, 672]])})[0]
        assert (len(layout.rank), layout.length) == (2880, 2880 + 48)


def test_rows_add_up(made: tuple[str, nn.Module]) -> None:
    name, model = made
    case = Case(2, None if "qwen" not in name else (336, 336), 64)
    rows = rows_of(model, name, case, configured("norm", "fastv"))
    assert [r.method for r in rows] == ["dense", "ideal", "norm", "fastv"]
    dense, ideal, norm, fastv = rows
    total, config = TOKENS[name], find_family(model).config.text_config
    heads, head = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for row in rows:
        assert row.visual_tokens == total and row.kept == (total if row is dense else total // 4)
        assert row.runs == 3 and row.ttft_ms_p50 <= row.ttft_ms_p90
        assert 0 < row.vision_ms < row.ttft_ms_p90 and 0 < row.lm_ms_p50 <= row.ttft_ms_p90 and row.tpot_ms > 0
        if row is not fastv:  # to the byte: keys and values of every row that stays, in every layer
            held = 2 * 2 * config.num_hidden_layers * (row.kept + 64) * heads * head * 4
            assert row.kv_bytes == held
            assert row.lm_gflop_counted == pytest.approx(row.lm_gflop, rel=1e-3)
    assert norm.kv_bytes == ideal.kv_bytes < fastv.kv_bytes < dense.kv_bytes
    assert norm.lm_gflop == ideal.lm_gflop < fastv.lm_gflop < dense.lm_gflop
    assert norm.score_ms > 0 and fastv.score_ms > 0 and dense.score_ms == 0


def test_a_downsampled_picture_has_about_as_many_tokens(made: tuple[str, nn.Module]) -> None:
    name, model = made
    case = Case(1, None if "qwen" not in name else (336, 336), 64)
    line = runner.downsampled(model, case, 1 / 4, "1/4")
    assert line.kept == TOKENS[name] // 4
    with line.enter() as running, torch.no_grad():
        held = clocks.kv_bytes(running.cache(running.prefill()))
    dense = bench.dense(model, bench.make_inputs(model, 1, case.size, 64))
    with dense.enter() as running, torch.no_grad():
        full = clocks.kv_bytes(running.cache(running.prefill()))
    newlines = {"tiny-llava-next": 16 + 8}.get(name, 0)
    assert held < full and held >= full * (line.kept + 64 - newlines) / (TOKENS[name] + 64)


def test_the_ideal_is_fed_the_towers_rows(tiny_llava: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bench.make_inputs(tiny_llava, 2)
    seen: list[Any] = []
    hook = tiny_llava.model.language_model.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(kw["inputs_embeds"]), with_kwargs=True
    )
    with bench.ideal(tiny_llava, inputs, 4, "4t").enter() as running, torch.no_grad():
        state = running.prefill()
        running.step(state)
    hook.remove()
    features = tiny_llava.model.get_image_features(inputs["pixel_values"])
    rows = torch.cat(list(getattr(features, "pooler_output", features)))
    assert torch.equal(seen[0][:, :4].reshape(8, -1), rows[:8])
    assert seen[0].shape[1] == 4 + 64 and seen[1].shape[1] == 1
    assert running.cache(state).get_seq_length() == 4 + 64 + 1


def test_several_requests_at_once(tiny_llava: nn.Module) -> None:
    case = Case(1, None, 16)
    lines = report.lines_of(tiny_llava, case, configured("norm"), None)
    rows = [
        row
        for row in runner.measure(
            tiny_llava, "x", case, lines, seconds=0, new_tokens=0, concurrency=(1, 3), min_runs=3, flops=False
        )
    ]
    assert [(r.method, r.concurrency) for r in rows] == [
        *((m, 1) for m in ("dense", "ideal", "norm")),
        *((m, 3) for m in ("dense", "ideal", "norm")),
    ]
    assert all(r.samples_per_s > 0 and r.tpot_ms is None for r in rows)
    assert all(r.runs >= 6 for r in rows[3:]), "each thread sends requests"


def numbers(**given: Any) -> Row:
    base = {f.name: None for f in dataclasses.fields(Row)}
    base |= {
        "model": "m",
        "method": "dense",
        "keep": "1",
        "compile": "",
        "batch": 1,
        "concurrency": 1,
        "text_tokens": 64,
    }
    base |= {"visual_tokens": 100, "kept": 100, "score_ms": 0.0, "pack_ms": 1.0, "device": "cpu", "dtype": "float32"}
    return Row(**base | given)


def test_conclusions_follow_from_the_numbers() -> None:
    dense = numbers(ttft_ms_p50=100.0, vision_ms=19.0, lm_ms_p50=80.0)
    ideal = numbers(method="ideal", keep="1/4", kept=25, ttft_ms_p50=40.0, lm_ms_p50=20.0)
    cheap = numbers(method="norm", keep="1/4", kept=25, ttft_ms_p50=42.0, score_ms=2.0, pack_ms=3.0, lm_ms_p50=20.0)
    dear = replace(cheap, method="zoo", score_ms=78.5)
    rows = [dense, ideal, cheap, dear]
    line = bench.amdahl(rows)
    assert "vision tower takes 19%" in line and "language model 80%" in line and "5.00x" in line
    assert bench.amdahl(rows[1:]) == ""
    # 75 tokens save 60 ms: 0.8 ms each. 4 ms are worth 5 tokens, 80.5 ms 101 (rounded up).
    assert bench.break_even(rows) == [
        "norm keep 1/4: choosing costs 4.00 ms, as much as 5 tokens a sample take; it drops 75, so it pays",
        "zoo keep 1/4: choosing costs 80.50 ms, as much as 101 tokens a sample take; it drops 75, so it does not pay",
    ]
    graphs = [replace(r, compile="graph", lm_ms_p50=r.lm_ms_p50 / 2, pack_ms=r.pack_ms / 2) for r in rows[:3]]
    told = "norm keep 1/4 (graph): choosing costs 3.00 ms, as much as 8 tokens a sample take; it drops 75, so it pays"
    assert bench.break_even([*rows[:3], *graphs])[1:] == bench.break_even(graphs) == [told]
    slow = replace(ideal, lm_ms_p50=81.0)
    assert bench.break_even([dense, slow, cheap]) == ["norm keep 1/4: never pays, fewer tokens take no less time here"]


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine on which a prefill takes 10 ms and one more for each token."""
    tried: list[int] = []

    def timed(model: nn.Module, call: Any, times: clocks.Times, count: int, warm_up: int) -> None:
        with torch.no_grad():
            rows = clocks.kv_bytes(call().past_key_values) // (2 * 4 * 32 * 4) - 64
        tried.append(rows)
        times.runs += [{"ttft": 10.0 + rows}] * count

    monkeypatch.setattr(runner, "timed_runs", timed)
    return tried


def test_the_keep_that_meets_a_target(tiny_llava: nn.Module, linear: list[int]) -> None:
    case, config = Case(), PruneConfig("norm")
    assert runner.keep_for(tiny_llava, case, config, 17.5) == (7, 16, 17.0)
    assert len(linear) <= 8
    assert runner.keep_for(tiny_llava, case, config, 26.0) == (16, 16, 26.0)
    with pytest.raises(ConfigError, match=r"not even one visual token per picture meets 10.5 ms: it takes 11.0 ms"):
        runner.keep_for(tiny_llava, case, config, 10.5)


# -- the command ----------------------------------------------------------------------------------------------------

QUICK = [
    "bench",
    "tiny-llava",
    "--device",
    "cpu",
    "--seconds",
    "0",
    "--new-tokens",
    "1",
    "--method",
    "norm",
    "--keep",
    "1/4",
]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runner.measure, "__kwdefaults__", {**runner.measure.__kwdefaults__, "min_runs": 3})
    yield


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_the_command_writes_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], few: None, suffix: str
) -> None:
    out = tmp_path / f"rows.{suffix}"
    assert cli.main([*QUICK, "--batch", "1", "--batch", "2", "--compile", "graph", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    text = out.read_text()
    rows = json.loads(text) if suffix == "json" else list(csv.DictReader(text.splitlines()))
    assert list(rows[0]) == [f.name for f in dataclasses.fields(Row)]
    expected = [("dense", ""), ("ideal", ""), ("norm", ""), ("dense", "graph"), ("ideal", "graph"), ("norm", "graph")]
    assert [(r["method"], r["compile"]) for r in rows] == expected * 2
    assert [int(r["batch"]) for r in rows] == [1] * 6 + [2] * 6
    assert "norm (graph)" in shown and "Amdahl" in shown
    assert "CUDA graphs need a CUDA device" in shown, "a fallback is told"


def test_the_command_draws(tmp_path: Path, few: None) -> None:
    from PIL import Image

    plot = tmp_path / "plot.png"
    assert cli.main([*QUICK, "--plot", str(plot)]) == 0
    with Image.open(plot) as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(1 << 20)) > 5


def test_the_command_finds_a_keep(capsys: pytest.CaptureFixture[str], linear: list[int]) -> None:
    assert cli.main([*QUICK, "--target-ttft", "17.5ms"]) == 0
    assert "norm, batch 1: keep 7 of 16 visual tokens a picture (--keep 7t): 17.0 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["bench", "no-such-model"], "no model 'no-such-model'"),
        ([*QUICK, "--size", "big"], "height x width"),
        ([*QUICK, "--target-ttft", "fast"], "150ms"),
        ([*QUICK, "--out", "rows.txt"], "name it .csv or .json"),
        ([*QUICK, "--out", "nowhere/rows.csv"], "does not exist"),
        ([*QUICK, "--compile", "max"], "choose None or 'graph'"),
        ([*QUICK, "--dtype", "int8"], "--dtype int8"),
        ([*QUICK, "--method", "nrm"], "nrm"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert reason in err and len(err.strip().splitlines()) == 1


def test_nothing_is_left_on_the_model(tiny_llava: nn.Module) -> None:
    rows_of(tiny_llava, "x", Case(), configured("norm", "fastv"))
    assert vtprune.engine.attach.engine_of(find_family(tiny_llava)) is None
    assert not any(m._forward_pre_hooks for m in find_family(tiny_llava).lm.layers)


def test_decoding_is_timed_at_lengths_that_were_met_before() -> None:
    """A kernel that is planned anew for each length must not make the first line that has it look slow."""
    planned: set[int] = set()

    def step(state: list[int]) -> None:
        state[0] += 1
        if state[0] not in planned:
            planned.add(state[0])
            time.sleep(0.05)

    assert clocks.decode_ms(torch.device("cpu"), lambda: [7], step, 3) < 25
    assert planned == {8, 9, 10, 11}


def test_nobody_collects_while_runs_are_timed_and_all_is_as_it_was_afterwards() -> None:
    was_on = gc.isenabled()
    try:
        for on in (True, False):
            (gc.enable if on else gc.disable)()
            with clocks.no_collection():
                assert not gc.isenabled()
                with clocks.no_collection():
                    pass
                assert not gc.isenabled()  # the inner block undoes nothing of the outer
            assert gc.isenabled() == on
    finally:
        (gc.enable if was_on else gc.disable)()


def test_a_run_holds_nothing_of_the_one_before_and_nobody_looks_at_old_objects() -> None:
    model = bench.build("tiny-llava", torch.device("cpu"))
    alive: list[int] = []
    looked: list[int] = []

    class Left:
        count = 0

        def __init__(self) -> None:
            self.me = self  # a cycle, as outputs and their hooks make them
            Left.count += 1

        def __del__(self) -> None:
            Left.count -= 1

    def run() -> None:
        alive.append(Left.count)
        Left()

    def look(phase: str, info: dict[str, int]) -> None:
        looked.append(info["generation"])

    gc.collect()
    gc.callbacks.append(look)
    try:
        clocks.timed_runs(model, run, clocks.Times(), 4, warm_up=0)
    finally:
        gc.callbacks.remove(look)
    assert alive == [0, 0, 0, 0]
    assert looked and max(looked) < 2

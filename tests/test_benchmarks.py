# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run from end to end at tiny shapes, and their rows are consistent with each other."""

from __future__ import annotations

import csv
import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vtprune
from benchmarks import accuracy, corematching, endtoend, icl, kernels, lens, video
from vtprune.eval import runner
from vtprune.lens import Lens
from vtprune.lens.probe import View
from vtprune.models.pocket import data


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_shots_and_methods_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accuracy.RUNS, "cpu", (1, 0))
    out = tmp_path / "icl.csv"
    assert icl.main(["--smoke", "--out", str(out), "--commit", "abc"]) == 0
    lines = table(out)
    assert [(r["shots"], r["method"]) for r in lines] == [(s, m) for s in "02" for m in ("dense", *icl.METHODS)]
    for row in lines:
        before, after = float(row["tokens_in"]), float(row["tokens_out"])
        assert after == before // 3 if row["method"] != "dense" else after == before
        dense = next(r for r in lines if r["method"] == "dense" and r["shots"] == row["shots"])
        assert float(row["kv_kib"]) <= float(dense["kv_kib"]) and float(row["prefill_ms"]) > 0
        assert float(row["to_dense"]) == pytest.approx(float(row["accuracy"]) - float(dense["accuracy"]), abs=1e-4)
    few, many = (float(next(r for r in lines if r["shots"] == s)["tokens_in"]) for s in "02")
    assert many == 3 * few, "two demonstrations and the query"


def test_corematching_writes_its_three_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accuracy.RUNS, "cpu", (1, 0))
    assert corematching.main(["--smoke", "--out-dir", str(tmp_path), "--commit", "abc"]) == 0
    premise, answers, decode = (
        table(tmp_path / f"corematching-{name}-cpu.csv") for name in ("premise", "answers", "decode")
    )
    for row in premise:
        assert float(row["same_core_all"]) == 1.0 and 0 < float(row["active_in_core_core"]) <= 1
        if row["layer"] == row["matching_layer"]:
            assert float(row["matches_core"]) >= float(row["matches_all"])
    assert [row["variant"] for row in answers][:2] == ["dense", "tokens"]
    assert all(0 < float(row["decode_flops"]) <= 1 and 0 < float(row["prefill_flops"]) <= 1 for row in answers)
    assert all(float(row["largest_error"]) < 1e-5 for row in decode if row["largest_error"])
    assert {row["unit"] for row in decode} == {"us", "ms", "tokens/s"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::vtprune.errors.VTPruneWarning")
def test_every_experiment_of_the_lens_writes_its_table(tmp_path: Path) -> None:
    names = list(lens.EXPERIMENTS)
    assert lens.main([*names, "--questions", "4", "--batch", "4", "--commit", "test", "--out", str(tmp_path)]) == 0
    tables = {}
    for name in names:
        with (tmp_path / f"lens-{name}-pocket-llava-cpu.csv").open(encoding="utf-8") as file:
            tables[name] = list(csv.DictReader(file))
    assert {row["layer"] for row in tables["words"]} == set(map(str, range(7)))
    assert all(
        0 <= float(row["hit"]) <= 1 and row["patches"] == tables["words"][0]["patches"] for row in tables["words"]
    )
    assert {row["class"] for row in tables["shares"]} >= {"dead", "alive"}
    for row in tables["shares"]:
        assert float(row["low"]) <= float(row["share"]) <= float(row["high"])
    drop, control = (
        next(r for r in tables["remove"] if r["removed"] == "dead" and r["what"].startswith(what))
        for what in ("the class", "as many")
    )
    assert float(drop["tokens"]) < 400 and float(control["tokens"]) >= float(drop["tokens"])
    baseline = [r for r in tables["inject"] if (r["way"], r["layer"], r["kind"]) == ("enter before", "0", "all")]
    assert len(baseline) == 1 and float(baseline[0]["accuracy"]) > 0.8 and float(baseline[0]["to_baseline"]) == 0
    assert {r["sublayers"] for r in tables["skip"]} >= {"none", "0", "0.5", "5.5", "attention", "mlp", "both"}
    assert {r["kind"] for r in tables["patches"]} == {"object", "color", "count", "character"}


@pytest.mark.slow
def test_patches_of_objects_say_what_they_are_after_the_last_layer() -> None:
    model, processor = vtprune.load("pocket-llava", device="cpu", dtype=torch.float32)
    rows = lens.words(lens.Bench(model, processor, "pocket-llava", 12, 12))
    last = {row["attribute"]: row for row in rows if (row["layer"], row["top"]) == (6, 5)}
    assert last["shape"]["hit"] > 0.08 and last["shape"]["hit"] > 3 * last["shape"]["chance"]  # 0.13, 0.03
    assert last["color"]["hit"] > 0.08 and last["color"]["hit"] > 1.5 * last["color"]["chance"]  # 0.14, 0.06


def test_a_class_is_compared_with_its_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up answers: without the class 3 of 4 are right, without as many others 2, with as many at random 1."""

    def answered(_bench: lens.Bench, methods: list[str], keep: str) -> list[dict[str, Any]]:
        def right(method: str) -> int:
            return (
                3 if "mode=drop" in method else 2 if "mode=control" in method else 1 if "mode=random" in method else 4
            )

        about = [{"id": str(i), "kind": "count", "tokens_out": 100} for i in range(4)]
        return [{**row, "method": m, "correct": i < right(m)} for m in methods for i, row in enumerate(about)]

    monkeypatch.setattr(lens, "_run", answered)
    rows = list(lens.remove(lens.Bench(*vtprune.load("pocket-llava", device="cpu"), "pocket-llava", 4, 4)))
    own = next(row for row in rows if (row["removed"], row["what"]) == ("dead", "the class"))
    assert (own["to_dense"], own["to_others"], own["to_all"]) == (-0.25, 0.25, 0.5)
    assert own["to_all_low"] <= 0.5 <= own["to_all_high"]
    assert [row["accuracy"] for row in rows if row["removed"] == "dead"] == [0.75, 0.5, 0.25, 1.0]


def test_an_object_owns_the_patches_that_it_covers() -> None:
    shape = data.Shape(cell=8, shape="square", size="large", color="red", rgb=(220, 40, 40))
    scene = data.Scene("x", (shape,), (), ((0.5, 0.5, 0.5),) * 4)
    coords = np.array([(0, r, c) for r in range(24) for c in range(24)], np.float32)
    view = View(0, 0, "image", (24, 24), (0.0, 0.0, 1.0, 1.0), 576)
    seen = Lens((0,), np.zeros((1, 576, 1), int), np.zeros((1, 576, 1), np.float32), coords, (view,))
    owner = lens.owner_of(scene, seen).reshape(24, 24)
    # Cell 8 is row 1, column 2 of 6 x 6: patches 4 to 7 and 8 to 11. The square has 42 of the cell's 56 pixels.
    rows, columns = np.nonzero(owner == 0)
    assert rows.min() == 4 and rows.max() == 7 and columns.min() == 8 and columns.max() == 11
    assert len(rows) in (12, 16) and (owner[5:7, 9:11] == 0).all()


def test_kernels_are_timed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "WARM_UP", 1)
    monkeypatch.setattr(kernels, "MIN_RUNS", 2)
    monkeypatch.setattr(kernels, "MAX_RUNS", 2)
    out = tmp_path / "kernels.csv"
    assert kernels.main(["--tiny", "--ops", "greedy", "--out", str(out), "--commit", "abc"]) == 0
    with out.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    ops = {line["op"] for line in lines}
    assert ops == {f"greedy {name}" for name in ("mmr", "max-min", "sads", "coverage", "dpp")}
    single = {(line["op"], line["what"]) for line in lines if "x2" not in line["shape"]}
    assert single >= {(op, what) for op in ops for what in ("ours", "naive", "floor")}
    assert all(0 < float(line["median_ms"]) <= float(line["p90_ms"]) and line["commit"] == "abc" for line in lines)
    assert out.with_suffix(".png").stat().st_size > 1000


def test_the_usual_loops_pick_what_the_ops_pick() -> None:
    from benchmarks import kernels_greedy

    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(30, 16, generator=generator), torch.rand(30, generator=generator)
    for name, (op, naive) in kernels_greedy.OPS.items():
        assert naive(x, w, 9).tolist() == op(x, w, (30,), (9,)).order.tolist(), name


def test_a_kernel_that_fails_costs_only_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(device: torch.device) -> kernels.Work:
        raise RuntimeError("no such shape")

    def half(device: torch.device) -> kernels.Work:
        return kernels.Work(lambda: torch.ones(2), naive=lambda: 1 / 0)

    monkeypatch.setattr(kernels, "CASES", ())
    entries = [kernels.Entry("a", "1", broken, tiny=True), kernels.Entry("b", "2", half, 0.5, tiny=True)]
    monkeypatch.setattr(kernels, "ENTRIES", entries)
    out = tmp_path / "kernels.csv"
    assert kernels.main(["--tiny", "--out", str(out)]) == 1
    with out.open(encoding="utf-8") as file:
        assert [(line["op"], line["what"], line["target_ms"]) for line in csv.DictReader(file)] == [
            ("b", "ours", "0.5")
        ]
    assert "no such shape" in capsys.readouterr().err


def test_the_other_ops_are_timed_and_do_what_the_usual_code_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "WARM_UP", 1)
    monkeypatch.setattr(kernels, "MIN_RUNS", 2)
    monkeypatch.setattr(kernels, "MAX_RUNS", 2)
    from benchmarks import kernels_ops  # noqa: F401 (registers)

    tiny = {entry.op: entry for entry in kernels.ENTRIES if entry.tiny and not entry.op.startswith("greedy")}
    ops = {"sensitivity fd", "sensitivity jvp", "sensitivity frobenius", "lens top-3", "lens rank of 3", "pack"}
    ops |= {"attention CLS", "attention text rows", "neurons top-rho counts", "neurons match", "neurons sparse FFN"}
    ops |= {"attention CLS logits", "topk"}
    assert set(tiny) == ops
    for prefix in ("sensitivity", "lens", "pack", "attention", "topk", "neurons"):
        out = tmp_path / f"{prefix}.csv"
        assert kernels.main(["--tiny", "--ops", prefix, "--out", str(out), "--commit", "abc"]) == 0
        with out.open(encoding="utf-8") as file:
            assert {line["op"] for line in csv.DictReader(file)} == {op for op in ops if op.startswith(prefix)}
    work = {op: entry.make(torch.device("cpu")) for op, entry in tiny.items()}
    found = {op: (w.ours(), w.naive()) for op, w in work.items() if w.naive is not None}
    packed, usual = found["pack"]
    for a, b in zip((packed.hidden, *packed.features, packed.positions, packed.mask), usual, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(*(x.long() for x in found["neurons match"]))
    picks, usual = found["topk"]
    assert torch.equal(picks.index.view(usual.shape) - 9 * torch.arange(len(usual))[:, None], usual)
    assert torch.equal(found["lens top-3"][0][1][:, 0], found["lens top-3"][1].indices[:, 0])
    for op, within in (
        ("attention CLS", 1e-2),
        ("attention CLS logits", 1e-2),
        ("attention text rows", 1e-2),
        ("sensitivity frobenius", 5e-2),
    ):
        ours, naive = (x.float().squeeze(1) if x.ndim == 3 else x.float() for x in found[op])
        torch.testing.assert_close(ours, naive, rtol=within, atol=within)


# -- endtoend.py ------------------------------------------------------------------------------------------------------


def test_endtoend_keeps_rows_of_other_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endtoend.runner, "MAX_RUNS", 3)
    few = {
        name: replace(endtoend.PRESETS[name], min_runs=3, turns=3) for name in ("llava-batch", "globalcom2", "variants")
    }
    monkeypatch.setattr(endtoend, "PRESETS", endtoend.PRESETS | few)
    run = ["--tiny", "--out", str(tmp_path), "--commit", "abc", "--only"]
    before = set(vtprune.methods())
    assert endtoend.main([*run, "globalcom2", "variants"]) == 0
    assert endtoend.main([*run, "llava-batch"]) == 0
    assert set(vtprune.methods()) == before
    lines, found = table(tmp_path / "endtoend-cpu.csv"), table(tmp_path / "endtoend-targets-cpu.csv")
    kinds = ["dense", "ideal", *endtoend.HELD_TO]
    assert [r["method"] for r in lines if r["preset"] == "llava-batch"] == kinds
    assert [r["method"] for r in lines if r["preset"] == "globalcom2"] == ["dense", "ideal", "globalcom2"]
    assert [r["method"] for r in lines if r["preset"] == "variants"] == [
        f"grid, graph {how}" for how in ("as it is", "fused", "fused, tuned")
    ]
    assert {r["commit"] for r in lines} == {"abc"}
    assert [*dict.fromkeys(r["preset"] for r in lines)] == ["llava-batch", "variants", "globalcom2"]
    exact = [t for t in found if t["what"].startswith("KV bytes")]
    assert len(exact) == len(endtoend.HELD_TO) and all(t["met"] == "True" for t in exact)


def test_endtoend_puts_compared_lines_in_the_place_of_their_old_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endtoend.runner, "MAX_RUNS", 3)
    few = replace(endtoend.PRESETS["llava-batch"], min_runs=3, turns=3, neighbours=("fastv",), graphs=True)
    monkeypatch.setattr(endtoend, "PRESETS", endtoend.PRESETS | {"llava-batch": few})
    run = ["--tiny", "--out", str(tmp_path), "--only", "llava-batch", "--commit"]
    files = [tmp_path / "endtoend-cpu.csv", tmp_path / "endtoend-targets-cpu.csv"]
    assert endtoend.main([*run, "old"]) == 0
    before = [table(file) for file in files]
    assert endtoend.main([*run, "new", "--compared"]) == 0
    after = [table(file) for file in files]
    kinds = ["dense", "ideal", *endtoend.HELD_TO]
    lines = [(r["method"], r["compile"], r["commit"]) for r in after[0]]
    eager = [*((kind, "", "new") for kind in kinds), ("fastv", "", "old")]
    assert lines == [*eager, *((kind, "graph", "new") for kind in kinds)]
    assert [r["what"] for r in after[1]] == [r["what"] for r in before[1]]
    assert after[0][len(kinds)] == before[0][len(kinds)]
    with pytest.raises(SystemExit):
        endtoend.main(["--tiny"])


def test_fastv_by_its_map_keeps_what_fastv_keeps() -> None:
    model = endtoend.bench.build("tiny-llava", torch.device("cpu"))
    inputs = endtoend.bench.make_inputs(model)
    with torch.no_grad(), endtoend.registered():
        with vtprune.apply(model, "fastv", keep=1 / 2) as handle:
            expected = model(**inputs).logits
            kept = handle.report().images[0].segments[0].kept
        line = endtoend.map_fastv(model, inputs, 1 / 2, "1/2")
        with line.enter() as running:
            found = running.prefill().logits
            assert (running.report().images[0].segments[0].kept == kept).all()
    assert torch.allclose(found[:, -1], expected[:, -1], atol=1e-5)
    assert model.model.language_model.layers[endtoend.LAYER].self_attn.config._attn_implementation == "sdpa"


def test_the_naive_loop_keeps_what_divprune_keeps() -> None:
    model = endtoend.bench.build("tiny-llava-next", torch.device("cpu"))
    inputs = endtoend.bench.make_inputs(model)
    kept = []
    with torch.no_grad(), endtoend.registered():
        for method in ("divprune", "naive-divprune"):
            with vtprune.apply(model, method, keep=1 / 4) as handle:
                model(**inputs)
                kept.append(np.concatenate([s.kept for s in handle.report().images[0].segments]))
    assert (kept[0] == kept[1]).mean() > 0.9, "ties of rounding aside"


def test_targets_are_read_off_the_rows() -> None:
    def row(method: str, lm: float, ttft: float, compile: str = "", **more: Any) -> Any:
        base = dict.fromkeys(f.name for f in dataclasses.fields(endtoend.Row))
        base |= {
            "method": method,
            "compile": compile,
            "keep": "1" if method == "dense" else "1/9",
            "visual_tokens": 576,
        }
        base |= {"kept": 576 if method == "dense" else 64, "text_tokens": 64, "lm_ms_p50": lm, "ttft_ms_p50": ttft}
        return endtoend.Row(**base | more)

    rows = [
        row("dense", 27.0, 35.0, peak_mib=100.0, kv_bytes=6400),
        row("ideal", 20.0, 28.0, peak_mib=90.0),
        row("grid", 20.0, 29.0, peak_mib=101.0, kv_bytes=1281),
        row("dense", 16.0, 20.0, "graph"),
        row("ideal", 6.0, 10.0, "graph"),
        row("grid", 6.5, 10.6, "graph", kv_bytes=1280),
    ]
    found = {t.what: t for t in endtoend.targets("llava", rows)}
    assert found["LM prefill, ms"].met and found["LM prefill, ms"].value == 6.5
    assert found["LM prefill, eager dense over graph pruned"].met
    assert found["LM prefill, dense with graphs over pruned with graphs"].value == pytest.approx(16 / 6.5)
    assert found["TTFT of grid over ideal"].met and not found["TTFT of grid, graph over ideal"].met
    assert not found["peak memory of grid over dense"].met
    assert (
        not found["KV bytes of grid beyond their share"].met and found["KV bytes of grid, graph beyond their share"].met
    )


def test_the_video_table_is_that_of_accuracy_with_its_own_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(accuracy, "main", lambda arguments: told.append(arguments) or 0)
    assert video.main(["--questions", "7"]) == 0
    (arguments,) = told
    assert arguments[:4] == ["--model", "pocket-qwen2.5-vl", "--task", "pocketvqa/video"]
    assert arguments[-2:] == ["--questions", "7"], "what the user gives comes last, and wins"
    assert {"frames", "evs", "vidcom2"} < set(video.METHODS) < set(arguments)
    assert len(runner.combinations(video.METHODS, ["1/4", "1/9"])) == 2 * len(video.METHODS)


def test_encoders_train_and_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import encoders
    from vtprune.models.pocket import easyvqa

    said = [
        [("what is the shape ?", "circle"), ("what color is the shape ?", "teal"), ("is there a red shape ?", "no")],
        [("is there a triangle ?", "yes"), ("is there not a blue shape ?", "yes"), ("is there a gray shape ?", "yes")],
        [("is there a circle ?", "no"), ("what color is the shape ?", "red")],  # its shape is not told
        [("is no rectangle present ?", "yes"), ("what is the shape ?", "triangle"), ("is it yellow ?", "yes")],
    ]
    pixels = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    questions = tuple((picture, *one) for picture in range(40) for one in said[picture % 4])
    monkeypatch.setattr(easyvqa, "load", lambda split: easyvqa.EasyVQA(pixels, questions))
    pictures, classes = encoders.data("train", 16)
    assert pictures.shape == (30, 3, 16, 16)
    names = [(easyvqa.ANSWERS[2 + c // 8], easyvqa.ANSWERS[5 + c % 8]) for c in classes[:3].tolist()]
    assert names == [("circle", "teal"), ("triangle", "gray"), ("triangle", "yellow")]

    weights, out = tmp_path / "vit.safetensors", tmp_path / "encoders.csv"
    tiny = ["--side", "16", "--width", "32", "--depth", "3", "--batch", "10", "--epochs", "1", "--turns", "1"]
    assert encoders.main([*tiny, "--weights", str(weights), "--out", str(out)]) == 0 and weights.exists()
    rows = table(out)
    assert {row["method"] for row in rows} == {"plain", "plain, smaller picture", *encoders.METHODS}
    pruned = [row for row in rows if not row["method"].startswith("plain") and row["keep"] != "1.0"]
    assert {(row["keep"], row["kept"]) for row in pruned} == {("0.5", "8"), ("0.25", "4"), ("0.1", "1")}
    assert all(float(row["mflop"]) < float(rows[0]["mflop"]) for row in pruned)
    assert rows[0]["accuracy"] == rows[1]["accuracy"], "hooks that have nothing to do changed an answer"

# SPDX-License-Identifier: Apache-2.0
"""The tables of the neighbouring methods: who stands in them, and that something costs what they say it does."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import vtprune
from benchmarks import neighbours, reversible
from benchmarks.side_by_side import loaded
from vtprune.eval import controls, runner, tasks
from vtprune.models import find_family


@torch.no_grad()
def test_work_is_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reversible, "PRICED", 1)
    model, processor = loaded(reversible.MODEL)
    family = find_family(model)
    example = next(tasks.get("pocketvqa/basic").examples("test", 1, 0))
    inputs = controls.prepare(family, processor, [example])
    prompt, config = reversible.prompts_of(reversible.MODEL, "basic")[0], model.config.text_config
    with runner.encode_once(model):
        for method in (*reversible.REVERSIBLE, *reversible.FOR_GOOD):
            told = runner.Method.parse(method)
            with runner.presented(family, processor, [example], inputs, told, "1/3") as (given, _):
                model(**given, logits_to_keep=1)
                report = vtprune.report(model)
            found = reversible.share(method, "1/3", [prompt], config)
            assert found.overall == pytest.approx(report.flops_after / report.flops_before, rel=1e-9), method
            assert found.attention < found.overall < 1


def test_budgets_are_matched_to_the_nearest_thousandth() -> None:
    config = loaded(reversible.MODEL)[0].config.text_config
    prompts = [reversible.Prompt(740, (144,) * 5), reversible.Prompt(700, (144,) * 4)]
    for kind in reversible.KINDS:
        target = reversible.share("tokensparse", "1/4", prompts, config)
        for method in reversible.FOR_GOOD:
            keep = reversible.matching(method, kind, target, prompts, config)
            off = abs(getattr(reversible.share(method, keep, prompts, config), kind) - getattr(target, kind))
            assert off < 0.01, (method, kind, keep)
    assert reversible.matching("fastv", "overall", reversible.Work(0.0, 0.0), prompts, config) == "0.001"


def test_a_table_has_chance_the_six_and_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "SIX", ("idpruner", "embedlens"))  # two of them do for a test
    monkeypatch.setattr(neighbours, "PRICED", 1)
    given = ["--worlds", "basic", "--keep", "1/9", "--questions", "2", "--methods", "spatten"]
    folders = ["--out", str(tmp_path), "--rows", str(tmp_path / "rows"), "--commit", "abc"]
    assert neighbours.main([*given, *folders]) == 0
    with (tmp_path / "neighbours-pocket-llava-cpu.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["dense", "random", *neighbours.SIX, "spatten"]
    six = {row["method"]: float(row["accuracy"]) for row in rows if row["method"] in neighbours.SIX}
    for row in rows[1:]:
        assert row["tokens"] == "64" and 0 < float(row["flops"]) < 1
        assert six[row["best"]] == max(six.values())
        gain = float(row["accuracy"]) - six[row["best"]]
        assert float(row["minus_best"]) == pytest.approx(gain, abs=1e-3)
        assert float(row["minus_best_low"]) <= gain + 1e-3 and gain - 1e-3 <= float(row["minus_best_high"])


def test_what_an_earlier_run_answered_is_in_no_table_that_does_not_ask_for_it() -> None:
    columns = [("dense", "1"), ("random", "1/9"), ("idpruner", "1/9"), ("spatten", "1/9")]
    answers = argparse.Namespace(
        combinations=columns,
        correct=np.eye(4, dtype=bool),
        kinds=["color"] * 4,
        tokens=[64.0] * 4,
        header=dict.fromkeys(("device", "torch", "transformers", "commit"), "x"),
    )
    rows = neighbours.table(answers, "pocket-llava", "basic", dict.fromkeys(columns[:3], 0.5))
    assert [(row["method"], row["best"]) for row in rows[1:]] == [("random", "idpruner"), ("idpruner", "idpruner")]


def test_rows_of_methods_that_prune_for_good_name_what_they_are_equal_to(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [reversible.Prompt(740, (144,) * 5)]
    monkeypatch.setattr(reversible, "prompts_of", lambda *_: prompts)
    folder = Path("unused")
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    given = argparse.Namespace(keep=["1/2"], questions=4, commit="abc", rows=folder)
    jobs, rows = reversible.plan(given, "icl")
    assert len(rows) == 1 + len(reversible.REVERSIBLE) * (1 + len(reversible.FOR_GOOD) * len(reversible.KINDS))
    columns = [(method, keep) for job in jobs for method in job["methods"] for keep in job["keeps"]]
    assert {(row["method"], row["keep"]) for row in rows if row["method"] != "dense"} <= set(columns)

    combinations = [("dense", "1"), *(c for c in columns if c[0] != "dense")]
    correct = np.random.default_rng(0).random((8, len(combinations))) < 0.5
    answers = argparse.Namespace(
        combinations=combinations,
        correct=correct,
        kinds=["icl"] * 8,
        tokens=[0.0] * len(combinations),
        header=dict.fromkeys(("device", "torch", "transformers", "commit"), "x"),
    )
    for line in reversible.table(answers, "icl", rows):
        if line["equal"]:
            method, _, keep = line["to"].rpartition(" at ")
            at = [combinations.index(c) for c in ((method, keep), (line["method"], line["keep"]))]
            gain = correct[:, at[0]].mean() - correct[:, at[1]].mean()
            assert line["reversible_minus_this"] == pytest.approx(gain, abs=1e-3)
        else:
            assert line["reversible_minus_this"] == ""

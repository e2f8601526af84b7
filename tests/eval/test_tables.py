# SPDX-License-Identifier: Apache-2.0
"""The tables of all methods and of the papers' questions, from answers that are made up here."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from benchmarks import papers, scorer, tables
from benchmarks.side_by_side import side_by_side
from vtprune.eval import runner
from vtprune.pruners.scorer import Scorer

#: Chance of a right answer under each method.
SKILL = {"dense": 0.95, "blank": 0.1, "question-only": 0.1, "downsample": 0.3, "random": 0.4, "worst of=norm": 0.05}


def made_up(
    model: str, world: str, seed: int, count: int, methods: list[str], keeps: list[str], folder: Path, **_: Any
) -> float:
    """What `tables.answer` would have written, without a model."""
    task = world if world == "easy-vqa" else f"pocketvqa/{world}"
    header = {"type": "run", "model": model, "device": "NVIDIA H100 80GB HBM3", "torch": "2", "transformers": "5"}
    lines = [header | {"commit": "abc"}]
    chance = random.Random(f"{world}/{seed}")
    for method, keep in runner.combinations(methods, keeps):
        for i in range(count):
            row = {"type": "answer", "task": task, "method": method.label, "keep": keep, "kind": f"kind {i % 2}"}
            row |= {
                "id": f"{task}/{seed}/{i}",
                "tokens_out": 64,
                "correct": chance.random() < SKILL.get(method.label, 0.8),
            }
            lines.append(row)
    path = tables.rows_file({"model": model, "world": world, "seed": seed, "folder": folder})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0.0


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "answer", made_up)
    given = ["--questions", "96", "--keep", "1/9", "1/18", "--workers", "1", "--commit", "abc", "--methods", "random"]
    given += ["grid", "norm", "divprune", "hiprune", "idpruner", "--models", "pocket-llava", "pocket-llava-next"]
    given += ["--rows", str(tmp_path / "rows"), "--out", str(tmp_path), "--page", str(tmp_path / "results.md")]
    assert tables.main(given) == 0
    rows = read(tmp_path / "tables-nvidia-h100-80gb-hbm3.csv")
    combinations = 3 + 2 * (1 + 6 + 3)  # three controls without a budget; downsample, methods, three worst ends
    kinds, worlds = 3, len(tables.worlds("pocket-llava")) + len(tables.worlds("pocket-llava-next"))
    assert len(rows) == combinations * kinds * worlds
    assert {row["n"] for row in rows if row["kind"] == "mean"} == {"96"}
    assert {row["n"] for row in rows if row["kind"] == "kind 0"} == {"48"}
    assert {(row["gpu"], row["commit"]) for row in rows} == {("NVIDIA H100 80GB HBM3", "abc")}
    for row in rows:
        low, value, high = (float(row[key]) for key in ("low", "accuracy", "high"))
        assert low <= value <= high and abs(value - SKILL.get(row["method"], 0.8)) < 0.25
        assert float(row["minus_dense"]) == pytest.approx(value - _dense(rows, row), abs=2e-4)
    pairs = read(tmp_path / "tables-pairs-nvidia-h100-80gb-hbm3.csv")
    assert {tables.verdict(row) for row in pairs if (row["first"], row["second"]) == ("norm", "random")} == {"shows"}
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "## pocket-llava-next" in page and "`hiprune object_layer=2`" in page
    assert "That `idpruner` beats `divprune` (arXiv 2602.13315) does not show" in page
    assert "pocket-llava, `grid`" not in page.split("## Against what costs nothing")[1]
    assert "All of them lose" not in page  # worst of=divprune and of=idpruner are made up to be good
    assert "pocket-llava, `divprune` at 1/9: its worst tokens are not worse than random ones." in page
    assert "`norm` at 1/9: its worst" not in page


def _dense(rows: list[dict[str, str]], like: dict[str, str]) -> float:
    same = ("model", "world", "kind")
    return next(float(r["accuracy"]) for r in rows if r["method"] == "dense" and all(r[k] == like[k] for k in same))


def test_a_world_that_is_not_finished_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails_on_hires(**job: Any) -> float:
        if job["world"] == "hires" and job["seed"] == 1:
            raise RuntimeError("out of memory")
        return made_up(**job)

    monkeypatch.setattr(tables, "answer", fails_on_hires)
    given = ["--questions", "60", "--keep", "1/9", "--workers", "1", "--methods", "random", "norm", "--commit", "abc"]
    given += ["--models", "pocket-llava-next", "--rows", str(tmp_path / "rows"), "--out", str(tmp_path)]
    assert tables.main([*given, "--page", str(tmp_path / "results.md")]) == 1
    assert "out of memory" in capsys.readouterr().out
    rows = read(tmp_path / "tables-nvidia-h100-80gb-hbm3.csv")
    assert {row["world"] for row in rows} == {"basic", "extended"}


def test_a_run_that_went_on_with_other_code_says_so(tmp_path: Path) -> None:
    job = {"model": "pocket-llava", "world": "basic", "count": 4, "methods": ["dense", "random", "grid"]}
    jobs = [{**job, "seed": seed, "keeps": ["1/9"], "folder": tmp_path} for seed in range(3)]
    for one in jobs:
        made_up(**one)
    last = tables.rows_file(jobs[2])
    last.write_text(last.read_text().replace('"abc"', '"def"'))
    answers = tables.Answers([tables.rows_file(one) for one in jobs])
    found = {"pocket-llava": {"basic": answers}}
    for rows in (tables.table(found), tables.pairs(found)):
        assert {row["commit"] for row in rows} == {"abc + def"}
    assert tables.about(answers.header)["gpu"] == "NVIDIA H100 80GB HBM3"


def test_every_question_is_asked_once_and_a_batch_fits_on_the_gpu() -> None:
    class Given:
        models, questions, keep, methods, commit, rows = list(tables.EXAMS), 300, ["1/9"], ["norm"], "abc", Path("x")

    jobs = tables.jobs(Given)  # type: ignore[arg-type]
    assert len({tables.rows_file(job) for job in jobs}) == len(jobs)
    for model in tables.EXAMS:
        for world in tables.worlds(model):
            mine = [job for job in jobs if (job["model"], job["world"]) == (model, world)]
            assert sum(job["count"] for job in mine) == 300
            most = tables.TOKENS.get((model, world), 576)
            assert all(job["batch"] * most <= tables.TOGETHER and job["batch"] <= tables.BATCH for job in mine)


def _double(number: int) -> int:
    if number == 2:
        raise RuntimeError("two")
    return 2 * number


@pytest.mark.parametrize("workers", [1, 2])
def test_side_by_side(workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [{"number": number} for number in range(4)]
    found = {job["number"]: out for job, out in side_by_side(_double, jobs, workers, 60)}
    assert found == {0: 0, 1: 2, 3: 6} and "two" in capsys.readouterr().out
    assert not list(side_by_side(_double, jobs, workers, -1))


def test_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(**job: Any) -> float:
        if job["what"] == "answers":
            return made_up(**{**job, "folder": Path(job["folder"]) / job["part"]})
        about = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2", "transformers": "5", "commit": "abc"}
        named = {"model": job["model"], "world": job["world"]}
        if job["what"] == "balance":
            every = [(m, k) for m in (*papers.BESIDE, *papers.SWEEP) for k in papers.LAMBDA_KEEPS]
            made = [{"method": m, "keep": k, "importance": 0.5, "diversity": 0.5} for m, k in every]
        else:
            asked = [("m", m, "1024 others") for m in papers.DIRECTIONS]
            asked += [("h, fd", h, "jvp") for h in papers.STEPS] + [("h, fd_fused", h, "jvp") for h in papers.STEPS]
            asked += [("estimator", "frobenius", "fd"), ("estimator", "norm of the token", "fd")]
            shown = {"spearman": 0.5, "low": 0.4, "high": 0.6, "pictures": 2}
            made = [{"quantity": q, "value": v, "against": a, **shown} for q, v, a in asked]
        papers.write(papers.made_file(job), [{**named, **row, **about} for row in made])
        return 0.0

    monkeypatch.setattr(papers, "work", work)
    for pictures, many in ((1, 16), (30, 16), (99, 1024)):  # other runs into this folder
        for model, world in papers.RANKED:
            job = {"what": "ranks", "model": model, "world": world, "pictures": pictures, "many": many}
            papers.write(papers.made_file({**job, "folder": tmp_path / "rows"}), [{"spearman": "stale"}])
        for world in papers.LAMBDA_WORLDS:
            if pictures != 30:
                job = {"what": "balance", "model": papers.LAMBDA_MODEL, "world": world, "pictures": pictures}
                papers.write(papers.made_file({**job, "folder": tmp_path / "rows"}), [{"method": "stale", "keep": ""}])
    given = ["--questions", "24", "--workers", "1", "--commit", "abc", "--rows", str(tmp_path / "rows")]
    assert papers.main([*given, "--out", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 0
    page = (tmp_path / "docs" / "papers.md").read_text(encoding="utf-8")
    assert "- basic at 1/9: best at lambda" in page
    assert "agrees with `fd` to 0.500" in page and "is not the norm in disguise" in page
    assert "`norm allocation=globalcom2` against `norm allocation=equal`" in page
    (path,) = tmp_path.glob("globalcom2-allocation-*.csv")
    rows = {(row["method"], row["keep"]): row for row in read(path)}
    shared = rows["idpruner allocation=globalcom2", "1/9"]
    assert shared["against"] == "idpruner allocation=equal"
    whole = float(rows["idpruner allocation=equal", "1/9"]["accuracy"])
    assert float(shared["difference"]) == pytest.approx(float(shared["accuracy"]) - whole, abs=2e-4)
    assert rows[papers.PARTS[0], "1/9"]["against"] == "globalcom2 allocation=globalcom2"
    assert rows["idpruner allocation=equal", "1/9"]["against"] == ""


def test_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(Scorer(8).state_dict(), tmp_path / "own.safetensors")
    asked: list[tuple[str, int]] = []
    trained = f"idpruner importance=scorer scorer={tmp_path / 'own.safetensors'}"

    def fake(**job: Any) -> float:
        asked.append((job["world"], job["count"]))
        return made_up(**job)

    monkeypatch.setattr(scorer, "answer", fake)
    monkeypatch.setitem(SKILL, trained, 0.99)
    monkeypatch.setitem(SKILL, "idpruner", 0.5)
    given = ["--scorer", str(tmp_path / "own.safetensors"), "--questions", "240", "--workers", "1", "--commit", "abc"]
    assert scorer.main([*given, "--rows", str(tmp_path / "rows"), "--out", str(tmp_path)]) == 0
    assert sorted(asked) == sorted([(w, n) for w in ("basic", "extended") for n in (96, 96, 48)] + [("easy-vqa", 240)])
    (path,) = tmp_path.glob("scorer-*.csv")
    rows = {(row["world"], row["method"], row["keep"]): row for row in read(path)}
    assert len(rows) == 3 * (1 + 2 * 3) and str(tmp_path) not in path.read_text()
    for world in scorer.WORLDS:
        for keep in scorer.KEEPS:
            row = rows[world, "idpruner importance=scorer scorer=own.safetensors", keep]
            free = rows[world, "idpruner", keep]
            assert row["against"] == "idpruner" and row["n"] == "240" and float(row["difference_low"]) > 0
            gain = float(row["accuracy"]) - float(free["accuracy"])
            assert float(row["difference"]) == pytest.approx(gain, abs=2e-4)
            assert free["against"] == ""


def test_scorer_says_when_it_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "answer", lambda **job: _double(2))
    given = ["--questions", "24", "--workers", "1", "--commit", "abc", "--rows", str(tmp_path / "rows")]
    assert scorer.main([*given, "--out", str(tmp_path)]) == 1 and not list(tmp_path.glob("*.csv"))


def test_the_importance_and_diversity_of_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    import vtprune
    from tests.helpers import make_tokens

    monkeypatch.setattr(papers, "BESIDE", ("norm",))
    monkeypatch.setattr(papers, "SWEEP", ())
    monkeypatch.setattr(papers, "LAMBDA_KEEPS", ("2t",))
    rows = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    monkeypatch.setattr(papers.sources, "auto", lambda tokens: (tokens.features.norm(dim=1), "norm"))
    (row,) = papers.balance([make_tokens([[[(1, 3)]]], features=rows)])
    assert vtprune.select(make_tokens([[[(1, 3)]]], features=rows), "norm", keep=2).index.tolist() == [0, 1]
    assert row["importance"] == pytest.approx(np.mean([1.0, 0.5]), abs=1e-3) and row["diversity"] == 1.0

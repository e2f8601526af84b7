# SPDX-License-Identifier: Apache-2.0
"""What methods are worth beside one another, and the papers' questions, from answers that are made up here."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from benchmarks import answers, claims, papers, scorer
from benchmarks.side_by_side import side_by_side
from vtprune.eval import runner
from vtprune.eval.board import Answers
from vtprune.pruners.scorer import Scorer

#: Chance of a right answer under each method.
SKILL = {"dense": 0.95, "blank": 0.1, "question-only": 0.1, "downsample": 0.3, "random": 0.4, "worst of=norm": 0.05}


def made_up(
    model: str, world: str, seed: int, count: int, methods: list[str], keeps: list[str], folder: Path, **_: Any
) -> float:
    """What `answers.answer` would have written, without a model."""
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
    path = answers.rows_file({"model": model, "world": world, "seed": seed, "folder": folder})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0.0


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def found(skill: dict[str, float], keeps: tuple[str, ...] = ("1/4", "1/9"), count: int = 240) -> Answers:
    """Answers to one task in which each method is right as often as its skill says, a little less with fewer tokens."""
    chance = np.random.default_rng(0)
    names = [("dense", "1"), *((name, keep) for name in skill for keep in keeps)]
    worth = [0.95, *(skill[name] - 0.02 * at for name in skill for at in range(len(keeps)))]
    scores = (chance.random((count, 1)) < np.array(worth)).astype(float)  # what a weak one can answer, a strong one can
    none = [0.0] * len(names)
    kinds = [f"kind {i % 2}" for i in range(count)]
    return Answers([str(i) for i in range(count)], kinds, names, scores, none, none, [0] * len(names), [], [])


def test_claims_are_judged_by_paired_intervals() -> None:
    skill = {"random": 0.4, "grid": 0.4, "pool": 0.4, "downsample": 0.3, "norm": 0.9, "divprune": 0.6, "idpruner": 0.8}
    skill |= {"scope": 0.9, "fastv": 0.4, "worst of=norm": 0.05, "worst of=divprune": 0.7}
    tasks = {"one": found(skill), "two": found(skill)}
    rows = list(claims.pairs({"pocket-llava": tasks, "pocket-llava-next": {"one": found({**skill, "idpruner": 0.3})}}))
    by = {(row["model"], row["method"], row["than"], row["keep"]): row for row in rows}
    assert len(by) == len(rows) and {row["n"] for row in rows if row["model"] == "pocket-llava"} == {480}
    for row in rows:
        assert row["low"] <= row["difference"] <= row["high"]
    assert claims.verdict(by["pocket-llava", "idpruner", "divprune", "1/4"]) == "shows"
    assert claims.verdict(by["pocket-llava", "idpruner", "scope", "1/9"]) == "reversed"
    assert by["pocket-llava", "idpruner", "divprune", "1/9"]["difference"] == pytest.approx(0.2, abs=0.06)
    text = claims.sections(rows)
    assert "Does not show anywhere: `idpruner` above `scope`." in text
    assert "the opposite in others: `idpruner` above `divprune`." in text
    cheap = text.split("## Against what costs nothing")[1].split("## The worst end")[0]
    assert (
        "- pocket-llava, `fastv`: not better than `random` (1/4, 1/9), `grid` (1/4, 1/9), `pool` (1/4, 1/9)." in cheap
    )
    assert "`norm`" not in cheap and "worst" not in cheap
    worst = text.split("## The worst end")[1].splitlines()
    assert next(line for line in worst if line.startswith("| `norm`")).count("**+") == 4
    assert next(line for line in worst if line.startswith("| `divprune`")).count("~~-") == 4
    assert not any(line.startswith("| `zoo`") for line in worst)


def test_a_run_that_went_on_with_other_code_says_so(tmp_path: Path) -> None:
    job = {"model": "pocket-llava", "world": "basic", "count": 4, "methods": ["dense", "random", "grid"]}
    jobs = [{**job, "seed": seed, "keeps": ["1/9"], "folder": tmp_path} for seed in range(3)]
    for one in jobs:
        made_up(**one)
    last = answers.rows_file(jobs[2])
    last.write_text(last.read_text().replace('"abc"', '"def"'))
    whole = answers.Answers([answers.rows_file(one) for one in jobs])
    assert answers.about(whole.header) == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "torch": "2",
        "transformers": "5",
        "commit": "abc + def",
    }
    assert whole.correct.shape == (12, 3)


def test_a_batch_fits_on_the_gpu() -> None:
    for (model, world), most in answers.TOKENS.items():
        batch = answers.batch_of(model, world)
        assert 0 < batch <= answers.BATCH and batch * most <= answers.TOGETHER and batch % 12 == 0
    assert answers.batch_of("pocket-llava", "basic") == answers.BATCH


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

# SPDX-License-Identifier: Apache-2.0
"""Boards of made-up answers: tables by hand, merging, comparing, advice, claims, page and picture."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtprune import cli
from vtprune.errors import ConfigError, InputError
from vtprune.eval import board, page, papers

HEADER = {
    **{"type": "run", "model": "m", "weights_sha256": "0", "dtype": "float32", "device": "cpu", "vtprune": "0"},
    **{"torch": "0", "transformers": "0", "python": "0", "commit": "c", "batch": 1, "split": "test", "seed": 0},
    **{"methods": [], "keeps": []},
}
#: Right and wrong by question; kinds a and b take turns.
RIGHT = {
    ("dense", "1"): "1111" * 25,
    ("downsample", "1/2"): "1010" * 25,
    ("norm", "1/2"): "1111" * 24 + "1110",
    ("norm", "1/4"): "1110" * 25,
    ("good", "1/2"): "1111" * 25,
    ("good", "1/4"): "1111" * 25,
}
TOKENS = {"1": 100, "1/2": 50, "1/4": 25}


def rows(right: dict[tuple[str, str], str], task: str = "t", **more: Any) -> list[dict[str, Any]]:
    return [
        {
            **{"type": "answer", "task": task, "method": method, "options": {}, "keep": keep, "id": f"{task}/{i}"},
            **{"kind": "ab"[i % 2], "answer": "yes" if i % 3 else "no", "correct": letter == "1"},
            **{"prediction": ("yes" if i % 3 else "no") if letter == "1" else "", "score": float(letter == "1")},
            **{"metric": "exact", "tokens_in": 100, "tokens_out": TOKENS[keep], **more},
        }
        for (method, keep), letters in right.items()
        for i, letter in enumerate(letters)
    ]


def make(folder: Path, right: dict[tuple[str, str], str] = RIGHT, task: str = "t", **header: Any) -> Path:
    own = {**HEADER, "tasks": [{"task": task}], **header}
    file = folder / "answers" / own["model"] / f"{task}.0-1.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in [own, *rows(right, task)]))
    costs = folder / "costs" / f"{own['model']}.jsonl"
    costs.parent.mkdir(exist_ok=True)
    lines = [own] if not costs.exists() else []
    for method, keep in right:
        ms = TOKENS[keep] / 10 + (5 if method == "good" else 0)
        cost = {"type": "cost", "task": task, "method": method, "keep": keep, "ttft_ms": ms, "total_ms": 2 * ms}
        lines.append({**cost, "peak_mib": 10.0, "prompts": 1, "repeats": 1})
    with costs.open("a") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)
    return folder


def test_tables_by_hand(tmp_path: Path) -> None:
    make(tmp_path)
    table, overall = board.write([tmp_path], tmp_path, draws=300)
    cell = {(row["kind"], row["method"], row["keep"]): row for row in table}
    norm = cell["mean", "norm", "1/4"]
    assert (norm["score"], norm["relative"], norm["tokens_out"], norm["ttft_ms"]) == (0.75, 0.75, 25, 2.5)
    assert norm["minus_dense"] == -0.25 and norm["minus_dense_low"] <= -0.25 <= norm["minus_dense_high"] < 0
    assert (cell["a", "norm", "1/4"]["score"], cell["b", "norm", "1/4"]["score"]) == (1.0, 0.5)
    # Down-sampling gets half of the questions wrong, all of kind b; `norm` one of these.
    half = cell["mean", "norm", "1/2"]
    assert (half["hard_questions"], half["hard"], half["hard_dense"]) == (50, 0.98, 1.0)
    assert cell["mean", "downsample", "1/2"]["hard"] == 0 and norm["hard"] is None
    assert norm["empty"] == 25 and norm["broken"] == 0
    # The most common answer, whatever is seen: "yes", to two questions of three.
    assert cell["mean", "prior", "0"]["score"] == pytest.approx(0.66, abs=0.01)
    total = {(row["method"], row["keep"]): row for row in overall}
    assert total["good", "1/4"]["ttft"] == 0.75 and total["good", "1/4"]["relative"] == 1
    assert total["dense", "1"]["total"] == 1 and total["prior", "0"]["ttft"] is None
    assert board.from_csv(tmp_path / "board.csv")[0]["questions"] == 100


def test_relative_score_is_the_mean_of_ratios(tmp_path: Path) -> None:
    make(tmp_path, {("dense", "1"): "1100", ("norm", "1/2"): "1000"}, task="t")
    make(tmp_path, {("dense", "1"): "1111", ("norm", "1/2"): "1111"}, task="u")
    _, overall = board.write([tmp_path], tmp_path, draws=50)
    norm = next(row for row in overall if row["method"] == "norm")
    assert norm["relative"] == pytest.approx((0.25 / 0.5 + 1) / 2) and norm["score"] == pytest.approx((0.25 + 1) / 2)


def test_merging(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {key: RIGHT[key] for key in [("dense", "1"), ("norm", "1/4")]})
    second = make(tmp_path / "b", {key: RIGHT[key] for key in [("dense", "1"), ("good", "1/4")]})
    board.write([first, second], tmp_path / "c", draws=50)
    found = board.from_csv(tmp_path / "c" / "board.csv")
    means = {row["method"]: row["ttft_ms"] for row in found if row["kind"] == "mean"}
    assert list(means) == ["prior", "dense", "norm", "good"]
    assert means["norm"] and means["good"] is None  # timed on another day, or another machine
    other = make(tmp_path / "d", {("dense", "1"): "0" + RIGHT["dense", "1"][1:]})
    with pytest.raises(InputError, match="answered t/0 twice"):
        board.gather([first, other])
    other = make(tmp_path / "e", {("dense", "1"): RIGHT["dense", "1"]}, seed=1)
    with pytest.raises(InputError, match="made with seed=1, others with 0"):
        board.gather([first, other])
    with pytest.raises(ConfigError, match="it is no board"):
        board.gather([tmp_path / "none"])


def test_doubled_and_missing_answers_fail(tmp_path: Path) -> None:
    make(tmp_path)
    file = tmp_path / "answers" / "m" / "t.0-1.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(InputError, match="two answers of good keep=1/4 to t/99"):
        board.gather([tmp_path])
    file.write_text("".join(lines[:-2]))
    with pytest.raises(InputError, match="good keep=1/4 has no answer to 2 of 100 questions"):
        board.gather([tmp_path])
    assert len(board.gather([tmp_path], partial=True)["m"]["t"].ids) == 98


def test_the_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    file = second / "answers" / "m" / "t.0-1.jsonl"
    head, *lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([head, *lines[::-1]]))
    for folder in (first, second):
        board.write([folder], folder, draws=100)
    ours, theirs = (sorted((folder / "board.csv").read_text().splitlines()) for folder in (first, second))
    assert ours == theirs


def test_diff(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    second = make(tmp_path / "b", {**RIGHT, ("norm", "1/4"): "1111" * 25})
    found = {(row["method"], row["keep"]): row for row in board.diff(first, second)}
    assert (found["norm", "1/4"]["change"], found["norm", "1/4"]["flipped"]) == (0.25, 25)
    assert found["norm", "1/4"]["change_low"] > 0 and found["good", "1/4"]["change"] == 0
    with pytest.raises(ConfigError, match="no model, task and method in common"):
        board.diff(first, make(tmp_path / "c", model="other"))


def test_advice(tmp_path: Path) -> None:
    make(tmp_path)
    table, _ = board.write([tmp_path], tmp_path, draws=500)
    mean = next(row for row in board.advise(table, 0.05) if row["kind"] == "mean")
    assert (mean["method"], mean["keep"]) == ("good", "1/4")
    without = [row for row in table if row["method"] != "good"]
    by_kind = {row["kind"]: row for row in board.advise(without, 0.08)}
    assert (by_kind["mean"]["method"], by_kind["mean"]["keep"]) == ("norm", "1/2")
    assert by_kind["a"]["keep"] == "1/4"  # `norm` loses nothing of this kind
    assert {row["kind"]: row["method"] for row in board.advise(without, 0.001)}["b"] is None
    # Not one answer of `good` is lost, but 100 questions cannot tell a loss of two points from none: with it, all of
    # them would come out right in more than one run of forty.
    assert mean["minus_dense"] == 0 and mean["minus_dense_low"] == pytest.approx(-0.0362, abs=1e-4)
    assert (1 - 0.02) ** 100 > 0.025 > (1 - 0.0365) ** 100
    assert {row["method"] for row in board.advise(table, 0.02)} == {None}
    with pytest.raises(ConfigError, match="a loss of 2 is no share"):
        board.advise(table, 2)


def test_a_run_that_was_cut_short_is_no_board(tmp_path: Path) -> None:
    """Whoever was killed between two batches has answered the same questions under all methods."""
    make(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"models": {"m": {"t": {"questions": 100}}}}))
    assert len(board.gather([tmp_path])["m"]["t"].ids) == 100
    (tmp_path / "plan.json").write_text(json.dumps({"models": {"m": {"t": {"questions": 120}}}}))
    with pytest.raises(InputError, match="20 of 120 questions have not been asked yet"):
        board.gather([tmp_path])
    assert len(board.gather([tmp_path], partial=True)["m"]["t"].ids) == 100
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the plan"):
        board.gather([tmp_path])


def test_a_mean_over_fewer_tasks_is_marked(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, {key: right for key, right in RIGHT.items() if key[0] != "good"}, task="u")
    board.write([tmp_path], tmp_path, draws=50)
    text = page.draw(tmp_path).read_text(encoding="utf-8")
    assert "good (1 of 2 tasks)" in text and "norm (1 of" not in text
    (_, charts), *_ = page.charts_of("m", *(board.from_csv(tmp_path / f"{name}.csv") for name in ("board", "overall")))
    assert {"norm", "dense"} <= {mark.method for mark in charts[0]} and "good" not in {m.method for m in charts[0]}


def test_tasks_of_pocket_models_are_those_of_their_training() -> None:
    from vtprune.eval.sweep import EXAMS
    from vtprune.models.pocket.train import EXAMS as TRAINED

    # `icl` has been learnt by one of them alone.
    learnt = {name: [w for w in worlds if w != "icl" or "qwen" in name] for name, worlds in TRAINED.items()}
    assert learnt == {name: list(worlds) for name, worlds in EXAMS.items()}


def test_pareto() -> None:
    assert board.pareto([(1, 0.5), (2, 0.4), (3, 0.9), (3, 0.8), (1, 0.5)]) == [0, 2]


def test_page_and_picture(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, task="u")
    board.write([tmp_path], tmp_path, draws=50)
    text = page.draw(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"?(https?:)?//", text), "it needs nothing from elsewhere"
    drawn = re.findall(r"<svg.*?</svg>", text)
    assert len(drawn) == 6  # all tasks and two tasks, by tokens and by time
    for one in drawn:
        ET.fromstring(one)
    labels = [node.text for node in ET.fromstring(drawn[0]).iter() if node.tag == "text"]
    assert {"good", "dense", "downsample", "prior"} <= set(labels)
    assert "<td" in text and "[-" in text
    with Image.open(tmp_path / "board.png") as picture:
        assert picture.size == (2 * 2 * page.WIDTH, 2 * page.HEIGHT)
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    # Drawn once more from the tables alone, it is the same.
    before = (tmp_path / "index.html").read_bytes()
    (tmp_path / "answers").rename(tmp_path / "elsewhere")
    assert page.draw(tmp_path).read_bytes() == before


def test_claims_stand_beside_results(tmp_path: Path) -> None:
    claims = {
        **{"method": "good", "paper": "p"},
        "table": [
            {
                **{"model": "m", "tokens": 100, "tolerance": 1.0, "tasks": {"T": "t"}, "dense": {"T": 100.0}},
                "expected": {"good": {"1/4": {"T": 95.0, "average": 100.0}}, "norm": {"1/8": {"T": 1.0}}},
            }
        ],
    }
    make(tmp_path)
    table, _ = board.write([tmp_path], tmp_path, draws=50)
    found = [(row["method"], row["task"], row["result"], row["verdict"]) for row in papers.lines(claims, table)]
    assert found == [
        ("dense", "T", 100.0, "agrees"),
        ("good", "T", 100.0, "differs"),
        ("good", "average", 100.0, "agrees"),
        ("norm", "T", None, papers.NOT_RUN),
    ]


def test_files_of_claims_are_sound_and_not_run() -> None:
    from vtprune.budget import parse_keep
    from vtprune.registry import build

    assert {"idpruner", "zoo", "globalcom2"} <= set(papers.names())
    for name in papers.names():
        claims = papers.load(name)
        assert claims["method"] == name
        for table in claims["table"]:
            for method, by_keep in table["expected"].items():
                build(method, {})
                for keep in by_keep:
                    parse_keep(keep)
        assert {row["verdict"] for row in papers.lines(claims)} == {papers.NOT_RUN}
    with pytest.raises(ConfigError, match="did you mean 'idpruner'"):
        papers.load("idprunner")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make(tmp_path / "a")
    second = make(tmp_path / "b", {**RIGHT, ("norm", "1/4"): "1111" * 25})
    assert cli.main(["board", str(first), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in found} == {"prior", "dense", "downsample", "norm", "good"}
    assert (first / "index.html").is_file() and (first / "board.png").is_file()
    assert cli.main(["board", str(first), str(second), "--diff"]) == 0
    assert "+25.0" in capsys.readouterr().out
    assert cli.main(["board", str(first), "--advise", "2"]) == 2
    assert "0.02 for two points" in capsys.readouterr().err
    assert cli.main(["board", str(first), "--advise", "0.08"]) == 0
    assert "25 of 100" in capsys.readouterr().out
    assert cli.main(["board", str(first), str(second)]) == 2
    assert "cannot be merged" in capsys.readouterr().err
    assert cli.main(["board", str(first), "--diff"]) == 2
    assert cli.main(["eval", "--paper", "zoo"]) == 0
    assert papers.NOT_RUN in capsys.readouterr().out
    assert cli.main(["eval", "--task", "pocketvqa/basic"]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert cli.main(["eval", "pocketvqa/basic", "--out", str(tmp_path / "x"), "--table", "t.csv"]) == 2
    assert "a board has its tables" in capsys.readouterr().err
    assert cli.evaluate.listed(["a,b x=[1,2]", 'c d="1,2"', ""]) == ["a", "b x=[1,2]", 'c d="1,2"']

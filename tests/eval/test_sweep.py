# SPDX-License-Identifier: Apache-2.0
"""Sweeps: killed and gone on with, by one process and by several; what is broken, doubled, or too large."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from vtprune.budget import Budget
from vtprune.errors import ConfigError, InputError
from vtprune.eval import board, page, runner, sweep
from vtprune.eval.controls import prepare
from vtprune.eval.table import read
from vtprune.eval.tasks import Example, Task, get
from vtprune.models import find_family
from vtprune.tokens import PROJECTOR

ROOT = Path(__file__).parents[2]
COUNT, BATCH = 4, 1
REQUEST = sweep.Request(
    ("pocket-llava",), ("pocketvqa/basic",), ("norm",), ("1/9",), count=COUNT, batch=BATCH, device="cpu", costs=False
)
#: The same on a command line.
ARGUMENTS = [
    *("eval", "--task", "pocketvqa/basic", "--method", "norm", "--keep", "1/9", "--count", str(COUNT)),
    *("--batch", str(BATCH), "--device", "cpu", "--no-costs"),
]
Pocket = tuple[Any, Any]


@pytest.fixture(scope="module")
def pocket() -> Pocket:
    return vtprune.load("pocket-llava", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished board; not to be written."""
    folder = tmp_path_factory.mktemp("whole")
    sweep.sweep(REQUEST, folder)
    board.write([folder], folder, draws=200)
    return folder


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def answered(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sweep.answers_files(folder) for row in read(file)[1]]


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["method"], row["keep"], row["id"]


def test_controls_are_always_there(whole: Path) -> None:
    with (whole / "board.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "mean"]
    assert [row["method"] for row in rows] == ["prior", *sweep.ALWAYS, "norm"]
    assert all(int(row["questions"]) == COUNT for row in rows)
    assert len({key(row) for row in answered(whole)}) == len(answered(whole)) == COUNT * (len(rows) - 1)
    hard = next(row for row in rows if row["method"] == "norm")
    wrong = {r["id"] for r in answered(whole) if r["method"] == "downsample" and not r["correct"]}
    own = [r["score"] for r in answered(whole) if r["method"] == "norm" and r["id"] in wrong]
    assert int(hard["hard_questions"]) == len(wrong) > 0
    assert float(hard["hard"]) == pytest.approx(sum(own) / len(own), abs=1e-4)


@pytest.mark.slow
def test_killed_and_gone_on_with_is_the_same(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    run = subprocess.Popen(
        [sys.executable, "-m", "vtprune", *ARGUMENTS, "--out", str(folder)],
        env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    file = folder / "answers" / "pocket-llava" / "pocketvqa-basic.0-1.jsonl"
    for _ in range(2400):
        if file.exists() and file.read_bytes().count(b"\n") > 2 * BATCH:
            break
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    left = file.read_bytes()
    assert len(left.splitlines()) < len(answered(whole))
    file.write_bytes(left + b'{"type": "answer", "task": "pocketvqa/ba')  # a line that the kill tore
    sweep.sweep(REQUEST, folder)
    assert file.read_bytes().startswith(left), "what was there is not written again"
    rows = answered(folder)
    assert max(Counter(map(key, rows)).values()) == 1
    assert sorted(rows, key=key) == sorted(answered(whole), key=key)
    board.write([folder], folder, draws=200)
    for name in ("board.csv", "overall.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_nothing_is_asked_twice(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(runner, "generate", never)
    done: list[int] = []
    sweep.sweep(REQUEST, whole, tick=done.append)
    assert sum(done) == len(answered(whole))


@pytest.mark.slow
def test_two_processes_of_accelerate(whole: Path, tmp_path: Path) -> None:
    """Each question once, the same table; and a worker whose answers are lost is made up for by a single process."""
    folder = tmp_path / "two"
    # Its launcher for GPUs starts the processes on a machine without any, too; `--cpu` would start one.
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "-m", "vtprune", *ARGUMENTS]
    done = subprocess.run(
        [*command, "--out", str(folder)],
        env=environment(), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    files = sweep.answers_files(folder)
    assert [file.name for file in files] == ["pocketvqa-basic.0-2.jsonl", "pocketvqa-basic.1-2.jsonl"]
    rows = answered(folder)
    assert len(read(files[0])[1]) == len(read(files[1])[1]) == len(rows) / 2
    assert sorted(rows, key=key) == sorted(answered(whole), key=key)
    board.write([folder], folder, draws=200)
    assert (folder / "board.csv").read_bytes() == (whole / "board.csv").read_bytes()
    lines = files[1].read_bytes().splitlines(keepends=True)
    files[1].write_bytes(b"".join(lines[:-5]))
    with pytest.raises(InputError, match="run the sweep to its end"):
        board.gather([folder])
    sweep.sweep(REQUEST, folder)
    assert len(read(folder / "answers/pocket-llava/pocketvqa-basic.0-1.jsonl")[1]) == 5
    board.write([folder], folder, draws=200)
    assert (folder / "board.csv").read_bytes() == (whole / "board.csv").read_bytes()


def test_a_killed_parent_ends_its_workers(tmp_path: Path) -> None:
    """Else they would go on beside the next run, into the same files."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, time\n"
        "from vtprune.eval import sweep\n"
        "if __name__ == '__main__':\n"
        "    child = multiprocessing.get_context('spawn').Process(target=sweep._end_with_parent, daemon=True)\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], env=environment(), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = Path(f"/proc/{int(parent.stdout.readline())}")
    if not child.exists():
        parent.kill()
        pytest.skip("only Linux tells of processes in /proc")
    time.sleep(1)
    assert child.exists()
    parent.kill()
    parent.wait()
    for _ in range(600):
        # One that has ended may wait for init to take note of it.
        if not child.exists() or "State:\tZ" in (child / "status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the worker lives on")


def test_a_file_is_written_by_one(pocket: Pocket, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "rows.jsonl"
    with out.open("a", encoding="utf-8") as other:
        runner.lock(other, out)
        with pytest.raises(ConfigError, match="another process is writing to"):
            runner.run(*pocket, ["pocketvqa/basic"], ["dense"], [], out, count=1, batch=1)
    assert len(runner.run(*pocket, ["pocketvqa/basic"], ["dense"], [], out, count=1, batch=1)) == 1


def test_shards_share_the_batches(pocket: Pocket, tmp_path: Path, whole: Path) -> None:
    task, found = get("pocketvqa/basic"), []
    for i in range(3):
        settings: dict[str, Any] = {"count": COUNT, "batch": BATCH, "shard": (i, 3)}
        found.append(runner.run(*pocket, [task], ["dense"], [], tmp_path / f"{i}.jsonl", **settings))
    assert [len(rows) for rows in found] == [2, 1, 1]
    dense = [row for row in answered(whole) if row["method"] == "dense"]
    assert sorted((row for rows in found for row in rows), key=key) == sorted(dense, key=key)


def test_out_of_memory_halves_the_batch(pocket: Pocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, sizes, said = runner.generate, [], []

    def tight(model: Any, processor: Any, inputs: Any, most: int) -> list[str]:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(model, processor, inputs, most)

    settings: dict[str, Any] = {"count": 5, "batch": 5}
    plain = runner.run(*pocket, ["pocketvqa/basic"], ["dense", "norm"], ["1/9"], tmp_path / "a.jsonl", **settings)
    monkeypatch.setattr(runner, "generate", tight)
    out = tmp_path / "b.jsonl"
    rows = runner.run(*pocket, ["pocketvqa/basic"], ["dense", "norm"], ["1/9"], out, say=said.append, **settings)
    assert sizes == [5, 3, 2, 2, 1, 1, 2, 2]
    assert "pocketvqa/basic: out of memory with 5 questions, going on with 3" in said
    assert sorted(map(key, rows)) == sorted(map(key, plain)) and len(rows) == 10
    assert {key(r): r["prediction"] for r in rows} == {key(r): r["prediction"] for r in plain}
    monkeypatch.setattr(runner, "generate", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("no")))
    with pytest.raises(ConfigError, match=r"one question .* does not fit into memory"):
        runner.run(*pocket, ["pocketvqa/basic"], ["dense"], [], tmp_path / "c.jsonl", **settings)


def changed(**by_number: Any) -> Task:
    """Basic questions, some of them changed: ``changed(_1={"id": "x"})``."""

    def examples(split: str, count: int, seed: int) -> Iterator[Example]:
        for number, example in enumerate(get("pocketvqa/basic").examples(split, count, seed)):
            yield replace(example, **by_number.get(f"_{number}", {}))

    return Task("pocketvqa/basic", examples)


def test_ids_and_answers_must_be_sound(pocket: Pocket, tmp_path: Path) -> None:
    first = next(iter(get("pocketvqa/basic").examples("val", 1, 0)))
    for task, words in (
        (changed(_2={"id": first.id}), "two questions with the id"),
        (changed(_1={"answer": " "}), "has an empty answer"),
    ):
        with pytest.raises(InputError, match=words):
            runner.run(*pocket, [task], ["dense"], [], tmp_path / "x.jsonl", count=3, batch=3)


def test_broken_samples_are_counted_and_never_right(pocket: Pocket, tmp_path: Path) -> None:
    def refuse() -> Any:
        raise InputError("the picture 7.jpg cannot be read")

    task = changed(_1={"draw": refuse, "messages": ()}, _2={"messages": ({"role": "user", "content": [
        {"type": "image", "image": "no picture"}, {"type": "text", "text": "?"}]},)})  # fmt: skip
    folder = tmp_path / "board"
    out = folder / "answers" / "pocket-llava" / "pocketvqa-basic.0-1.jsonl"
    out.parent.mkdir(parents=True)
    methods = ["dense", "norm", "question-only"]
    rows = runner.run(*pocket, [task], methods, ["1/9"], out, count=4, batch=4, name="pocket-llava")
    assert len(rows) == 12
    broken = [row for row in rows if row.get("error")]
    assert len(broken) == 6 and not any(row["correct"] or row["score"] for row in broken)
    assert {row["error"].split("(")[0] for row in broken} == {
        "the picture 7.jpg cannot be read", "the processor refuses it "
    }  # fmt: skip
    table, _ = board.write([folder], folder, draws=50)
    means = [row for row in table if row["kind"] == "mean"]
    assert [row["broken"] for row in means] == [2] * 4
    dense = next(row for row in means if row["method"] == "dense")
    assert dense["score"] <= 0.5
    assert "2 broken questions, never right" in page.draw(folder).read_text(encoding="utf-8")


def test_greedy_methods_reuse_their_order(pocket: Pocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers as choosing anew for each budget, and one choice for all of them."""
    from vtprune.pruners.idpruner import IDPruner

    chosen: list[float] = []
    original = IDPruner.select

    def counting(self: Any, tokens: Any, budget: Any, *stage: Any) -> Any:
        chosen.append(budget.keep)
        return original(self, tokens, budget, *stage)

    monkeypatch.setattr(IDPruner, "select", counting)
    settings: dict[str, Any] = {"count": 4, "batch": 4}
    together = runner.run(
        *pocket, ["pocketvqa/basic"], ["idpruner"], ["1/2", "1/9", "100t"], tmp_path / "a", **settings
    )
    assert chosen == [0.5]
    apart = [
        row
        for keep in ("1/2", "1/9", "100t")
        for row in runner.run(
            *pocket, ["pocketvqa/basic"], ["idpruner"], [keep], tmp_path / keep.replace("/", "-"), **settings
        )
    ]
    assert together == apart


def test_what_is_remembered_is_a_prefix(pocket: Pocket) -> None:
    """Every method that says it orders all tokens, and gives an order, chooses the same at a smaller budget."""
    model, processor = pocket
    examples = list(get("pocketvqa/basic").examples("val", 2, 0))
    tokens = vtprune.encode(model, prepare(find_family(model), processor, examples))
    seen = set()
    for name, cls in vtprune.methods().items():
        pruner = cls()
        if not pruner.ordered or pruner.adaptive or pruner.stages() != (PROJECTOR,):
            continue
        memory: dict[str, Any] = {}
        for keep in (0.5, 0.25, 64):
            budget = Budget(keep, allocation=pruner.allocation)
            found = runner.Remembered(pruner, memory).select(tokens, budget, PROJECTOR)
            plain = pruner.select(tokens, budget)
            assert torch.equal(found.index, plain.index), (name, keep)
            if memory:
                seen.add(name)
                assert torch.equal(found.order, plain.order) and memory["pools"].counts == (288, 288)
    assert seen >= {"idpruner", "divprune", "cdpruner", "scope", "zoo", "norm", "random"}


def test_a_folder_begun_otherwise_is_refused(whole: Path, tmp_path: Path) -> None:
    for change, words in (({"seed": 1}, "begun with seed=0"), ({"count": 13}, "begun with count=4")):
        with pytest.raises(ConfigError, match=words):
            sweep.sweep(replace(REQUEST, **change), whole)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="a board is a folder"):
        sweep.sweep(REQUEST, tmp_path / "file")
    for change, words in (
        ({"tasks": ("pocketvqa/basik",)}, "did you mean 'pocketvqa/basic'"),
        ({"methods": ("nrom",)}, "did you mean 'norm'"),
        ({"tasks": ("all",), "models": ("owner/other",)}, "tasks of a pocket model"),
        ({"keeps": ()}, "at least one"),
        ({"split": "dev"}, "has no split 'dev'"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(REQUEST, **change).check()


def test_a_plan_of_all_methods_says_what_it_leaves_out(pocket: Pocket) -> None:
    model, _ = pocket
    found, left_out = sweep.methods_of(replace(REQUEST, methods=("all",)), model)
    assert found[:7] == list(sweep.ALWAYS) and "worst" not in found
    assert {*found, *left_out} == {*sweep.ALWAYS, *vtprune.methods()} - {"worst"}
    found, left_out = sweep.methods_of(replace(REQUEST, methods=("hiprune object_layer=99", "norm")), model)
    assert found == [*sweep.ALWAYS, "norm"] and "layer 99" in left_out["hiprune object_layer=99"]


def test_spread_over_all_devices_says_the_same(pocket: Pocket, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    spread = vtprune.load("pocket-llava", device="auto", dtype=torch.float32)
    settings: dict[str, Any] = {"count": 4, "batch": 4}
    rows = [
        runner.run(*pair, ["pocketvqa/basic"], ["dense", "norm"], ["1/9"], tmp_path / str(number), **settings)
        for number, pair in enumerate((pocket, spread))
    ]
    assert rows[0] == rows[1]


def test_costs_are_measured_and_shared(tmp_path: Path) -> None:
    request = replace(REQUEST, tasks=("pocketvqa/basic", "pocketvqa/extended"), methods=("norm",), count=2, costs=True)
    plan = sweep.make_plan(request, tmp_path, 1, lambda _: None)
    headers, rows = read(tmp_path / "costs" / "pocket-llava.jsonl")
    assert headers[0]["device"] == "cpu"
    basic, extended = ([r for r in rows if r["task"] == task] for task in plan["models"]["pocket-llava"])
    assert len(basic) == len(extended) == len(sweep.ALWAYS) + 1
    assert {row["measured_on"] for row in extended} == {"pocketvqa/basic"}
    for row in basic:
        assert 0 < row["ttft_ms"] <= row["total_ms"] and (row["peak_mib"] is None or row["peak_mib"] > 100)
    times = {row["method"]: row["ttft_ms"] for row in basic}
    assert times["question-only"] < times["dense"]
    sweep.make_plan(request, tmp_path, 1, lambda _: None)
    assert read(tmp_path / "costs" / "pocket-llava.jsonl")[1] == rows
    assert json.loads((tmp_path / "plan.json").read_text())["request"]["count"] == 2


def test_all_times_of_a_task_are_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that comes later is not timed alone: what it takes would stand beside the times of another day."""
    days = iter((1.0, 2.0))

    def measure(_model: Any, _processor: Any, task: Any, _examples: Any, plans: Any, say: Any) -> Any:
        now = next(days)
        for method, keep in plans:
            row = {"type": "cost", "task": task.name, "method": method.label, "keep": keep}
            yield {**row, "ttft_ms": now, "total_ms": now, "peak_mib": now}

    monkeypatch.setattr(sweep.cost, "measure", measure)
    request = replace(REQUEST, tasks=("pocketvqa/basic", "pocketvqa/extended"), methods=("norm",), count=2, costs=True)
    for methods in (("norm",), ("norm", "grid", "divprune"), ("norm", "divprune")):
        sweep.make_plan(replace(request, methods=methods), tmp_path, 1, lambda _: None)
    found = board.costs_of([tmp_path])
    assert {(task, method) for _, task, method, _ in found} >= {
        (task, method) for task in request.tasks for method in ("dense", "norm", "divprune")
    }
    assert {row["ttft_ms"] for row in found.values()} == {2.0}

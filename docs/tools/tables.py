# SPDX-License-Identifier: Apache-2.0
"""The tables of the site, made from `benchmarks/results` whenever it is built, so that none can go stale."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
#: Beside a method always stand these.
CONTROLS = ("dense", "downsampled picture", "random", "grid")
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    """Rows of a file of results."""
    with (RESULTS / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def first(*patterns: str) -> str | None:
    """Name of the newest-made file of results: the first pattern that any file meets, by name."""
    for pattern in patterns:
        found = sorted(path.name for path in RESULTS.glob(pattern))
        if found:
            return found[0]
    return None


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(label: str) -> str:
    """A method's label as code; controls that are no method as they are."""
    return label if label in ("dense", "ideal", "downsampled picture", "blank", "question-only") else f"`{label}`"


def belongs(label: str, method: str) -> bool:
    """Whether a row is of a method, with whatever options."""
    return re.split("[ ,]", label)[0] == method


def source(name: str, row: Row) -> str:
    """Where numbers come from."""
    device = row.get("device") or row.get("gpu") or ""
    where = f"one {device}" if device != "cpu" else "two CPU cores"
    return f"From `benchmarks/results/{name}`: {where}, torch {row['torch']}, transformers {row['transformers']}."


def keeps(found: Iterable[Row]) -> list[str]:
    """Budgets of rows that some method has, the largest first."""
    return sorted({r["keep"] for r in found if "/" in r["keep"]}, key=lambda k: -1 / int(k.split("/")[1]))


def accuracy_file() -> str:
    """The file with most methods: that of the GPU, or where nobody has made it the one that the README shows."""
    name = first("accuracy-methods-*.csv", "accuracy-cpu.csv")
    assert name
    return name


def right(name: str, wanted: Callable[[str], bool]) -> str:
    """Accuracy and time per budget, of the controls and of the methods that `wanted` takes."""
    found = rows(name)
    dense = next(r for r in found if r["method"] == "dense")
    budgets = keeps(found)
    by = {(r["method"], r["keep"]): r for r in found}
    labels = list(dict.fromkeys(r["method"] for r in found))
    last = budgets[-1]
    shown = [m for m in labels if (m, last) in by and (m in CONTROLS or wanted(m))]
    shown.sort(key=lambda m: float(by[m, last]["accuracy"]))
    body = [["all tokens", *(c for _ in budgets for c in (percent(dense), "1.00"))]]
    for label in shown:
        cells = []
        for keep in budgets:
            r = by.get((label, keep))
            cells += [percent(r), f"{float(r['prefill_ms']) / float(dense['prefill_ms']):.2f}"] if r else ["–", "–"]
        body.append([code(label), *cells])
    head = ["", *(h for keep in budgets for h in (f"{keep} right, %", "time"))]
    about = f"{dense['model']}, {dense['questions']} questions; time is the whole prefill, as a share of the dense one."
    return f"{markdown(head, body)}\n\n{about} {source(name, dense)}"


def percent(row: Row) -> str:
    """Accuracy with half of its 95 % interval."""
    return f"{100 * float(row['accuracy']):.1f} ± {100 * float(row['plus_minus']):.1f}"


def accuracy() -> str:
    """Every method of the largest file of accuracy."""
    return right(accuracy_file(), lambda _: True)


def kinds() -> str:
    """What kinds of question lose first, at the smallest budget."""
    name = accuracy_file()
    found = rows(name)
    names = list(found[0])
    asked = names[names.index("plus_minus") + 1 : names.index("prefill_ms")]
    keep = keeps(found)[-1]
    these = [r for r in found if r["keep"] == keep or r["method"] == "dense"]
    these.sort(key=lambda r: float(r["accuracy"]))
    head = ["", *(f"`{kind}`" for kind in asked)]
    body = [[code(r["method"]), *(f"{100 * float(r[kind]):.0f}" for kind in asked)] for r in these]
    return f"{markdown(head, body)}\n\nPercent right with {keep} of the tokens. {source(name, found[0])}"


def speed(wanted: Callable[[str], bool] = lambda _: True) -> str:
    """Time to the first token on a GPU, per preset, of dense, ideal and the methods that `wanted` takes."""
    name = "endtoend-nvidia-h100-80gb-hbm3.csv"
    found = [r for r in rows(name) if not r["compile"] and r["concurrency"] == "1"]
    parts = []
    for preset in dict.fromkeys(r["preset"] for r in found):
        these = [r for r in found if r["preset"] == preset]
        if not any(wanted(r["method"]) for r in these if r["method"] not in ("dense", "ideal")):
            continue
        shown = [r for r in these if r["method"] in ("dense", "ideal", "random", "grid") or wanted(r["method"])]
        shown.sort(key=lambda r: float(r["ttft_ms_p50"]))
        body = [
            [
                code(r["method"]) + (f" {r['batch']} at once" if r["batch"] != "1" else ""),
                r["keep"],
                *(f"{float(r[k]):.1f}" if r[k] else "–" for k in ("ttft_ms_p50", "score_ms", "lm_ms_p50")),
                f"{float(r['peak_mib']) / 1024:.1f}" if r["peak_mib"] else "–",
            ]
            for r in shown
        ]
        r = these[0]
        title = f"{r['model']}, {r['visual_tokens']} visual tokens, {r['dtype']}, {r['attention']}"
        head = ["", "kept", "first token, ms", "choosing, ms", "language model, ms", "memory, GiB"]
        parts.append(f"{title}:\n\n{markdown(head, body)}")
    if not parts:
        return ""
    note = "*ideal* is the model fed as many tokens that nobody had to choose. Random weights."
    if len({r["commit"] for r in found}) > 1:
        note += " Rows are of several runs, as the file's last column says."
    return "\n\n".join([*parts, f"{note} {source(name, found[0])}"])


def video(wanted: Callable[[str], bool] = lambda _: True) -> str:
    """Answers about clips, where somebody has run `benchmarks.video`."""
    name = first("video-*.csv")
    return right(name, wanted) if name else ""


def demonstrations(wanted: Callable[[str], bool] = lambda _: True) -> str:
    """Labelled pictures before the one that is asked about."""
    name = "icl-nvidia-h200.csv"
    found = rows(name)
    shots = [s for s in dict.fromkeys(r["shots"] for r in found) if s != "0"]
    by = {(r["method"], r["keep"], r["shots"]): r for r in found}
    body = [
        [code(m), keep, *(f"{100 * float(by[m, keep, s]['accuracy']):.1f}" for s in shots)]
        for m, keep in dict.fromkeys((r["method"], r["keep"]) for r in found)
        if m in ("dense", "random") or wanted(m)
    ]
    head = ["", "kept", *(f"{s} shown" for s in shots)]
    about = "Percent right of pocket-qwen2.5-vl, after so many labelled pictures; 95 % intervals within 5."
    return f"{markdown(head, body)}\n\n{about} {source(name, found[0])}"


def board(method: str) -> str:
    """Score on the board relative to dense: the method, chance, and a smaller picture."""
    name = "board-nvidia-h100-80gb-hbm3/overall.csv"
    found = [r for r in rows(name) if r["keep"] not in ("0", "1")]
    if method not in {r["method"] for r in found}:
        return ""
    budgets = keeps(found)
    by = {(r["model"], r["method"], r["keep"]): r for r in found}

    def cell(*key: str) -> str:
        r = by[key]
        share, low, high = (100 * float(r[c]) for c in ("relative", "relative_low", "relative_high"))
        part = "" if r["tasks"] == r["of"] else f" ({r['tasks']} of {r['of']} tasks)"
        return f"{share:.1f} ± {(high - low) / 2:.1f}{part}"

    body = [
        [model, code(label), *(cell(model, label, keep) for keep in budgets)]
        for model in dict.fromkeys(r["model"] for r in found)
        if (model, method, budgets[0]) in by  # one that is trained serves the model that it was trained for
        for label in dict.fromkeys((method, "random", "downsample"))
    ]
    about = "Percent of the dense score, the mean over the model's tasks; [the board](../board.md) has all methods."
    return f"{markdown(['model', '', *budgets], body)}\n\n{about} From `benchmarks/results/{name}`: NVIDIA H200."


#: What `<!-- table: NAME -->` in a page becomes.
TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "kinds": kinds,
    "speed": speed,
    "video": video,
    "demonstrations": demonstrations,
}


def of_method(method: str) -> str:
    """All numbers that we have of a method, beside the controls."""

    def wanted(label: str) -> bool:
        return belongs(label, method)

    parts = []
    for title, name in (
        ("Answers", accuracy_file()),
        ("Answers on a cluttered background", "accuracy-clutter-cpu.csv"),
    ):
        if any(wanted(r["method"]) for r in rows(name)):
            parts.append(f"**{title}**\n\n{right(name, wanted)}")
    if overall := board(method):
        parts.append(f"**On the board**\n\n{overall}")
    clips = first("video-*.csv")
    if clips and any(wanted(r["method"]) for r in rows(clips)):
        parts.append(f"**Clips**\n\n{video(wanted)}")
    if any(wanted(r["method"]) for r in rows("icl-nvidia-h200.csv")) and method not in CONTROLS:
        parts.append(f"**After demonstrations**\n\n{demonstrations(wanted)}")
    if times := speed(wanted):
        parts.append(f"**Time**\n\n{times}")
    return "\n\n".join(parts) or "Nothing is measured of it yet."

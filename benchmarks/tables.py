# SPDX-License-Identifier: Apache-2.0
"""The big table: every method x budget x pocket model x task, beside controls, with 95 % intervals.

    python -m benchmarks.tables            # one GPU, many processes side by side; run it again and it goes on
    python -m benchmarks.tables --smoke    # anywhere: 12 questions of each task, few methods, into a folder of its own
    python -m benchmarks.tables --report   # docs/results.md once more, from the committed CSV files

Questions are of the test split. `tables-<gpu>.csv` has a row per model, world, kind of question, method and budget,
`tables-pairs-<gpu>.csv` the differences between methods over all questions of a model, question by question, and
`docs/results.md` says in words what they show, the claims of papers that do not show here included.
`benchmarks/README.md` explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import Job, default_workers, loaded, side_by_side
from vtprune.eval import read, runner, stats
from vtprune.eval.runner import current_commit as commit
from vtprune.models.pocket.train import EXAMS

HERE = Path(__file__).parent
RESULTS, REPORT = HERE / "results", HERE.parent / "docs" / "results.md"
GAIN = ("minus_dense", "minus_dense_low", "minus_dense_high")
#: Every answer of a run, until the tables are made; not committed.
ROWS = HERE.parent / "build" / "tables"

KEEPS = ("1/2", "1/4", "1/9", "1/18")
CONTROLS = ("dense", "blank", "question-only", "downsample")
BASELINES = ("random", "grid", "pool", "norm")
METHODS = (
    *BASELINES,
    *("tome", "dart", "prumerge+", "visionzip", "vispruner", "hiprune", "scope", "divprune", "cdpruner", "zoo"),
    *("globalcom2", "idpruner importance=norm", "idpruner"),
)
#: Methods that order all tokens, and so have a worst end.
ORDERED = ("norm", "scope", "divprune", "cdpruner", "zoo", "globalcom2", "idpruner")
#: What a model gets under a name. `hiprune`'s middle layer, 8 of 24, is layer 2 of the 6 that the pocket towers have;
#: a tower without a CLS token has nothing to ask it for.
AS_RUN = {
    ("pocket-llava", "hiprune"): "hiprune object_layer=2",
    ("pocket-llava-next", "hiprune"): "hiprune object_layer=2",
}
#: Visual tokens of a prompt, at most; the rest have 576, with Qwen 144.
TOKENS = {
    ("pocket-llava", "pair"): 1152,
    ("pocket-llava", "icl"): 2880,
    ("pocket-llava-next", "hires"): 2928,
    ("pocket-qwen2.5-vl", "hires"): 576,
    ("pocket-qwen2.5-vl", "icl"): 720,
    ("pocket-qwen2.5-vl", "video"): 1024,
}
#: Visual tokens and questions of a batch, at most: so that 14 processes fit on one GPU.
TOGETHER, BATCH = 90_000, 96

#: What tables of papers say: the first is more accurate than the second at the same number of tokens.
CLAIMS = (
    ("idpruner", "divprune", "arXiv 2602.13315"),
    ("idpruner", "scope", "arXiv 2602.13315"),
    ("idpruner", "vispruner", "arXiv 2602.13315"),
    ("idpruner", "visionzip", "arXiv 2602.13315"),
    ("idpruner", "hiprune", "arXiv 2602.13315"),
    ("idpruner", "dart", "arXiv 2602.13315"),
    ("zoo", "divprune", "arXiv 2509.24837"),
    ("zoo", "visionzip", "arXiv 2509.24837"),
    ("scope", "divprune", "arXiv 2602.13315"),
    ("scope", "visionzip", "arXiv 2602.13315"),
    ("vispruner", "visionzip", "arXiv 2602.13315"),
)
HONEST = ("random", "grid", "pool", "downsample")


def worlds(model: str) -> tuple[str, ...]:
    """What the model was trained for and is scored on."""
    return EXAMS[model]


def methods(model: str, names: Sequence[str] = METHODS) -> list[str]:
    """Controls, methods and the worst end of those that have one, as `vtprune eval` is told."""
    worst = [f"worst of={name}" for name in ORDERED if name in names]
    return [*CONTROLS, *(AS_RUN.get((model, name), name) for name in names), *worst]


def batch_of(model: str, world: str) -> int:
    """Questions that are answered together: a multiple of the number of kinds in any world."""
    return min(BATCH, TOGETHER // TOKENS.get((model, world), 576) // 12 * 12)


def jobs(given: argparse.Namespace) -> list[Job]:
    """One for each batch of questions, those that take longest first. A batch is drawn under a seed of its own, so that
    no job renders the pictures of another; those of easy-VQA are cheap, and several seeds would repeat some."""
    found = []
    for model in given.models:
        for world in worlds(model):
            size = min(batch_of(model, world), given.questions)
            drawn = [given.questions] if world == "easy-vqa" else _parts(given.questions, size)
            for seed, count in enumerate(drawn):
                job = {"model": model, "world": world, "seed": seed, "count": count, "batch": size}
                settings = {"keeps": given.keep, "methods": methods(model, given.methods), "commit": given.commit}
                found.append({**job, **settings, "folder": given.rows})
    return sorted(found, key=lambda job: -job["count"] * TOKENS.get((job["model"], job["world"]), 300))


def _parts(total: int, size: int) -> list[int]:
    return [min(size, total - first) for first in range(0, total, size)]


def rows_file(job: Job) -> Path:
    """The answers of one job."""
    return Path(job["folder"]) / f"{job['model']}-{job['world']}-{job['seed']}.jsonl"


def answer(**job: Any) -> float:
    """Answer one batch of questions under every method; the seconds that it took."""
    begun = time.monotonic()
    model, processor = loaded(job["model"])
    name = job["world"] if job["world"] == "easy-vqa" else f"pocketvqa/{job['world']}"
    settings = {key: job[key] for key in ("count", "seed", "batch", "commit")}
    runner.run(
        *(model, processor, [name], job["methods"], job["keeps"], rows_file(job)),
        **{"split": "test", "name": job["model"], **settings},
    )
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return time.monotonic() - begun


# -- tables -----------------------------------------------------------------------------------------------------------


class Answers:
    """All answers of one model to one world.

    Parameters
    ----------
    files
        What `answer` wrote.

    Attributes
    ----------
    combinations
        Method and budget of each column.
    correct
        ``[questions, columns]`` bool.
    kinds
        Of each question.
    tokens
        Visual tokens that the language model saw, mean over questions, of each column.
    headers, header
        The first lines of all files, and what they say together: device, versions, commit.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        right: dict[str, dict[tuple[str, str], bool]] = {}
        kinds: dict[str, str] = {}
        tokens: dict[tuple[str, str], list[int]] = {}
        self.headers: list[dict[str, Any]] = []
        for file in files:
            headers, rows = read(file)
            self.headers += headers
            for row in rows:
                column = (row["method"], row["keep"])
                right.setdefault(row["id"], {})[column] = row["correct"]
                kinds[row["id"]] = row["kind"]
                tokens.setdefault(column, []).append(row["tokens_out"])
        self.header = together(self.headers)
        self.combinations = list(tokens)
        self.correct = np.array([[given[column] for column in self.combinations] for given in right.values()])
        self.kinds = [kinds[name] for name in right]
        self.tokens = [float(np.mean(tokens[column])) for column in self.combinations]


def collect(given: argparse.Namespace) -> dict[str, dict[str, Answers]]:
    """Answers by model and world, of worlds whose jobs are all done."""
    found: dict[str, dict[str, Answers]] = {}
    planned = jobs(given)
    for model in given.models:
        for world in worlds(model):
            files = [rows_file(job) for job in planned if (job["model"], job["world"]) == (model, world)]
            try:
                found.setdefault(model, {})[world] = Answers(sorted(files))
            except (KeyError, OSError, ValueError) as error:
                print(f"{model} {world} is left out, because it is not finished: {error!r}")
    return found


def table(found: dict[str, dict[str, Answers]]) -> Iterator[dict[str, Any]]:
    """Rows of the big table: per kind of question, and their mean."""
    for model, by_world in found.items():
        for world, answers in by_world.items():
            names = np.asarray(answers.kinds)
            parts = {"mean": np.ones(len(names), bool), **{kind: names == kind for kind in sorted(set(names))}}
            dense = answers.combinations.index(("dense", "1"))
            for kind, rows in parts.items():
                if kind != "mean" and len(parts) == 2:
                    continue  # one kind is its own mean
                correct, kinds = answers.correct[rows].astype(float), names[rows].tolist()
                means, drawn = stats.macro(correct, kinds), stats.bootstrap(correct, kinds)
                for m, (method, keep) in enumerate(answers.combinations):
                    value = stats.interval(means[m], drawn[:, m])
                    gain = stats.interval(means[m] - means[dense], drawn[:, m] - drawn[:, dense])
                    yield {
                        "model": model,
                        "world": world,
                        "kind": kind,
                        "method": method,
                        "keep": keep,
                        "tokens": f"{answers.tokens[m]:g}",
                        "n": len(correct),
                        **dict(zip(("accuracy", "low", "high"), _rounded(value), strict=True)),
                        **dict(
                            zip(("minus_dense", "minus_dense_low", "minus_dense_high"), _rounded(gain), strict=True)
                        ),
                        **about(answers.header),
                    }


def pairs(found: dict[str, dict[str, Answers]]) -> Iterator[dict[str, Any]]:
    """How much better one method is than another over all worlds of a model, paired by question; mean over kinds."""
    for model, by_world in found.items():
        combinations = next(iter(by_world.values())).combinations
        index = {column: at for at, column in enumerate(combinations)}
        correct = np.concatenate([
            answers.correct[:, [answers.combinations.index(column) for column in combinations]].astype(float)
            for answers in by_world.values()
        ])  # fmt: skip
        kinds = [f"{world}/{kind}" for world, answers in by_world.items() for kind in answers.kinds]
        means, drawn = stats.macro(correct, kinds), stats.bootstrap(correct, kinds)
        header = together([header for answers in by_world.values() for header in answers.headers])
        keeps = list(dict.fromkeys(keep for method, keep in combinations if method == "random"))
        own = [method for method in dict.fromkeys(m for m, _ in combinations) if method not in CONTROLS]
        wanted = [(AS_RUN.get((model, a), a), AS_RUN.get((model, b), b)) for a, b, _ in CLAIMS]
        wanted += [(method, other) for method in own for other in HONEST if not method.startswith("worst")]
        wanted += [(method.split("=")[1], method) for method in own if method.startswith("worst")]
        wanted += [("random", method) for method in own if method.startswith("worst")]
        for first, second in dict.fromkeys(wanted):
            for keep in keeps:
                if first != second and (first, keep) in index and (second, keep) in index:
                    a, b = index[first, keep], index[second, keep]
                    gain = stats.interval(means[a] - means[b], drawn[:, a] - drawn[:, b])
                    yield {
                        **{"model": model, "keep": keep, "first": first, "second": second, "n": len(correct)},
                        **dict(zip(("difference", "low", "high"), _rounded(gain), strict=True)),
                        **about(header),
                    }


#: Columns of the CSV files, and what they are called in a header.
SOURCE = {"gpu": "device", "torch": "torch", "transformers": "transformers", "commit": "commit"}


def together(headers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One header. A run that went on with other code, or elsewhere, names both."""
    return {**headers[0], **{key: " + ".join(dict.fromkeys(h[key] for h in headers)) for key in SOURCE.values()}}


def about(header: dict[str, Any]) -> dict[str, Any]:
    """Where the numbers come from."""
    return {column: header[key] for column, key in SOURCE.items()}


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# -- the report -------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[dict[str, str]], differences: Sequence[dict[str, str]], source: str) -> str:
    """What the two CSV files show, as a page."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    first = rows[0]
    blocks = [
        "# Results",
        f"Every method on the pocket models, test split, on {first['gpu']} (torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {first['commit']}). This page is made by `python -m benchmarks.tables` from "
        f"[`{source}`](../benchmarks/results/{source}); do not edit it. An accuracy is the share of answers that are "
        "right to the letter, as a mean over kinds of question; ± is half of its 95 % interval (paired bootstrap over "
        "questions). All of it is clip art: none of it says how a method does on photographs.",
    ]
    for model in models:
        blocks += _of_model(model, [row for row in rows if row["model"] == model and row["kind"] == "mean"])
    blocks += ["## What papers say, and whether it shows here", _claims(models, differences)]
    blocks += ["## Against what costs nothing", _honest(models, differences)]
    blocks += ["## The worst end", _worst(models, differences)]
    return "\n\n".join(blocks) + "\n"


def _of_model(model: str, rows: list[dict[str, str]]) -> Iterator[str]:
    cell = {(row["world"], row["method"], row["keep"]): row for row in rows}
    found, named = list(dict.fromkeys(row["world"] for row in rows)), list(dict.fromkeys(row["method"] for row in rows))
    keeps = list(dict.fromkeys(row["keep"] for row in rows if row["method"] == "random"))
    yield f"## {model}"
    yield f"Mean over {', '.join(found)} ({rows[0]['n']} questions of each)."
    lines = [["method", *(f"keep {keep}" for keep in keeps)]]
    for method in named:
        line = []
        for keep in keeps:
            own = [cell.get((world, method, keep)) or cell.get((world, method, _only(rows, method))) for world in found]
            if any(row is None for row in own):
                line.append("")
                continue
            values = np.array([[float(row[key]) for key in ("accuracy", "low", "high")] for row in own if row])
            # Worlds are independent: half-widths add as squares.
            half = math.sqrt(float((((values[:, 2] - values[:, 1]) / 2) ** 2).sum())) / len(values)
            line.append(f"{100 * values[:, 0].mean():.1f} ± {100 * half:.1f}")
        lines.append([_code(method), *line])
    yield _table(lines)
    keep = "1/9" if "1/9" in keeps else keeps[-1]
    yield f"Each world at keep {keep}:"
    lines = [["method", *found]]
    for method in named:
        own = [cell.get((world, method, keep)) or cell.get((world, method, _only(rows, method))) for world in found]
        half = [f"{50 * (float(row['high']) - float(row['low'])):.1f}" if row else "" for row in own]
        line = [f"{100 * float(row['accuracy']):.1f} ± {h}" if row else "" for row, h in zip(own, half, strict=True)]
        lines.append([_code(method), *line])
    yield _table(lines)


def _only(rows: list[dict[str, str]], method: str) -> str:
    """The budget on the rows of a control that has one only."""
    return runner.UNPRUNED.get(method, "")


def _code(method: str) -> str:
    return f"`{method}`"


def _table(lines: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *body])


def verdict(row: dict[str, str]) -> str:
    """What an interval of a difference says."""
    low, high = float(row["low"]), float(row["high"])
    return "shows" if low > 0 else "reversed" if high < 0 else "no difference"


def _pick(
    differences: Sequence[dict[str, str]], model: str, first: str, second: str, keep: str | None = None
) -> list[dict[str, str]]:
    a, b = AS_RUN.get((model, first), first), AS_RUN.get((model, second), second)
    return [
        row
        for row in differences
        if (row["model"], row["first"], row["second"]) == (model, a, b) and keep in (None, row["keep"])
    ]


def _percent(row: dict[str, str]) -> str:
    return f"{100 * float(row['difference']):+.1f}"


def _claims(models: list[str], differences: Sequence[dict[str, str]]) -> str:
    lines = [["claim", "source", "keep", *models]]
    plain = []
    for first, second, source in CLAIMS:
        found = {model: _pick(differences, model, first, second) for model in models}
        keeps = [row["keep"] for row in found[models[0]]]
        missing = []
        for at, keep in enumerate(keeps):
            cells = [found[model][at] for model in models]
            lines.append([f"`{first}` above `{second}`", source, keep])
            lines[-1] += [f"{verdict(row)} ({_percent(row)})" for row in cells]
            missing += [
                f"{model} at {keep}" for model, row in zip(models, cells, strict=True) if verdict(row) != "shows"
            ]
        if missing:
            every = len(missing) == len(keeps) * len(models)
            where = "on any model at any budget" if every else f"on {', '.join(missing)}"
            plain.append(f"- That `{first}` beats `{second}` ({source}) does not show {where}.")
    words = (
        'In points of accuracy over all questions of a model. "shows": the 95 % interval of the paired difference lies '
        'above 0; "reversed": below. The papers measured other models on photographs and documents; here is only what '
        "these models say."
    )
    return "\n\n".join([words, _table(lines), "\n".join(plain) or "All of it shows."])


def _honest(models: list[str], differences: Sequence[dict[str, str]]) -> str:
    plain = []
    for model in models:
        own = [row for row in differences if row["model"] == model and row["second"] in HONEST]
        for method in dict.fromkeys(row["first"] for row in own):
            if method in HONEST:
                continue
            lost = [f"`{r['second']}` at {r['keep']}" for r in own if r["first"] == method and verdict(r) != "shows"]
            if lost:
                plain.append(f"- {model}, `{method}`: not better than {', '.join(lost)}.")
    words = (
        "A method earns its place by beating chance, a lattice, averaging and a smaller picture. Where one does not:"
    )
    return "\n\n".join([words, "\n".join(plain) or "Every method beats them everywhere."])


def _worst(models: list[str], differences: Sequence[dict[str, str]]) -> str:
    lines = [["method", "keep", *models]]
    plain = []
    for name in ORDERED:
        own = {model: _pick(differences, model, "random", f"worst of={name}") for model in models}
        for at, row in enumerate(own[models[0]]):
            keep = row["keep"]
            lines.append([f"`{name}`", keep, *(_percent(own[model][at]) for model in models)])
            plain += [
                f"- {model}, `{name}` at {keep}: its worst tokens are not worse than random ones."
                for model in models
                if verdict(own[model][at]) != "shows"
            ]
    words = "How far the tokens that a method values least lie below random ones, in points; large is good."
    return "\n\n".join([words, _table(lines), "\n".join(plain) or "All of them lose."])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(EXAMS), choices=list(EXAMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--keep", nargs="+", default=list(KEEPS))
    parser.add_argument("--questions", type=int, default=300, help="of each world")
    parser.add_argument("--workers", type=int, default=None, help="processes; default 14 on a GPU, 1 on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no more batches after this time")
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of all answers; what it holds is not run again")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--page", type=Path, default=REPORT, help="the Markdown page")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--smoke", action="store_true", help="12 questions, few methods, results into build/smoke")
    parser.add_argument("--report", action="store_true", help="only the page, from the CSV files in --out")
    given = parser.parse_args(arguments)
    given.commit = given.commit or commit()
    if given.smoke:
        given.questions, given.keep = 12, ["1/9"]
        given.rows = given.out = ROWS.parent / "smoke"
        given.page = given.out / "results.md"
    if given.report:
        return report(given.out, given.page)
    given.rows.mkdir(parents=True, exist_ok=True)
    planned, begun = jobs(given), time.monotonic()
    done = 0
    for job, seconds in side_by_side(answer, planned, given.workers or default_workers(), 60 * given.minutes):
        done += 1
        print(f"{done}/{len(planned)} {job['model']} {job['world']} {job['seed']}: {seconds:.1f} s", flush=True)
    print(f"{done} of {len(planned)} batches in {time.monotonic() - begun:.0f} s", flush=True)
    found = collect(given)
    if not found or not any(found.values()):
        return 1
    found = {model: by_world for model, by_world in found.items() if by_world}
    header = next(iter(next(iter(found.values())).values())).header
    where = header["device"].lower().replace(" ", "-")
    write(given.out / f"tables-{where}.csv", list(table(found)))
    write(given.out / f"tables-pairs-{where}.csv", list(pairs(found)))
    report(given.out, given.page)
    return 0 if done == len(planned) else 1


def report(folder: Path, page: Path) -> int:
    """Write the page from the CSV files of a folder."""
    files = sorted(path for path in folder.glob("tables-*.csv") if "pairs" not in path.name)
    if not files:
        print(f"there is no tables-*.csv in {folder}")
        return 1
    both = [files[-1], files[-1].with_name(files[-1].name.replace("tables-", "tables-pairs-"))]
    rows, differences = ([*csv.DictReader(path.read_text(encoding="utf-8").splitlines())] for path in both)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(rows, differences, both[0].name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

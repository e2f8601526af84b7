# SPDX-License-Identifier: Apache-2.0
"""The papers' own questions, asked of the pocket models: CSV files, plots, and a page that says what came out.

    python -m benchmarks.papers            # one GPU, about two minutes; run it again and it goes on
    python -m benchmarks.papers --smoke    # anywhere: a few questions, into a folder of its own
    python -m benchmarks.papers --report   # page and plots once more, from the committed CSV files

- IDPruner (arXiv:2602.13315): how much importance, how much diversity? A sweep of lambda, and for each lambda how
  important and how diverse what it keeps is, beside other methods (`idpruner-lambda-<gpu>.csv`).
- ZOO-Prune (arXiv:2509.24837): how many directions, which step, and is a closed form as good? Rank agreement
  (`zoo-ranks-<gpu>.csv`).
- GlobalCom2 (arXiv:2501.05179): does it help that the thumbnail says how much each crop keeps, and which tokens?
  (`globalcom2-allocation-<gpu>.csv`).

Questions are of the test split: nothing is chosen from these numbers. Plots need matplotlib (`pip install ".[plots]"`).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vtprune
from benchmarks.answers import Answers, about, batch_of, rows_file, write
from benchmarks.side_by_side import Job, default_workers, loaded, side_by_side
from vtprune.eval import controls, runner, stats, tasks
from vtprune.eval.runner import current_commit as commit
from vtprune.kernels import reference
from vtprune.models import find_family
from vtprune.pruners import importance as sources
from vtprune.pruners.zoo import ZooPruner, spearman
from vtprune.tokens import VisualTokens

HERE = Path(__file__).parent
RESULTS, DOCS, ROWS = HERE / "results", HERE.parent / "docs", HERE.parent / "build" / "papers"

LAMBDAS = tuple(round(0.1 * step, 1) for step in range(11))
LAMBDA_KEEPS = ("1/4", "1/9", "1/18")
LAMBDA_MODEL, LAMBDA_WORLDS = "pocket-llava", ("basic", "extended", "clutter")
SWEEP = tuple(f"idpruner mmr_lambda={value}" for value in LAMBDAS)
#: What stands beside the sweep in the plot of importance and diversity.
BESIDE = ("random", "norm", "divprune", "scope", "vispruner", "cdpruner", "zoo")

ALLOCATION_MODEL, ALLOCATION_WORLD = "pocket-llava-next", "hires"
ALLOCATION_KEEPS = ("1/2", "1/4", "1/9", "1/18")
POLICIES = ("globalcom2", "equal", "proportional")
#: Methods whose budget each policy shares, and the parts of the paper's score: the crop alone, the thumbnail alone.
SHARED = ("globalcom2", "norm", "idpruner")
PARTS = ("globalcom2 alpha=0 allocation=globalcom2", "globalcom2 alpha=1 allocation=globalcom2")

#: What the sensitivity is estimated for.
RANKED = (
    ("pocket-llava", "basic"),
    ("pocket-llava", "clutter"),
    ("pocket-llava-next", "hires"),
    ("pocket-qwen2.5-vl", "basic"),
    ("pocket-qwen2.5-vl", "hires"),
)
DIRECTIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MANY = 1024
STEPS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
PICTURES = 30


# -- jobs -------------------------------------------------------------------------------------------------------------


def plan(given: argparse.Namespace) -> list[Job]:
    """All jobs, those that take longest first."""
    found: list[Job] = []
    common = {"folder": given.rows, "commit": given.commit}
    sweep = {"methods": ["dense", *BESIDE, *SWEEP], "keeps": list(LAMBDA_KEEPS)}
    shared = [f"{method} allocation={policy}" for method in SHARED for policy in POLICIES]
    split = {"methods": ["dense", *shared, *PARTS], "keeps": list(ALLOCATION_KEEPS)}
    for name, model, worlds, settings in (
        ("lambda", LAMBDA_MODEL, LAMBDA_WORLDS, sweep),
        ("allocation", ALLOCATION_MODEL, (ALLOCATION_WORLD,), split),
    ):
        for world in worlds:
            size = min(batch_of(model, world), given.questions)
            for seed, first in enumerate(range(0, given.questions, size)):
                job = {"what": "answers", "model": model, "world": world, "seed": seed, "batch": size, "part": name}
                found.append({**job, "count": min(size, given.questions - first), **settings, **common})
    rank = {"what": "ranks", "pictures": given.pictures, "many": given.directions, **common}
    found += [{**rank, "model": model, "world": world} for model, world in RANKED]
    balance = {"what": "balance", "model": LAMBDA_MODEL, "pictures": given.pictures, **common}
    found += [{**balance, "world": world} for world in LAMBDA_WORLDS]
    return sorted(found, key=lambda job: {"answers": 1, "ranks": 0, "balance": 2}[job["what"]])


def work(**job: Any) -> float:
    """Do one job; the seconds that it took."""
    begun = time.monotonic()
    model, processor = loaded(job["model"])
    name = f"pocketvqa/{job['world']}"
    if job["what"] == "answers":
        folder = Path(job["folder"]) / job["part"]
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: job[key] for key in ("count", "seed", "batch", "commit")}
        runner.run(
            *(model, processor, [name], job["methods"], job["keeps"], rows_file({**job, "folder": folder})),
            **{"split": "test", "name": job["model"], **settings},
        )
    else:
        out = made_file(job)
        if not out.exists():
            tokens = list(encoded(model, processor, name, job["pictures"], batch_of(job["model"], job["world"])))
            made = ranks(tokens, job["many"]) if job["what"] == "ranks" else balance(tokens)
            header = runner.provenance(model, job["model"], job["commit"])
            write(out, [{"model": job["model"], "world": job["world"], **row, **about(header)} for row in made])
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return time.monotonic() - begun


def made_file(job: Job) -> Path:
    """What a job without answers writes; whatever decides on its numbers is in the name, for it is not made again."""
    size = [job["pictures"], *([job["many"]] if job["what"] == "ranks" else [])]
    return Path(job["folder"]) / f"{'-'.join(map(str, [job['what'], job['model'], job['world'], *size]))}.csv"


def encoded(model: Any, processor: Any, task: str, pictures: int, batch: int) -> Iterator[VisualTokens]:
    """What pruners see of the first pictures of a task, batch by batch."""
    family = find_family(model)
    examples = tasks.get(task).examples("test", pictures, 0)
    while part := list(itertools.islice(examples, batch)):
        yield vtprune.encode(model, controls.prepare(family, processor, part))


# -- ZOO-Prune --------------------------------------------------------------------------------------------------------


def ranks(batches: Sequence[VisualTokens], most: int = MANY) -> list[dict[str, Any]]:
    """Rank agreement of sensitivities, mean over pictures with its interval.

    With ``m`` the number of directions: against `most` others, and between its two halves. With ``h`` the step: against
    the limit of small steps along the same directions. Estimators against ``fd`` (m = 64, h = 0.01), as published.
    """

    def scores(**options: Any) -> list[Tensor]:
        pruner = ZooPruner(**options)
        return [part for tokens in batches for part in pruner.score(tokens).double().split(list(tokens.image_lens))]

    def row(quantity: str, value: Any, against: str, one: list[Tensor], two: list[Tensor]) -> dict[str, Any]:
        found = np.array([spearman(a, b) for a, b in zip(one, two, strict=True)])
        found = found[np.isfinite(found)]
        drawn = stats.bootstrap(found[:, None], ["all"] * len(found))[:, 0] if len(found) else np.array([math.nan])
        mean, low, high = stats.interval(found.mean() if len(found) else math.nan, drawn)
        shown = {"spearman": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
        return {"quantity": quantity, "value": value, "against": against, **shown, "pictures": len(found)}

    table = []
    many = scores(estimator="jvp", m=most, seed=1)
    for m in (m for m in DIRECTIONS if m < most):
        table.append(row("m", m, f"{most} others", scores(m=m), many))
        if m > 1:
            halves = [
                [part for t in batches for part in ZooPruner(m=m)._estimate(t, cut)[0].split(list(t.image_lens))]
                for cut in (slice(m // 2), slice(m // 2, None))
            ]
            table.append(row("m", m, "split half", *halves))
    limit = scores(estimator="jvp")
    for h in STEPS:
        for estimator in ("fd", "fd_fused"):
            table.append(row(f"h, {estimator}", h, "jvp", scores(estimator=estimator, h=h), limit))
    published = scores(estimator="fd")
    for estimator in ("fd_fused", "jvp", "frobenius"):
        table.append(row("estimator", estimator, "fd", scores(estimator=estimator), published))
    table.append(row("estimator", "frobenius", f"{most} directions", scores(estimator="frobenius"), many))
    norms = [part for t in batches for part in sources.norm(t)[0].double().split(list(t.image_lens))]
    table.append(row("estimator", "norm of the token", "fd", norms, published))
    return table


# -- IDPruner ---------------------------------------------------------------------------------------------------------


def balance(batches: Sequence[VisualTokens]) -> list[dict[str, Any]]:
    """How important and how diverse kept tokens are: importance is IDPruner's (CLS logits, min-max in each picture),
    its mean over what is kept; diversity is 1 minus the mean cosine of two kept tokens. Means over pictures."""
    table = []
    for method, keep in itertools.product((*BESIDE, *SWEEP), LAMBDA_KEEPS):
        given = runner.Method.parse(method)
        found = []
        for tokens in batches:
            scores = reference.minmax(sources.auto(tokens)[0], tokens.image_lens)
            kept = vtprune.select(tokens, given.config(keep)).index
            image = torch.bucketize(kept, torch.tensor(tokens.image_lens, device=kept.device).cumsum(0), right=True)
            unit = torch.nn.functional.normalize(tokens.features.float(), dim=1)
            for i in range(len(tokens.image_lens)):
                mine = kept[image == i]
                n = len(mine)
                cosine = (unit[mine].sum(0).square().sum() - n) / (n * (n - 1))
                found.append((float(scores[mine].mean()), 1 - float(cosine)))
        importance, diversity = np.mean(found, 0).round(4).tolist()
        table.append({"method": method, "keep": keep, "importance": importance, "diversity": diversity})
    return table


# -- tables -----------------------------------------------------------------------------------------------------------


def collect(jobs: Sequence[Job], part: str, world: str) -> Answers:
    """The answers to one world."""
    mine = [job for job in jobs if job["what"] == "answers" and (job["part"], job["world"]) == (part, world)]
    return Answers([rows_file({**job, "folder": Path(job["folder"]) / part}) for job in mine])


def rows_of(answers: Answers, model: str, world: str, reference_of: Any = None) -> list[dict[str, Any]]:
    """One row per method and budget; `reference_of` names the column that a column is compared to, or None."""
    correct = answers.correct.astype(float)
    means, drawn = stats.macro(correct, answers.kinds), stats.bootstrap(correct, answers.kinds)
    table = []
    for m, (method, keep) in enumerate(answers.combinations):
        low_high = stats.interval(means[m], drawn[:, m])
        row = {"model": model, "world": world, "method": method, "keep": keep, "tokens": f"{answers.tokens[m]:g}"}
        row |= {"n": len(correct), **named(("accuracy", "low", "high"), low_high)}
        if reference_of is not None:
            other = reference_of((method, keep))
            row |= dict.fromkeys(("against", "difference", "difference_low", "difference_high"), "")
            if other in answers.combinations:
                o = answers.combinations.index(other)
                gain = stats.interval(means[m] - means[o], drawn[:, m] - drawn[:, o])
                row |= {"against": other[0], **named(("difference", "difference_low", "difference_high"), gain)}
        table.append({**row, **about(answers.header)})
    return table


def named(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Numbers of a table under their columns, four digits each."""
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def without(column: tuple[str, str]) -> tuple[str, str]:
    """What a way to share a budget is compared to: equal shares; a part of the score to the whole."""
    method, keep = column
    if method in PARTS:
        return f"{SHARED[0]} allocation={POLICIES[0]}", keep
    name, _, policy = method.partition(" allocation=")
    return (f"{name} allocation=equal" if policy in ("globalcom2", "proportional") else "", keep)


def tables(jobs: Sequence[Job], out: Path, where: str) -> None:
    """Write the tables of these jobs, which are done."""
    sweep = []
    found = {(job["what"], job["model"], job["world"]): job for job in jobs if job["what"] != "answers"}
    for world in LAMBDA_WORLDS:
        shown = _read(made_file(found["balance", LAMBDA_MODEL, world]))
        place = {(row["method"], row["keep"]): row for row in shown}
        for row in rows_of(collect(jobs, "lambda", world), LAMBDA_MODEL, world):
            at = place.get((row["method"], row["keep"]), {})
            sweep.append({**row, **{key: at.get(key, "") for key in ("importance", "diversity")}})
    write(out / f"idpruner-lambda-{where}.csv", sweep)
    split = rows_of(collect(jobs, "allocation", ALLOCATION_WORLD), ALLOCATION_MODEL, ALLOCATION_WORLD, without)
    write(out / f"globalcom2-allocation-{where}.csv", split)
    zoo = [row for model, world in RANKED for row in _read(made_file(found["ranks", model, world]))]
    write(out / f"zoo-ranks-{where}.csv", zoo)


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# -- the page ---------------------------------------------------------------------------------------------------------


def page(sweep: list[dict[str, str]], zoo: list[dict[str, str]], split: list[dict[str, str]], drawn: bool) -> str:
    """What came out, in words and tables."""
    row = sweep[0]
    blocks = [
        "# The papers' own questions, on the pocket models",
        f"Made by `python -m benchmarks.papers` on {row['gpu']} (torch {row['torch']}, transformers "
        f"{row['transformers']}, commit {row['commit']}) from the CSV files in `benchmarks/results`; do not edit. Test "
        "split, 95 % intervals. Clip art: none of it says how a method does on photographs.",
        "## IDPruner: importance or diversity?",
        *_lambda_words(sweep),
        *(["![Accuracy by lambda; importance and diversity of what is kept](idpruner-lambda.png)"] if drawn else []),
        "## ZOO-Prune: how many directions, which step, and is a closed form as good?",
        *_zoo_words(zoo),
        *(["![Rank agreement by the number of directions and by the step](zoo-ranks.png)"] if drawn else []),
        "## GlobalCom2: does it help that the thumbnail says how much each crop keeps?",
        *_allocation_words(split),
    ]
    return "\n\n".join(blocks) + "\n"


def _lambda_words(sweep: list[dict[str, str]]) -> Iterator[str]:
    worlds = list(dict.fromkeys(row["world"] for row in sweep))
    keeps = [keep for keep in LAMBDA_KEEPS if any(row["keep"] == keep for row in sweep)]
    cell = {(row["world"], row["method"], row["keep"]): row for row in sweep}
    lines = [["lambda", *(f"{world} {keep}" for world in worlds for keep in keeps)]]
    for value, method in zip(LAMBDAS, SWEEP, strict=True):
        lines.append([f"{value:g}", *(_accuracy(cell[w, method, k]) for w in worlds for k in keeps)])
    for method in BESIDE:
        lines.append([f"`{method}`", *(_accuracy(cell[w, method, k]) for w in worlds for k in keeps)])
    yield (
        f"`{LAMBDA_MODEL}`, importance from CLS logits, {sweep[0]['n']} questions of each world. Lambda 1 is "
        "importance alone, 0 is diversity alone; the paper finds a flat best around 0.5 to 0.7."
    )
    yield _table(lines)
    plain = []
    for world, keep in itertools.product(worlds, keeps):
        own = {value: cell[world, method, keep] for value, method in zip(LAMBDAS, SWEEP, strict=True)}
        best = max(own, key=lambda value: float(own[value]["accuracy"]))
        half = own[0.5]
        told = "within its interval of the best" if float(half["high"]) >= float(own[best]["accuracy"]) else "below it"
        plain.append(f"- {world} at {keep}: best at lambda {best:g}; the default of 0.5 is {told}.")
    yield "\n".join(plain)


def _zoo_words(zoo: list[dict[str, str]]) -> Iterator[str]:
    places = list(dict.fromkeys((row["model"], row["world"]) for row in zoo))
    asked = list(dict.fromkeys((row["quantity"], row["value"], row["against"]) for row in zoo))
    cell = {(row["model"], row["world"], row["quantity"], row["value"], row["against"]): row for row in zoo}
    yield (
        "Spearman's rank correlation of the sensitivity of a picture's tokens, mean over "
        f"{zoo[0]['pictures']} pictures. `m`: directions; `h`: step; `fd` is the published way with m = 64, h = 0.01."
    )
    lines = [["", "against", *(f"{model.removeprefix('pocket-')} {world}" for model, world in places)]]
    for quantity, value, against in asked:
        found = [cell.get((*place, quantity, value, against)) for place in places]
        name = value if quantity == "estimator" else f"{quantity}: {value}"
        lines.append([name, against, *(f"{float(row['spearman']):.3f}" if row else "" for row in found)])
    yield _table(lines)
    plain = []
    for model, world in places:
        norm = cell[model, world, "estimator", "norm of the token", "fd"]
        same = cell[model, world, "estimator", "frobenius", "fd"]
        told = (
            "ranks tokens nearly as the norm does" if float(norm["spearman"]) > 0.9 else "is not the norm in disguise"
        )
        plain.append(
            f"- {model}, {world}: the closed form agrees with `fd` to {float(same['spearman']):.3f}; the sensitivity "
            f"{told} ({float(norm['spearman']):+.3f}; .986 was published for another model)."
        )
    yield "\n".join(plain)


def _allocation_words(split: list[dict[str, str]]) -> Iterator[str]:
    keeps = [keep for keep in ALLOCATION_KEEPS if any(row["keep"] == keep for row in split)]
    cell = {(row["method"], row["keep"]): row for row in split}
    named = [method for method in dict.fromkeys(row["method"] for row in split) if method != "dense"]
    yield (
        f"`{ALLOCATION_MODEL}` on `{ALLOCATION_WORLD}`, {split[0]['n']} questions; with all tokens "
        f"{_accuracy(cell['dense', '1'])}. In brackets: paired difference from the same method with equal shares, or, "
        "of a part of the score (alpha), from the whole. Counts round down under `globalcom2`: it keeps a few less."
    )
    lines = [["method", *(f"keep {keep}" for keep in keeps)]]
    plain = []
    for method in named:
        line = [f"`{method}`"]
        for keep in keeps:
            row = cell[method, keep]
            gain = f" ({_gain(row)})" if row["difference"] else ""
            line.append(_accuracy(row) + gain)
        lines.append(line)
        told = [
            f"{'better' if float(cell[method, keep]['difference_low']) > 0 else 'worse'} at {keep}"
            for keep in keeps
            if cell[method, keep]["difference"]
            and (float(cell[method, keep]["difference_low"]) > 0 or float(cell[method, keep]["difference_high"]) < 0)
        ]
        if cell[method, keeps[0]]["difference"]:
            against = cell[method, keeps[0]]["against"]
            plain.append(f"- `{method}` against `{against}`: {', '.join(told) or 'no difference at any budget'}.")
    yield _table(lines)
    yield "\n".join(plain)


def _accuracy(row: dict[str, str]) -> str:
    return f"{100 * float(row['accuracy']):.1f} ± {50 * (float(row['high']) - float(row['low'])):.1f}"


def _gain(row: dict[str, str]) -> str:
    low, high = 100 * float(row["difference_low"]), 100 * float(row["difference_high"])
    return f"{100 * float(row['difference']):+.1f} [{low:+.1f}, {high:+.1f}]"


def _table(lines: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + " --- |" * len(lines[0]), *body])


# -- plots ------------------------------------------------------------------------------------------------------------


def plots(sweep: list[dict[str, str]], zoo: list[dict[str, str]], folder: Path) -> bool:
    """Draw both plots; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print('no plots: matplotlib is not installed (pip install ".[plots]")')
        return False
    keep = "1/9"
    shown = [row for row in sweep if row["keep"] == keep]
    worlds = list(dict.fromkeys(row["world"] for row in shown))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, world in enumerate(worlds):
        cell = {row["method"]: row for row in shown if row["world"] == world}
        own = [cell[method] for method in SWEEP]
        values = [float(row["accuracy"]) for row in own]
        errors = [
            [value - float(row["low"]) for value, row in zip(values, own, strict=True)],
            [float(row["high"]) - value for value, row in zip(values, own, strict=True)],
        ]
        color = f"C{number}"
        left.errorbar(LAMBDAS, values, errors, label=world, color=color, capsize=2)
        left.axhline(float(cell["random"]["accuracy"]), color=color, linestyle=":", linewidth=1)
    left.set(xlabel="lambda (0: diversity alone, 1: importance alone)", ylabel="accuracy", title=f"keep {keep}")
    left.legend(title="dotted: random")
    cell = {row["method"]: row for row in shown if row["world"] == worlds[0]}
    line = [cell[method] for method in SWEEP]
    right.plot(*_point(line), marker="o", color="black", label="idpruner, by lambda")
    for value, row in zip(LAMBDAS, line, strict=True):
        if value not in (0, 0.1, 0.2, 0.5, 1):  # the others lie too close to be read
            continue
        right.annotate(f"{value:g}", (float(row["importance"]), float(row["diversity"])), fontsize=7, xytext=(3, 3),
                       textcoords="offset points")  # fmt: skip
    for method in BESIDE:
        right.scatter(*_point([cell[method]]), marker="s", s=24, label=method)
    right.set(xlabel="importance of what is kept (CLS logits, min-max)", ylabel="diversity (1 - mean cosine)",
              title=f"{worlds[0]}, keep {keep}")  # fmt: skip
    right.legend(fontsize=7)
    figure.savefig(folder / "idpruner-lambda.png", dpi=110, metadata={"Software": None})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, (model, world) in enumerate(dict.fromkeys((row["model"], row["world"]) for row in zoo)):
        mine = [row for row in zoo if (row["model"], row["world"]) == (model, world)]
        name = f"{model.removeprefix('pocket-')}, {world}"
        for against, style in (("others", "-"), ("half", ":")):
            found = [row for row in mine if row["quantity"] == "m" and row["against"].endswith(against)]
            left.plot([int(row["value"]) for row in found], [float(row["spearman"]) for row in found], style,
                      color=f"C{number}", label=name if style == "-" else None)  # fmt: skip
        found = [row for row in mine if row["quantity"] == "h, fd"]
        right.plot(
            [float(row["value"]) for row in found], [float(row["spearman"]) for row in found], color=f"C{number}"
        )
        found = [row for row in mine if row["quantity"] == "h, fd_fused"]
        right.plot([float(row["value"]) for row in found], [float(row["spearman"]) for row in found], "--",
                   color=f"C{number}")  # fmt: skip
    left.set(xscale="log", xlabel="directions m", ylabel="rank correlation",
             title="against many others; dotted: between halves")  # fmt: skip
    right.set(xscale="log", xlabel="step h (m = 64)", title="against h -> 0; dashed: fd_fused")
    left.legend(fontsize=7)
    figure.savefig(folder / "zoo-ranks.png", dpi=110, metadata={"Software": None})
    pyplot.close("all")
    return True


def _point(rows: list[dict[str, str]]) -> tuple[list[float], list[float]]:
    return [float(row["importance"]) for row in rows], [float(row["diversity"]) for row in rows]


def report(folder: Path, docs: Path, where: str | None = None) -> int:
    """Write page and plots from the CSV files of a folder."""
    found = sorted(folder.glob(f"idpruner-lambda-{where or '*'}.csv"))
    if not found:
        print(f"there is no idpruner-lambda-*.csv in {folder}")
        return 1
    where = found[-1].stem.removeprefix("idpruner-lambda-")
    sweep, zoo, split = (
        _read(folder / f"{name}-{where}.csv") for name in ("idpruner-lambda", "zoo-ranks", "globalcom2-allocation")
    )
    docs.mkdir(parents=True, exist_ok=True)
    drawn = plots(sweep, zoo, docs) or (docs / "idpruner-lambda.png").exists()
    (docs / "papers.md").write_text(page(sweep, zoo, split, drawn), encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300, help="of each world")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="for rank agreement and the balance of lambda")
    parser.add_argument("--directions", type=int, default=MANY, help="what rank agreement is measured against")
    parser.add_argument("--workers", type=int, default=None, help="processes; default 14 on a GPU, 1 on a CPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no more jobs after this time")
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of all answers; what it holds is not run again")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page and the plots")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--smoke", action="store_true", help="a few questions, results into build/smoke-papers")
    parser.add_argument("--report", action="store_true", help="only page and plots, from the CSV files in --out")
    given = parser.parse_args(arguments)
    given.commit = given.commit or commit()
    if given.smoke:
        given.questions, given.pictures, given.directions = 6, 2, 16
        given.rows = given.out = given.docs = ROWS.parent / "smoke-papers"
    if given.report:
        return report(given.out, given.docs)
    given.rows.mkdir(parents=True, exist_ok=True)
    jobs, begun, done = plan(given), time.monotonic(), 0
    for job, seconds in side_by_side(work, jobs, given.workers or default_workers(), 60 * given.minutes):
        done += 1
        print(f"{done}/{len(jobs)} {job['what']} {job['model']} {job['world']}: {seconds:.1f} s", flush=True)
    print(f"{done} of {len(jobs)} jobs in {time.monotonic() - begun:.0f} s", flush=True)
    if done < len(jobs):
        return 1
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    where = name.lower().replace(" ", "-")
    tables(jobs, given.out, where)
    return report(given.out, given.docs, where)


if __name__ == "__main__":
    raise SystemExit(main())

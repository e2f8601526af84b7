# SPDX-License-Identifier: Apache-2.0
"""What the board says of papers' claims, of methods beside what costs nothing, and of the worst end of each score.

`pairs` compares two methods on the same questions over all tasks of a model; `sections` puts that into words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from vtprune.eval import stats
from vtprune.eval.board import Answers
from vtprune.eval.table import Row

#: What tables of papers say: the first is more accurate than the second at the same number of tokens.
CLAIMS = (
    *(("idpruner", name, "2602.13315") for name in ("divprune", "scope", "vispruner", "visionzip", "hiprune", "dart")),
    *(("zoo", name, "2509.24837") for name in ("divprune", "visionzip")),
    *(("scope", name, "2510.24214") for name in ("divprune", "visionzip")),
    *(("globalcom2", name, "2501.05179") for name in ("fastv", "sparsevlm")),
    *(("visionzip", name, "2412.04467") for name in ("fastv", "sparsevlm")),
    *(("dart", name, "2502.11494") for name in ("fastv", "sparsevlm")),
    ("cdpruner", "divprune", "2506.10967"),
    ("vispruner", "visionzip", "2412.01818"),
    ("divprune", "fastv", "2503.02175"),
    ("pyramiddrop", "fastv", "2410.17247"),
    ("sparsevlm", "fastv", "2410.04417"),
)
#: What costs nothing.
CHEAP = ("random", "grid", "pool", "downsample")
#: Methods that value one token above another, and so have a worst end.
VALUING = (
    *("norm", "scope", "divprune", "cdpruner", "zoo", "globalcom2", "idpruner", "embedlens"),
    *("vidcom2", "evs", "selector", "visionzip", "vispruner", "prumerge+", "dart", "hiprune", "tome"),
    *("catp", "fastv", "pyramiddrop", "sparsevlm", "spatten", "tokensparse"),
)


def pairs(answers: Mapping[str, Mapping[str, Answers]]) -> Iterator[Row]:
    """How much more of the same questions one method answers than another, of each pair that `sections` needs.

    Parameters
    ----------
    answers
        By model and task, as `vtprune.eval.board.gather` has them.

    Yields
    ------
    Row
        ``difference`` is of accuracies, the mean over kinds of question of all tasks, with its 95 % interval.
    """
    for model, tasks in answers.items():
        columns = set.intersection(*(set(found.columns) for found in tasks.values()))
        keeps = sorted({keep for method, keep in columns if method == "random"}, key=_share, reverse=True)
        methods = list(dict.fromkeys(m for m, at in next(iter(tasks.values())).columns if at in keeps))
        wanted = [(first, second) for first, second, _ in CLAIMS]
        wanted += [(name, cheap) for name in methods for cheap in CHEAP if name not in CHEAP and _end(name) is None]
        wanted += [("random", name) for name in methods if _end(name)]
        wanted = list(dict.fromkeys(wanted))
        kinds = [f"{task}/{kind}" for task, found in tasks.items() for kind in found.kinds]
        for keep in keeps:
            asked = [pair for pair in wanted if all((name, keep) in columns for name in pair)]
            names = list(dict.fromkeys(name for pair in asked for name in pair))
            scores = np.concatenate(
                [found.scores[:, [found.columns.index((name, keep)) for name in names]] for found in tasks.values()]
            )
            means, drawn = stats.macro(scores, kinds), stats.bootstrap(scores, kinds)
            for first, second in asked:
                a, b = names.index(first), names.index(second)
                value = stats.interval(means[a] - means[b], drawn[:, a] - drawn[:, b])
                row: Row = {"model": model, "keep": keep, "method": first, "than": second, "n": len(scores)}
                yield row | dict(zip(("difference", "low", "high"), value, strict=True))


def _share(keep: str) -> float:
    above, _, below = keep.partition("/")
    return float(above) / float(below or 1)


def _end(method: str) -> str | None:
    """Whose worst tokens these are."""
    return method.removeprefix("worst of=") if method.startswith("worst of=") else None


def verdict(row: Row) -> str:
    """What an interval of a difference says."""
    return "shows" if row["low"] > 0 else "reversed" if row["high"] < 0 else "no difference"


def sections(rows: Sequence[Row]) -> str:
    """Claims of papers, methods beside what costs nothing, and worst ends, as Markdown."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    by = {(row["method"], row["than"], row["model"], row["keep"]): row for row in rows}
    return "\n\n".join([*_claims(by, models, keeps), *_cheap(by, models, keeps), *_worst(by, models, keeps)])


Found = Mapping[tuple[str, str, str, str], Row]


def _points(row: Row | None) -> str:
    """A difference in points; bold where its interval lies above 0, struck out where it lies below."""
    if row is None:
        return "–"
    mark = {"shows": "**", "reversed": "~~", "no difference": ""}[verdict(row)]
    return f"{mark}{100 * row['difference']:+.1f}{mark}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body)])


def _cells(by: Found, first: str, second: str, models: Sequence[str], keeps: Sequence[str]) -> list[str]:
    return [" / ".join(_points(by.get((first, second, model, keep))) for keep in keeps) for model in models]


def _claims(by: Found, models: Sequence[str], keeps: Sequence[str]) -> Iterator[str]:
    yield "## What papers say, and whether it shows here"
    yield (
        f"Points of accuracy over all questions of a model, at {', '.join(keeps)}. **Bold**: the 95 % interval of the "
        "paired difference lies above 0; ~~struck out~~: below 0, so the opposite shows. The papers measured other "
        "models on photographs and documents; here is only what these models say."
    )
    made = [claim for claim in CLAIMS if any((*claim[:2], model, keeps[0]) in by for model in models)]
    body = [
        [f"`{a}` above `{b}` ([{paper}](https://arxiv.org/abs/{paper}))", *_cells(by, a, b, models, keeps)]
        for a, b, paper in made
    ]
    yield _table(["claim", *models], body)
    never, other = [], []
    for first, second, _ in made:
        found = [verdict(by[first, second, m, k]) for m in models for k in keeps if (first, second, m, k) in by]
        if "shows" not in found:
            never.append(f"`{first}` above `{second}`")
        elif "reversed" in found:
            other.append(f"`{first}` above `{second}`")
    if never:
        yield f"Does not show anywhere: {', '.join(never)}."
    if other:
        yield f"Shows in some places, and the opposite in others: {', '.join(other)}."


def _cheap(by: Found, models: Sequence[str], keeps: Sequence[str]) -> Iterator[str]:
    yield "## Against what costs nothing"
    yield (
        "A method earns its place by beating chance, a lattice, averaging and a smaller picture. Where one does not, "
        "by its interval over all questions of the model:"
    )
    lines = []
    for model in models:
        methods = dict.fromkeys(m for m, than, at, _ in by if at == model and than in CHEAP)
        for method in methods:
            lost = {
                cheap: [k for k in keeps if (row := by.get((method, cheap, model, k))) and verdict(row) != "shows"]
                for cheap in CHEAP
            }
            told = [f"`{cheap}` ({', '.join(at)})" for cheap, at in lost.items() if at]
            if told:
                lines.append(f"- {model}, `{method}`: not better than {', '.join(told)}.")
    yield "\n".join(lines) or "Every method beats them everywhere."


def _worst(by: Found, models: Sequence[str], keeps: Sequence[str]) -> Iterator[str]:
    yield "## The worst end"
    yield (
        "How far the tokens that a method values least (`worst of=...`) lie below random ones, in points at "
        f"{', '.join(keeps)}; large is good, and what is struck out is *better* than chance: there the score is no "
        "measure of worth."
    )
    ends = [n for n in VALUING if any(("random", f"worst of={n}", m, keep) in by for m in models for keep in keeps)]
    yield _table(
        ["score of", *models], [[f"`{n}`", *_cells(by, "random", f"worst of={n}", models, keeps)] for n in ends]
    )

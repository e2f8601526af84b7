# SPDX-License-Identifier: Apache-2.0
"""The tables of the neighbours, and what the pages say in words about them, are the committed results."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.neighbours import SIX
from benchmarks.selector import BASELINES, FREE, SCORER

ROOT = Path(__file__).parents[1]
Row = dict[str, str]
WORLDS = ("basic", "extended", "clutter")
SELECTOR = "selector weights=selector.safetensors"
SPARSER = "tokensparse layers=[2,3,4,5]"


def rows(name: str) -> list[Row]:
    with (ROOT / f"benchmarks/results/{name}-nvidia-h200.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file)]


def line(label: str, *cells: str) -> str:
    return f"| {' | '.join((label, *cells))} |"


def code(method: str) -> str:
    return f"`{method}`"


def share(row: Row, digits: int = 2, column: str = "accuracy", low: str = "low", high: str = "high") -> str:
    """A value and half of its interval."""
    return f"{float(row[column]):.{digits}f} ± {(float(row[high]) - float(row[low])) / 2:.{digits}f}"


def gain(row: Row, column: str, low: str = "minus_low", high: str = "minus_high", digits: int = 2) -> str:
    """A difference and its interval."""
    return "{} ({} to {})".format(*(f"{float(row[c]) + 0.0:.{digits}f}" for c in (column, low, high)))


def clear(row: Row, low: str = "minus_low", high: str = "minus_high") -> int:
    """1 where the interval of a difference lies above zero, -1 where below, else 0."""
    return (float(row[low]) > 0) - (float(row[high]) < 0)


def best_of(found: list[Row]) -> Row:
    return max(found, key=lambda row: float(row["accuracy"]))


# -- tables, line by line ---------------------------------------------------------------------------------------------


def inside() -> Iterator[str]:
    found = {(r["world"], r["method"], r["keep"]): r for r in rows("neighbours-pocket-llava")}
    yield line("all tokens", "1", *(share(found[w, "dense", "1"]) for w in WORLDS), *[""] * 3)
    cost = [
        ", ".join(f"{float(found['basic', m, k]['flops']):.2f}" for k in ("1/4", "1/9")) for m in ("random", SIX[0])
    ]
    yield line("`random`", cost[0], *(share(found[w, "random", k]) for k in ("1/4", "1/9") for w in WORLDS))
    best = [found[w, found[w, "random", k]["best"], k] for k in ("1/4", "1/9") for w in WORLDS]
    yield line("best of the six", cost[1], *(f"{share(row)} ({row['method']})" for row in best))
    for method in ("spatten", "spatten queries=text", "tokensparse", SPARSER, "fastv", "pyramiddrop"):
        cost = [f"{float(found['basic', method, k]['flops']):.2f}" for k in ("1/4", "1/9")]
        cells = (share(found[w, method, k]) for k in ("1/4", "1/9") for w in WORLDS)
        yield line(code(method), ", ".join(cost), *cells)


def reversible() -> Iterator[str]:
    found = [r for r in rows("reversible") if r["world"] == "video"]
    for own in (r for r in found if r["method"].startswith("tokensparse")):
        cells = [share(own)]
        for kind, cost in (("overall", "flops"), ("attention", "attention_flops")):
            cells.append(f"{float(own[cost]):.2f}")
            for method in ("fastv", "pyramiddrop", "random layer=1"):
                to = f"{own['method']} at {own['keep']}"
                row = next(r for r in found if (r["method"], r["equal"], r["to"]) == (method, kind, to))
                name = "reversible_minus_this"
                cells.append(gain(row, name, f"{name}_low", f"{name}_high"))
        yield line(f"{code(own['method'])}, {own['keep']}", *cells)


EVICTED = {
    "evictmerge": "`evictmerge`",
    "merge all": "whatever is evicted is merged (`threshold=-1`)",
    "evict": "evicted, not merged",
    "evict, global": "evicted by global importance alone",
    "evict, local": "evicted by local importance alone",
    "random": "evicted by chance",
    "random, merge": "evicted by chance, then merged",
}


def evictmerge() -> Iterator[str]:
    found = {(r["method"], r["keep"]): r for r in rows("evictmerge") if r["shown"] == "basic"}
    for method, label in EVICTED.items():
        cells = []
        for keep in ("1/2", "1/4", "1/9", "1/18"):
            row = found[method, keep]
            cells.append(f"{float(row['agree_on_named']):.2f} ± {float(row['agree_on_named_pm']):.2f}")
        cells.append(f"{float(found[method, '1/9']['agree']):.3f} ± {float(found[method, '1/9']['agree_pm']):.3f}")
        yield line(label, *cells)


RIVALS = (
    *("idpruner mmr_lambda=0.1", "tome", "vispruner", "divprune", "scope", "zoo", "idpruner", SCORER, "random"),
    *("selector weights=selector.safetensors mmr_lambda=1",),
)
PLACES = ("pocketvqa", "basic", "extended", "clutter", "pair", "easy-vqa")


def selected() -> dict[tuple[str, str, str, str], Row]:
    return {(r["world"], r["kind"], r["method"], r["keep"]): r for r in rows("selector")}


def selector(keep: str) -> Iterator[str]:
    found = selected()
    yield line("all tokens", *(share(found[w, "all", "dense", "1"], 3) for w in PLACES))
    yield line("`selector`", *(share(found[w, "all", SELECTOR, keep], 3) for w in PLACES))
    for method in RIVALS:
        label = code(method.replace(" weights=selector.safetensors", ""))
        yield line(label, *(gain(found[w, "all", method, keep], "selector_minus", digits=3) for w in PLACES))


KINDS = (
    *(("basic", "count"), ("clutter", "clutter-count"), ("pair", "pair-count"), ("extended", "conjunction")),
    *(("extended", "relation"), ("basic", "where"), ("clutter", "clutter-where"), ("basic", "exist")),
    *(("clutter", "clutter-exist"), ("pair", "pair-color"), ("pair", "pair-ocr")),
)


def kinds() -> Iterator[str]:
    found = selected()
    for world, kind in KINDS:
        cells = [f"{float(found[world, kind, 'dense', '1']['accuracy']):.2f}"]
        for keep in ("1/9", "1/18"):
            top = best_of([found[world, kind, method, keep] for method in (*FREE, *BASELINES)])
            cells += [f"{float(found[world, kind, SELECTOR, keep]['accuracy']):.2f}"]
            cells += [f"{float(top['accuracy']):.2f} {code(top['method'])}", gain(top, "selector_minus")]
        yield line(f"{kind} ({world})" if world not in kind else kind, *cells)


DRAFTS = {
    "narrow, mmr_lambda=0.5": "narrow",
    "narrow, mmr_lambda=1": "narrow, top-k",
    "itself, mmr_lambda=0.5": "itself",
    "itself, mmr_lambda=1": "itself, top-k",
    "first 1 layers, mmr_lambda=0.5": "its first layer",
    "first 2 layers, mmr_lambda=0.5": "its first 2 layers",
    "first 4 layers, mmr_lambda=0.5": "its first 4 layers",
}


def draft() -> Iterator[str]:
    found = {(r["world"], r["method"], r["keep"]): r for r in rows("draft") if r["kind"] == "all"}
    keys = [(w, k) for w in ("basic", "extended") for k in ("1/9", "1/18")]
    for method, label in DRAFTS.items():
        row = found["basic", f"draft: {method}", "1/9"]
        cells = (share(found[w, f"draft: {method}", k]) for w, k in keys)
        yield line(label, f"{float(row['draft_share']):.2f}", *cells)
    yield line("none: `random`", "0", *(share(found[w, "random", k]) for w, k in keys))
    six = [best_of([found[w, method, k] for method in SIX]) for w, k in keys]
    yield line("none: best of the six", "0", *(f"{share(row)} ({row['method']})" for row in six))
    yield line("none: `scope`", "0", *(share(found[w, "scope", k]) for w, k in keys))


ROUTED = {
    "skiprouter": "`skiprouter`",
    "skip: untrained router": "untrained router",
    "skip: first rows": "the first rows of the picture",
    "random": "dropped: `random`",
}


def skiprouter() -> Iterator[str]:
    found = {(r["world"], r["method"], r["keep"]): r for r in rows("skiprouter") if r["kind"] == "all"}
    keeps = ("1/2", "1/4", "1/9", "1/18")
    for world in ("basic", "extended"):
        for method, label in ROUTED.items():
            cells = (
                f"{share(found[world, method, k])} at {float(found[world, method, k]['flops_share']):.2f}"
                for k in keeps
            )
            yield line(f"{world}, {label}", *cells)
        cells = []
        for keep in keeps:
            row = best_of([found[world, method, keep] for method in SIX])
            cells.append(f"{share(row)} at {float(row['flops_share']):.2f} ({row['method']})")
        yield line(f"{world}, dropped: best of the six", *cells)


def lora() -> Iterator[str]:
    found = {(r["method"], r["keep"]): r for r in rows("lora")}
    for (method, keep), row in found.items():
        label = "all tokens" if method == "dense" else f"{code(method)}, {keep}"
        more = "" if method == "dense" else gain(row, "dense_minus", digits=3)
        dense = share(row, column="dense_accuracy", low="dense_low", high="dense_high")
        yield line(label, f"{float(row['saved_mib']):.1f}", f"{float(row['peak_mib']):.0f}", share(row), more, dense)


TABLES: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "inside": ("neighbours", inside),
    "reversible": ("neighbours", reversible),
    "evictmerge": ("neighbours", evictmerge),
    "selector, 1/9": ("neighbours-learned", lambda: selector("1/9")),
    "selector, 1/18": ("neighbours-learned", lambda: selector("1/18")),
    "kinds": ("neighbours-learned", kinds),
    "draft": ("neighbours-learned", draft),
    "skiprouter": ("neighbours-learned", skiprouter),
    "lora": ("neighbours-learned", lora),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_that_of_its_file(name: str) -> None:
    page, made = TABLES[name]
    assert "\n".join(made()) in (ROOT / f"docs/{page}.md").read_text(encoding="utf-8"), "\n" + "\n".join(made())


# -- what the pages say in words --------------------------------------------------------------------------------------


def test_the_selector_is_where_the_page_says_it_is() -> None:
    found = selected()
    within = {}
    for world in PLACES:
        for keep in ("1/9", "1/18"):
            sides = {m: clear(found[world, "all", m, keep]) for m in (*FREE, *BASELINES)}
            assert -1 not in sides.values(), (world, keep)
            within[world, keep] = {method for method, side in sides.items() if not side}
    assert within == {
        **{(world, keep): set() for world in ("pocketvqa", "pair") for keep in ("1/9", "1/18")},
        ("basic", "1/9"): {"tome"},
        ("basic", "1/18"): {"scope", "zoo"},
        ("extended", "1/9"): {"tome", "divprune", "idpruner mmr_lambda=0.1", "vispruner", "zoo"},
        ("extended", "1/18"): {"divprune"},
        ("clutter", "1/9"): set(),
        ("clutter", "1/18"): {"scope"},
        ("easy-vqa", "1/9"): {"tome", "dart", "grid", "pool", "random"},
        ("easy-vqa", "1/18"): {"tome", "pool"},
    }
    behind = [key for key, row in found.items() if row["kind"] != "all" and key[2] in FREE and clear(row) < 0]
    assert not behind
    top_k = f"{SELECTOR} mmr_lambda=1"
    assert clear(found["pocketvqa", "all", top_k, "1/18"]) == 1 and not clear(found["pocketvqa", "all", top_k, "1/9"])


def test_the_neighbours_are_where_the_page_says_they_are() -> None:
    near = {(r["world"], r["method"], r["keep"]): r for r in rows("neighbours-pocket-llava") if r["method"] != "dense"}
    cascades = [r for (_, method, _), r in near.items() if method.startswith("spatten")]
    assert len(cascades) == 18 and all(clear(r, "minus_best_low", "minus_best_high") < 0 for r in cascades)
    for row in cascades:
        for other in ("fastv", "pyramiddrop"):
            assert float(row["accuracy"]) > float(near[row["world"], other, row["keep"]]["accuracy"])
    own = [r for r in cascades if r["method"] == "spatten"]
    beats = {(r["world"], r["keep"]): clear(r, "minus_random_low", "minus_random_high") for r in own}
    assert all(side == 1 for (world, _), side in beats.items() if world != "extended") and beats["extended", "1/4"] < 0

    name = "reversible_minus_this"
    others = [r for r in rows("reversible") if r["equal"]]
    sides = {(r["world"], r["method"], r["equal"], r["to"]): clear(r, f"{name}_low", f"{name}_high") for r in others}
    assert sum(world == "icl" for world, *_ in sides) == 36
    assert [side for (world, *_), side in sides.items() if world == "icl" and side] == [1]
    level = {
        ("random layer=1", "1/2"): 0,
        ("random layer=1", "1/4"): 0,
        ("random layer=1", "1/9"): 1,
        ("fastv", "1/9"): 0,
    }
    for (world, method, equal, to), side in sides.items():
        setting, _, keep = to.rpartition(" at ")
        special = equal == "attention" and setting == SPARSER
        assert world == "icl" or side == (level.get((method, keep), -1) if special else -1), (method, equal, to)


def test_the_draft_the_router_and_fine_tuning_are_where_the_page_says_they_are() -> None:
    draft = {(r["world"], r["method"], r["keep"]): r for r in rows("draft") if r["kind"] == "all"}
    sides = {}
    for world in ("basic", "extended"):
        for keep in ("1/9", "1/18"):
            assert draft[world, "draft: narrow, mmr_lambda=0.5", keep]["best_draft_minus"] == "", (
                "the others' yardstick"
            )
            assert not clear(best_of([draft[world, method, keep] for method in SIX]))
            sides[world, keep] = [clear(draft[world, method, keep]) for method in ("idpruner", "scope")]
    assert sides["basic", "1/18"][0] == sides["extended", "1/18"][0] == 1 and sides["basic", "1/9"][1] == -1

    router = {(r["world"], r["method"], r["keep"]): r for r in rows("skiprouter") if r["kind"] == "all"}
    for (world, method, keep), row in router.items():
        if method.startswith("skip:"):
            ahead = world == "extended" or (method, keep) == ("skip: untrained router", "1/2")
            assert clear(row) == ahead, (world, method, keep)

    tuned = {(r["method"], r["keep"]): clear(r) for r in rows("lora") if r["method"] != "dense"}
    assert {key for key, side in tuned.items() if side < 0} == {
        (method, keep)
        for method in ("idpruner", "idpruner importance=scorer scorer=pocket-llava")
        for keep in ("1/4", "1/9")
    }
    assert {key for key, side in tuned.items() if side > 0} == {
        *(("random", "1/4"), ("random", "1/9"), ("zoo", "1/4"), ("embedlens", "1/4"))
    }


def test_memory_of_fine_tuning_is_that_of_its_file() -> None:
    page = (ROOT / "docs/neighbours-learned.md").read_text(encoding="utf-8")
    with (ROOT / "benchmarks/results/lora-memory.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            label = "all 576" if row["method"] == "dense" else row["keep"]
            assert line(label, f"{float(row['saved_mib']):.1f}") in page


def test_numbers_in_the_text_are_those_of_the_files() -> None:
    def text(page: str) -> str:
        return " ".join((ROOT / f"docs/{page}.md").read_text(encoding="utf-8").split())

    near, learned = text("neighbours"), text("neighbours-learned")
    lost = [
        -float(r["reversible_minus_this"])
        for r in rows("reversible")
        if (r["world"], r["equal"]) == ("video", "overall")
    ]
    assert f"by {min(lost):.2f} to {max(lost):.2f}, and against chance" in near
    icl = [r for r in rows("reversible") if r["world"] == "icl"]
    right = [float(r["accuracy"]) for r in icl]
    assert (
        f"all tokens are right on {right[0]:.2f}, and so is everything else ({min(right):.2f} to {max(right):.2f})"
        in near
    )
    top = max((r for r in icl if r["equal"]), key=lambda r: float(r["reversible_minus_this_low"]))
    assert f"of 36 differences one is clear, by {float(top['reversible_minus_this']):.2f}" in near
    found = {(r["method"], r["keep"]): r for r in rows("evictmerge") if r["shown"] == "basic"}
    size = {keep: float(found[method, keep]["kv_kib"]) / 1024 for method, keep in found}
    shrinks = ", ".join(f"{size[keep]:.1f} ({keep})" for keep in ("1/2", "1/4", "1/9"))
    assert f"from {size['1']:.1f} MiB to {shrinks} and {size['1/18']:.1f} (1/18)" in near
    named = {key: f"{float(row['agree_on_named']):.2f}" for key, row in found.items()}
    own, chance = named["evictmerge", "1/9"], named["random", "1/9"]
    for say in (
        f"{own} against {chance} by chance, and {named['random, merge', '1/9']} by chance with merging",
        f"({named['random', '1/2']} against {named['evictmerge', '1/2']})",
        f"({named['evict, global', '1/18']} against {named['evictmerge', '1/18']})",
    ):
        assert say in near, say

    draft = {(r["world"], r["method"], r["keep"]): r for r in rows("draft") if r["kind"] == "all"}
    gains = [f"{float(draft[world, 'idpruner', '1/18']['best_draft_minus']):.2f}" for world in ("basic", "extended")]
    assert f"at 1/18 on both worlds (by {gains[0]} and {gains[1]})" in learned
    assert f"`basic` (by {-float(draft['basic', 'scope', '1/9']['best_draft_minus']):.2f})" in learned
    log = (ROOT / "vtprune/models/pocket/pocket-llava/selector.jsonl").read_text(encoding="utf-8").splitlines()
    start, *checks, stop = map(json.loads, log)
    best = max(checks, key=lambda row: row["held 0.1111"] + row["held 0.0556"])
    assert start["device"] == "NVIDIA H200" and len(checks) == 7
    assert f"{checks[-1]['seconds']:.0f} seconds, {stop['step']:,} steps of {start['batch']}" in learned
    assert (
        f"{start['lessons']:,} questions" in learned and f"On {start['held']} questions that were held out" in learned
    )
    held = [f"{best[name]:.3f}" for name in ("held 0.1111", "held 0.0556")]
    assert f"(step {best['step']}), top-k keeps {held[0]} of the answers at 1/9 and {held[1]} at 1/18" in learned


def test_catp_as_it_is_now_is_told_as_measured() -> None:
    page = (ROOT / "docs/neighbours-learned.md").read_text(encoding="utf-8").replace("\n", " ")
    with (ROOT / "benchmarks/results/selector-catp-cpu.csv").open(encoding="utf-8") as file:
        found = {
            (r["world"], r["keep"]): r for r in csv.DictReader(file) if (r["kind"], r["method"]) == ("all", "catp")
        }
    told = [gain(found["pocketvqa", keep], "selector_minus", digits=3) for keep in ("1/9", "1/18")]
    assert f"by {told[0]} at 1/9 and {told[1]} at 1/18" in page
    level = {world for (world, _), row in found.items() if not clear(row)}
    assert level == {"extended", "clutter"}

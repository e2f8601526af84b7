# SPDX-License-Identifier: Apache-2.0
"""What the documents show works, and what they list is complete."""

from __future__ import annotations

import re
import statistics
import types
from pathlib import Path

import pytest
import torch

import vtprune
from vtprune import registry
from vtprune.budget import Budget
from vtprune.models import FAMILIES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *(ROOT / "docs").rglob("*.md"),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_table_of_encoders_is_that_of_its_file() -> None:
    import csv

    lines = (ROOT / "docs/encoders.md").read_text(encoding="utf-8").splitlines()
    with (ROOT / "benchmarks/results/encoders-cpu.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if float(row["keep"]) < 1]
    labels = {"plain, smaller picture": "plain timm, smaller picture", "tome every": "`tome`, one round a block"}
    for method, block in dict.fromkeys((row["method"], row["after_block"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["after_block"]) == (method, block)]
        label = labels.get(f"{method} {block}".strip(), f"`{method}`")
        cells = [f"{float(r['accuracy']):.3f} | {float(r['speedup']):#.3g}" for r in mine]
        assert f"| {label} | {f'{block} ' if block else ''}| {' | '.join(cells)} |" in lines, label


def test_tables_of_decoding_are_those_of_their_files() -> None:
    import csv

    lines = (ROOT / "docs/decoding.md").read_text(encoding="utf-8").splitlines()
    with (ROOT / "benchmarks/results/vasparse-nvidia-h200.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [f"{float(row['false_yes']):.3f} ± {float(row['false_yes_pm']):.3f}" for row in mine]
        cells += [f"{float(mine[0]['wrong_per_picture']):.2f}", f"{float(mine[0]['tokens_per_s']):.0f}"]
        assert f"| `{method}` | {' | '.join(cells)} |" in lines, method
    text = (ROOT / "docs/inside.md").read_text(encoding="utf-8")
    with (ROOT / "benchmarks/results/corematching-answers-h200.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            cells = [f"{float(row['accuracy']):.3f} ± {float(row['plus_minus']):.3f}"]
            cells += [f"{float(row[key]):.3f}" for key in ("one_token", "several_tokens")]
            cells += [f"{float(row[key]):.2f}" for key in ("decode_flops", "token_ms")]
            assert f"| {' | '.join(cells)} |" in text, row["variant"]


def test_the_table_of_clips_is_that_of_its_file() -> None:
    import csv

    lines = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8").splitlines()
    with (ROOT / "benchmarks/results/video-nvidia-h200.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = {name: name for name in ("dense", "blank", "question-only")} | {
        "downsampled picture": "downsampled frames"
    }
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        mine = mine * (3 - len(mine))  # what knows no budget stands in both columns
        cells = [f"{float(row['accuracy']):.2f} ± {float(row['plus_minus']):.2f}" for row in mine]
        cells += [f"{float(mine[1][kind]):.2f}" for kind in ("motion", "order", "tally", "flash")]
        assert f"| {labels.get(method, f'`{method}`')} | {' | '.join(cells)} |" in lines, method


def test_every_method_and_family_is_in_the_tables() -> None:
    for name in ("README.md", "docs/methods.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for method in vtprune.methods():
            assert f"| `{method}` |" in text, f"{method} is missing in {name}"
    for name in ("README.md", "docs/families.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for kind in (kind for family in FAMILIES for kind in family.model_types):
            assert f"`{kind}`" in text, f"{kind} is missing in {name}"


def test_options_in_the_table_are_those_of_the_classes() -> None:
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    for name, cls in vtprune.methods().items():
        line = re.search(rf"^\| `{re.escape(name)}` \|.*$", text, re.MULTILINE)[0]
        shown = dict(re.findall(r"`(\w+)` \(`?([^`)]+)`?\)", line))
        fields = cls.__dataclass_fields__.values()
        assert shown == {field.name: repr(field.default).replace("'", '"') for field in fields}, name


def test_the_method_in_the_guide_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    text = (ROOT / "docs/add-a-method.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(# SPDX.*?)```", text, re.DOTALL)[1]
    module = types.ModuleType("vtprune.pruners.outlier")
    module.__package__ = "vtprune.pruners"
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(source, "outlier.py", "exec"), module.__dict__)

    features = torch.tensor([[0.0], [0.0], [9.0], [5.0], [5.0], [5.0], [1.0]])
    tokens = vtprune.VisualTokens(
        features=features,
        seqlens=(3, 4),
        source=torch.arange(7),
        coords=torch.zeros(7, 3),
        seg_image=(0, 1),
        image_sample=(0, 1),
        seg_kind=("image", "image"),
        seg_grid=((1, 3), (1, 4)),
        seg_box=((0.0, 0.0, 1.0, 1.0),) * 2,
        image_grid=((1, 1, 1),) * 2,
        image_size=(None, None),
    )
    selection = registry.build("outlier", {}).select(tokens, Budget(1))
    assert selection.index.tolist() == [2, 6]


def test_the_tables_of_the_readme_are_the_committed_results() -> None:
    import csv

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cells = [[c.strip().strip("`") for c in line.strip("|").split("|")] for line in readme.splitlines() if "|" in line]
    found = {row[0]: row[1:] for row in cells}
    with (ROOT / "benchmarks/results/accuracy-cpu.csv").open(encoding="utf-8") as file:
        rows = {(r["method"], r["keep"]): r for r in csv.DictReader(file)}
    dense = rows.pop(("dense", "1"))
    assert found["all 576 tokens"][0] == f"{float(dense['accuracy']):.3f}"
    for shown, control in {"a grey picture": ("blank", "1"), "no picture": ("question-only", "0")}.items():
        assert found[shown][0] == f"{float(rows.pop(control)['accuracy']):.3f}"
    for (method, keep), row in rows.items():
        time = f"{float(row['prefill_ms']) / float(dense['prefill_ms']):.2f}"
        shown = next(r[1:] for r in cells if r[0] == method and len(r) == 5 and r[1][0] == "0")
        first = {"1/4": 0, "1/9": 2}[keep]
        assert shown[first : first + 2] == [f"{float(row['accuracy']):.3f}", time], (method, keep)


def test_the_times_in_the_readme_are_the_committed_result() -> None:
    import csv

    cells = [line.strip("|").split("|") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    at = next(i for i, row in enumerate(cells) if len(row) == 8 and row[1].strip() == "dense")
    with (ROOT / "benchmarks/results/endtoend-nvidia-h100-80gb-hbm3.csv").open(encoding="utf-8") as file:
        rows = {(r["preset"], r["compile"], r["method"]): r for r in csv.DictReader(file)}
    methods = [name.strip().replace("`", "").replace("usual loop", "naive loop") for name in cells[at][1:]]
    keys = [("llava", ""), ("llava", "graph"), ("llava-batch", ""), ("next", ""), ("next", "graph")]
    keys += [("qwen-4k", ""), ("qwen-16k", "")]
    for key, (_, *shown) in zip(keys, cells[at + 2 :], strict=False):
        for method, text in zip(methods, shown, strict=True):
            row = rows.get((*key, method))
            digits = 0 if row and float(row["ttft_ms_p50"]) >= 100 else 1
            told = "–"
            if row is not None:
                told = f"{float(row['ttft_ms_p50']):.{digits}f} ({float(row['lm_ms_p50']):.{digits}f})"
            assert text.strip() == told, (key, method)


LENS = {"pocket-llava": "cpu", "pocket-llava-next": "nvidia-h200", "pocket-qwen2.5-vl": "cpu"}
KINDS_OF_QUESTIONS = ("exist", "color", "shape", "count", "where", "ocr")


def lens_result(name: str, model: str) -> list[dict[str, str]]:
    """Rows of an experiment of the lens; those of removal on `pocket-llava` and all of inject and skip are a GPU's."""
    import csv

    large = name in ("inject", "skip") or (name, model) == ("remove", "pocket-llava")
    device = "nvidia-h200" if large else LENS[model]
    with (ROOT / f"benchmarks/results/lens-{name}-{model}-{device}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lens_cell(row: dict[str, str], value: str, low: str = "", high: str = "") -> str:
    """A share and half its interval, as docs/lens.md shows them: the interval not where it is below 0.005."""
    half = (float(row[high or f"{value}_high"]) - float(row[low or f"{value}_low"])) / 2
    return f"{float(row[value]):.2f}".replace("-0.00", "0.00") + (f" ± {half:.2f}" if half >= 0.005 else "")


def lens_tables() -> dict[str, list[list[list[str]]]]:
    """The tables of docs/lens.md under each of its headings, line by line; the line of dashes is left out."""
    found: dict[str, list[list[list[str]]]] = {}
    tables: list[list[list[str]]] = []
    inside = False
    for line in (ROOT / "docs/lens.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            tables = found.setdefault(line[3:].replace("`", "").removeprefix("On "), [])
        if line.startswith("|"):
            cells = [c.strip() for c in line.strip("|").split("|")]
            if not inside:
                tables.append([cells])
            elif set(line) - set("|-"):
                tables[-1].append(cells)
        inside = line.startswith("|")
    return found


@pytest.mark.parametrize("model", LENS)
def test_the_tables_of_the_lens_are_the_committed_results(model: str) -> None:
    """All of words, removal, injection and skipping, cell by cell."""
    words, removed, injected, skipped, *_ = [
        table for table in lens_tables()[model] if not table[0][0].startswith("asked")
    ]
    said = {(r["layer"], r["attribute"]): r for r in lens_result("words", model) if r["top"] == "5"}
    assert words[1:] == [
        [layer, *(lens_cell(said[layer, a], what) for a in ("shape", "color") for what in ("hit", "chance"))]
        for layer in map(str, range(7))
    ]

    rows = {(r["removed"], r["what"].partition(",")[0]): r for r in lens_result("remove", model)}
    plan = [("nothing", "nothing", "dense"), ("the picture", "everything", "question-only")]
    if ("vit_sink", "the class") in rows:
        plan += [("sinks", "vit_sink", "the class"), ("as many others, at random", "vit_sink", "as many others")]
    for name, key in (("dead", "dead"), ("dead and sinks", "dead,sink")):
        if (key, "the class") in rows:
            plan += [(name, key, "the class"), ("as many of all, at random", key, "as many of all tokens")]
            plan += [(f"all but {name}", key, "all but the class")]
    expected = []
    for label, key, what in plan:
        row = rows[key, what]
        cells = [label, f"{float(row['tokens']):.0f}", lens_cell(row, "accuracy", "low", "high")]
        cells.append("" if what == "dense" else lens_cell(row, "to_dense"))
        control = "to_others" if key == "vit_sink" else "to_all"
        cells.append(lens_cell(row, control) if what == "the class" else "")
        expected.append([*cells, *(f"{float(row[kind]):.2f}" for kind in KINDS_OF_QUESTIONS)])
    assert removed[1:] == expected

    for name, table in (("inject", injected), ("skip", skipped)):
        of: dict[str, dict[str, dict[str, str]]] = {}
        for row in lens_result(name, model):
            if name == "inject":
                label = f"{row['way'].split()[1]} {row['layer']}"
            else:
                tokens = {"all": "all tokens", "vit_sink": "sinks"}.get(row["tokens"], row["tokens"])
                whole = {"attention": "attention", "mlp": "MLPs", "both": "both"}.get(row["sublayers"])
                label = f"{whole} of {tokens}" if whole else row["sublayers"].replace("none", "nothing")
            of.setdefault(label, {})[row["kind"]] = row
        assert table[1:] == [
            [label, *(lens_cell(kinds[k], "accuracy", "low", "high") for k in ("all", *KINDS_OF_QUESTIONS))]
            for label, kinds in of.items()
        ], name


def test_what_the_lens_says_of_the_paper_is_what_was_measured() -> None:
    claims, shares = lens_tables()["What was found"]
    expected = []
    for model in LENS:
        rows = [r for r in lens_result("shares", model) if r["calibration"] == "shipped"]
        for world in ("basic", "clutter"):
            of = {r["class"]: r for r in rows if r["task"] == f"pocketvqa/{world}"}
            cells = [
                lens_cell(of[c], "share", "low", "high") if c in of else "none" for c in ("dead", "vit_sink", "alive")
            ]
            expected.append([f"`{model}`", f"{of['dead']['pictures']} {world}", *cells])
    assert shares[1:] == expected

    for column, model in enumerate(LENS, 1):
        said = next(
            r for r in lens_result("words", model) if (r["layer"], r["attribute"], r["top"]) == ("0", "shape", "5")
        )
        share = {r["class"]: r for r in reversed(lens_result("shares", model)) if r["task"] == "pocketvqa/basic"}
        removed = {(r["removed"], r["what"]): r for r in lens_result("remove", model)}
        none = "dead,sink" if "vit_sink" in share else "dead"
        sinks = removed.get(("vit_sink", "the class"))
        middle = next(
            r for r in lens_result("inject", model) if (r["way"], r["layer"], r["kind"]) == ("enter before", "3", "all")
        )
        frozen = next(
            r for r in lens_result("skip", model) if (r["tokens"], r["sublayers"], r["kind"]) == ("all", "both", "all")
        )
        dead = removed["dead", "the class"]
        numbers = [
            [f"{float(said[what]):.2f}" for what in ("hit", "chance")],
            [f"{float(share[c]['share']):.2f}" for c in ("vit_sink", "dead") if c in share],
            [lens_cell(sinks, "to_dense")] if sinks else [],
            [lens_cell(dead, "to_dense")],
            [lens_cell(dead, "to_all")],
            [f"{float(removed[none, what]['accuracy']):.2f}" for what in ("the class", "all but the class")],
            [f"{float(middle['accuracy']):.2f}"],
            [f"{float(frozen['accuracy']):.2f}"],
        ]
        shown = [re.findall(r"-?\d\.\d+(?: ± \d\.\d+)?", line[column]) for line in claims[1:]]
        assert shown == numbers, model
        # The verdicts before the numbers, for the two that differ from model to model.
        for line, low, high in ((4, "to_dense_low", "to_dense_high"), (5, "to_all_low", "to_all_high")):
            verdict = "yes" if float(dead[low]) > 0 else "no" if float(dead[high]) < 0 else "?"
            assert claims[line][column].partition(":")[0] == verdict, (model, claims[line][0])


def test_the_table_of_patch_compression_is_the_committed_result() -> None:
    def shows(cell: str, *wanted: str) -> None:
        """A cell has the value first; and if there is an interval, then that of the value."""
        numbers = [float(x) for x in re.findall(r"-?\d\.\d+|-?\d+", cell)]
        for number, full in zip(numbers, wanted, strict=False):
            assert number == pytest.approx(float(full), abs=5.1e-3), (cell, wanted)

    cells = next(table for table in lens_tables()["pocket-llava"] if table[0][0].startswith("asked"))
    held = {(r["kind"], r["measure"]): r for r in lens_result("patches", "pocket-llava")}
    for label, kind in {"colour": "color", "count": "count", "shape": "object", "character": "character"}.items():
        _, answer, alone, _, near = next(r for r in cells if len(r) == 5 and r[0].partition(" ")[0] == label)
        for cell, measure in ((answer, "answer"), (alone, "answer, only this token kept")):
            row = held[kind, measure]
            shows(cell, row["value"], row["low"], row["high"])
        best = max((held[kind, f"word in the nearest 5, layer {i}"] for i in range(7)), key=lambda r: float(r["value"]))
        shows(near, best["value"], *((best["low"], best["high"]) if "[" in near else ()))


def test_the_scorer_that_ships_is_as_good_as_the_guide_says() -> None:
    import csv

    with (ROOT / "benchmarks/results/scorer-nvidia-h100-80gb-hbm3.csv").open(encoding="utf-8") as file:
        rows = {(r["world"], r["method"], r["keep"]): r for r in csv.DictReader(file)}
    guide = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    trained = "idpruner importance=scorer scorer=pocket-llava"
    for shown, method in {"random": "random", "idpruner": "idpruner", "idpruner importance=scorer": trained}.items():
        line = next(row for row in guide.splitlines() if row.startswith(f"| `{shown}` | 0."))
        cells = [float(cell) for cell in line.strip("| ").split(" | ")[1:]]
        wanted = [(w, k) for w in ("basic", "extended", "easy-vqa") for k in ("1/9", "1/18")]
        for (world, keep), cell in zip(wanted, cells, strict=True):
            assert cell == pytest.approx(float(rows[world, method, keep]["accuracy"]), abs=5.1e-4), (shown, world, keep)
            if method == trained:
                assert float(rows[world, method, keep]["difference_low"]) > 0
    assert (ROOT / "vtprune/models/pocket/pocket-llava/scorer.safetensors").is_file()


def test_the_table_of_kernels_is_the_committed_result() -> None:
    from benchmarks.kernels import markdown

    table = markdown(ROOT / "benchmarks/results/kernels-nvidia-h100-80gb-hbm3.csv")
    assert table in (ROOT / "docs/kernels.md").read_text(encoding="utf-8")


def test_what_backends_agree_on_is_the_committed_log() -> None:
    found: dict[str, list[float]] = {}
    log = (ROOT / "benchmarks/results/gpu-tests-inside-nvidia-h200.log").read_text(encoding="utf-8")
    for pair, agree in re.findall(r"^agreement .+, (\w+ and \w+), stage \d+: ([\d.]+)$", log, re.M):
        found.setdefault(pair, []).append(float(agree))
    names = {
        "sdpa and flash_contract": "`sdpa`, FlashAttention's contract",
        "sdpa and eager": "`sdpa`, `eager`",
        "eager and flash_contract": "`eager`, FlashAttention's contract",
        "GPU and CPU": "GPU and CPU, fp32, `sdpa`",
    }
    assert set(found) == set(names)
    page = (ROOT / "docs/inside.md").read_text(encoding="utf-8")
    for pair, values in found.items():
        middle, most = statistics.median(values), sum(value >= 0.995 for value in values)
        assert f"| {names[pair]} | {middle:.3f} | {min(values):.3f} | {most} of {len(values)} |" in page


def test_the_tables_of_what_was_measured_inside_are_the_committed_results() -> None:
    import csv

    def result(name: str) -> list[dict[str, str]]:
        with (ROOT / f"benchmarks/results/{name}.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    text = (ROOT / "docs/inside.md").read_text(encoding="utf-8")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    shots = {(r["method"], r["keep"], r["shots"]): r for r in result("icl-nvidia-h200")}
    lines = [row for row in cells if len(row) == 8 and row[0].startswith("`")]
    assert 5 * len(lines) == len(shots)
    for name, *right, prefill, kv in lines:
        method, _, keep = name.replace("`", "").partition(" ")
        for number, cell in zip(("0", "1", "2", "4", "8"), right, strict=True):
            row = shots[method, keep or "1", number]
            accuracy, _, difference = cell.partition(" ")
            assert float(accuracy) == pytest.approx(float(row["accuracy"]), abs=5.1e-4)
            clear = method != "dense" and float(row["to_dense_low"]) * float(row["to_dense_high"]) > 0
            assert bool(difference) == clear, (name, number)
            if clear:
                assert float(difference.strip("()")) == pytest.approx(float(row["to_dense"]), abs=5.1e-4)
        assert float(prefill) == pytest.approx(float(row["prefill_ms"]), abs=0.051)
        assert float(kv) == pytest.approx(float(row["kv_kib"]), abs=0.51)
    halves = result("corematching-decode-h200")
    lines = [row for row in cells if len(row) == 3 and row[1][0].isdigit()]
    assert len(lines) == 12
    for label, *shown in lines:
        what, _, how = label.partition(", ")
        beta = re.search(r"beta (.*)", label)
        kind = ("sparse_ffn" if "sparse" in how else "gathered") if beta else how.partition(" ")[0]
        for cell, shape in zip(shown, ("llava-1.5-7b", "qwen2.5-vl-7b"), strict=True):
            row = next(
                r
                for r in halves
                if r["shape"] == shape
                and (
                    (r["what"], r["beta"]) == (f"ffn {kind}", beta[1])
                    if beta
                    else re.match(
                        {"tokens": f"{what} tokens$", "neurons,": f"{what} neurons, (32 of 32|28 of 28)"}.get(
                            kind, rf"{what} tokens\+neurons, (32 of 32|28 of 28)"
                        ),
                        r["what"],
                    )
                )
            )
            times, dense, sparse = (float(x) for x in re.findall(r"\d+\.?\d*", cell)[:3])
            assert times == pytest.approx(float(row["speedup"]), abs=6e-3), (label, shape)
            assert (dense, sparse) == pytest.approx((float(row["dense"]), float(row["sparse"])), rel=2e-3)


def test_the_premise_of_corematching_is_told_as_measured() -> None:
    import csv

    text = (ROOT / "docs/inside.md").read_text(encoding="utf-8")
    with (ROOT / "benchmarks/results/corematching-premise-cpu.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["chosen_by"] == "top quarter"]
    own, by_chance = (
        [float(r[f"active_in_core_{which}"]) for r in rows if r["layer"] != r["matching_layer"]]
        for which in ("core", "random")
    )
    here = next(r for r in rows if r["layer"] == r["matching_layer"])
    assert f"{float(here['active_in_core_core']):.3f} for the" in text
    assert f"against {float(here['active_in_core_random']):.3f} for as many" in text
    assert f"{min(own):.3f} to {max(own):.3f} against {min(by_chance):.3f} to {max(by_chance):.3f}" in text.replace(
        "\n", " "
    )


def test_the_tables_of_the_board_are_the_committed_results() -> None:
    from benchmarks import board as script

    page = (ROOT / "docs/board.md").read_text(encoding="utf-8")
    made = script.below_the_mark(ROOT / "benchmarks/results/board-nvidia-h100-80gb-hbm3")
    assert page.split(script.MARK)[1].strip() == made.strip()

# SPDX-License-Identifier: Apache-2.0
"""What the documents show works, and what they list is complete."""

from __future__ import annotations

import re
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
    with (ROOT / "benchmarks/results/endtoend-nvidia-h200.csv").open(encoding="utf-8") as file:
        rows = {(r["preset"], r["compile"], r["method"]): r for r in csv.DictReader(file)}
    methods = [name.strip().replace("`", "").replace("usual loop", "naive loop") for name in cells[at][1:]]
    keys = ("llava", "graph"), ("llava-batch", ""), ("next", ""), ("next", "graph"), ("qwen-4k", ""), ("qwen-16k", "")
    for key, (_, *shown) in zip(keys, cells[at + 2 :], strict=False):
        for method, text in zip(methods, shown, strict=True):
            row = rows.get((*key, method))
            digits = 0 if row and float(row["ttft_ms_p50"]) >= 100 else 1
            told = "–"
            if row is not None:
                told = f"{float(row['ttft_ms_p50']):.{digits}f} ({float(row['lm_ms_p50']):.{digits}f})"
            assert text.strip() == told, (key, method)


def test_the_tables_of_the_lens_are_the_committed_results() -> None:
    import csv

    def result(name: str) -> list[dict[str, str]]:
        with (ROOT / f"benchmarks/results/lens-{name}-pocket-llava-cpu.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def shows(cell: str, *wanted: str) -> None:
        """A cell has the value first; and if there is an interval, then that of the value."""
        numbers = [float(x) for x in re.findall(r"-?\d\.\d+|-?\d+", cell)]
        for number, full in zip(numbers, wanted, strict=False):
            assert number == pytest.approx(float(full), abs=5.1e-3), (cell, wanted)

    text = (ROOT / "docs/lens.md").read_text(encoding="utf-8")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    words = {(r["layer"], r["attribute"]): r for r in result("words") if r["top"] == "5"}
    lines = [row for row in cells if len(row) == 5 and row[0].isdigit()]
    assert len(lines) == 5
    for layer, *shown in lines:
        for attribute, (hit, chance) in {"shape": shown[:2], "color": shown[2:]}.items():
            row = words[layer, attribute]
            shows(hit, row["hit"], row["hit_low"], row["hit_high"])
            shows(chance, row["chance"], row["chance_low"], row["chance_high"])
    removed = {(r["removed"], r["what"].partition(",")[0]): r for r in result("remove")}
    for label, key in {
        "nothing": ("nothing", "dense"),
        "the picture": ("everything", "question-only"),
        "ViT sink": ("vit_sink", "the class"),
        "as many others at random": ("vit_sink", "as many others"),
        "dead": ("dead", "the class"),
        "dead and sink": ("dead,sink", "the class"),
        "all but dead and sink": ("dead,sink", "all but the class"),
    }.items():
        row = removed[key]
        _, tokens, right, against = next(r for r in cells if len(r) == 4 and r[0] == label)
        assert int(tokens) == round(float(row["tokens"])), label
        shows(right, row["accuracy"], row["low"], row["high"])
        shows(against, row["to_dense"], row["to_dense_low"], row["to_dense_high"])
    right = next(r for r in cells if len(r) == 7 and r[0] == "right")
    for row in (r for r in result("inject") if r["kind"] == "all"):
        shows(right[1 + int(row["layer"])], row["accuracy"], row["low"], row["high"])
    held = {(r["kind"], r["measure"]): r for r in result("patches")}
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


def test_the_tables_of_the_lens_on_qwen_are_the_committed_results() -> None:
    import csv

    def result(name: str) -> list[dict[str, str]]:
        with (ROOT / f"benchmarks/results/lens-{name}-pocket-qwen2.5-vl-cpu.csv").open(encoding="utf-8") as file:
            return list(csv.DictReader(file))

    text = (ROOT / "docs/lens.md").read_text(encoding="utf-8")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    removed = {(r["removed"], r["what"].partition(",")[0]): r for r in result("remove")}
    for label, key in {
        "nothing of 144": ("nothing", "dense"),
        "all of 144": ("everything", "question-only"),
        "the dead of 144": ("dead", "the class"),
        "as many of 144 at random": ("dead", "as many of all tokens"),
        "all but the dead of 144": ("dead", "all but the class"),
    }.items():
        row, (_, tokens, right, against) = removed[key], next(r for r in cells if r[0] == label)
        assert int(tokens) == round(float(row["tokens"]))
        for cell, names in (
            (right, ("accuracy", "low", "high")),
            (against, ("to_dense", "to_dense_low", "to_dense_high")),
        ):
            numbers = [float(x) for x in re.findall(r"-?\d\.\d+", cell)]
            assert numbers == pytest.approx([float(row[n]) for n in names][: len(numbers)], abs=5.1e-3), label
    shown = next(r for r in cells if r[0] == "right of 48")
    for row in (r for r in result("inject") if (r["way"], r["kind"]) == ("enter before", "all")):
        numbers = [float(x) for x in re.findall(r"\d\.\d+", shown[1 + int(row["layer"])])]
        assert numbers == pytest.approx([float(row[n]) for n in ("accuracy", "low", "high")], abs=5.1e-3)


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
    from vtprune.eval import board

    rows = board.from_csv(ROOT / "benchmarks/results/board-nvidia-h200/overall.csv")
    page = (ROOT / "docs/board.md").read_text(encoding="utf-8")
    assert page.split(script.MARK)[1].strip() == script.tables(rows).strip()

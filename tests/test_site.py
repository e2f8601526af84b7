# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, every method has its page, and what pages show is what happens today."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "docs" / "methods"


def test_every_method_has_a_page_and_a_picture() -> None:
    from docs.tools import pages

    known = json.loads(pages.KEPT.read_text(encoding="utf-8"))
    for name, cls in pages.ours().items():
        page = ROOT / "docs" / pages.page_of(name)
        assert page.is_file(), f"{name} has no docs/{pages.page_of(name)}; docs/add-a-method.md says what it must have"
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [*pages.SECTIONS], name
        assert text.startswith(f"# {name}: ")
        if cls.training_free or name in known:  # one that must be trained first may have nothing to show yet
            assert f"](img/{Path(pages.picture_of(name)).name})" in text
            assert (ROOT / "docs" / pages.picture_of(name)).is_file() and name in known, (
                f"{name} has no picture; run python -m docs.tools.pictures {name}"
            )


def test_pages_say_what_the_class_and_the_results_say() -> None:
    from docs.tools import pages, tables

    page = pages.complete("idpruner", (METHODS / "idpruner.md").read_text(encoding="utf-8"))
    assert "144 of" not in page and "64 of 576 visual tokens" in page
    assert "| `mmr_lambda` | `0.5` | In [0, 1]; 1 is importance alone" in page
    assert "- **looks at the question**: no" in page and "The authors keep `round(N * keep)` tokens" in page
    rows = {(r["method"], r["keep"]): r for r in tables.rows("accuracy-clutter-cpu.csv")}
    assert f"{100 * float(rows['idpruner', '1/9']['accuracy']):.1f} ± " in page
    times = tables.rows("endtoend-nvidia-h100-80gb-hbm3.csv")
    speed = next(r for r in times if (r["preset"], r["method"], r["compile"]) == ("llava", "idpruner", ""))
    assert f"| `idpruner` | 1/9 | {float(speed['ttft_ms_p50']):.1f} |" in page
    overall = {(r["model"], r["method"], r["keep"]): r for r in tables.rows("board-nvidia-h100-80gb-hbm3/overall.csv")}
    share = 100 * float(overall["pocket-llava", "fastv", "1/18"]["relative"])
    assert re.search(rf"\| pocket-llava \| `fastv` \|.*\| {share:.1f} ± [\d.]+ \|\n", tables.of_method("fastv"))
    assert tables.board("worst") == ""
    assert "prumerge+" in pages.complete("prumerge+", "# prumerge+: x\n") and "`worst" not in tables.of_method("norm")


def test_tables_of_the_chooser_have_every_row_of_the_results() -> None:
    from docs.tools import tables

    table = tables.accuracy()
    for row in tables.rows(tables.accuracy_file()):
        if row["keep"] == tables.keeps(tables.rows(tables.accuracy_file()))[-1]:
            assert f"| {tables.code(row['method'])} |" in table
    for name in re.findall(r"<!-- table: ([\w-]+) -->", (ROOT / "docs/which-method.md").read_text(encoding="utf-8")):
        assert tables.TABLES[name]().startswith(("|", "llava")), name


@pytest.mark.parametrize("method", ["idpruner", "norm", "divprune", "fastv", "tome"])
def test_pictures_show_what_is_kept_today(method: str) -> None:
    from docs.tools import pages, pictures

    known = json.loads(pages.KEPT.read_text(encoding="utf-8"))[method]
    assert pictures.facts(method) == known, f"run python -m docs.tools.pictures {method}"


def test_the_quick_start_prints_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    source, said = re.search(r"```python\n(from PIL.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    source = source.replace("examples/shapes.png", str(ROOT / "examples/shapes.png"))
    exec(source.replace('"kept.png"', repr(str(tmp_path / "kept.png"))), {})
    assert capsys.readouterr().out == said
    assert (tmp_path / "kept.png").is_file()


def test_the_notebook_gives_what_it_shows() -> None:
    from docs.tools import notebook

    book = json.loads(notebook.BOOK.read_text(encoding="utf-8"))
    assert notebook.BOOK.stat().st_size < 300_000

    def texts(cells: list[dict]) -> list[str]:
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        return ["".join(o.get("text", o.get("data", {}).get("text/plain", []))) for o in outputs]

    ran = notebook.run(book)
    assert texts(ran["cells"]) == texts(book["cells"])
    assert "```text\n" in notebook.markdown(json.dumps(book)) and all(c["id"] for c in book["cells"])


def test_the_serving_guide_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    source = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    exec(source, {})
    assert f"# {capsys.readouterr().out.strip()}" == source.splitlines()[-1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {
        str(path.relative_to(tmp_path).parent): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    assert "methods/prumerge-plus" in pages and "benchmarks" in pages and "lens-notebook" in pages
    assert "<math" in pages["methods/zoo"] and "Our numbers" in pages["methods/zoo"]
    assert 'id="vtprune.api.apply"' in pages["reference/api"]
    assert (tmp_path / "benchmarks/results/accuracy-cpu.csv").is_file()
    for name, text in pages.items():
        assert "<!-- table" not in text, name
        for formula in re.findall(r"<math.*?</math>", text, re.DOTALL):
            assert "\\" not in formula, (name, formula)  # a command that the converter does not know
        # Nothing is loaded from anywhere else; links to read are another matter.
        assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="https?://', text), name

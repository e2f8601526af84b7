# SPDX-License-Identifier: Apache-2.0
"""Runs a notebook without Jupyter, and makes a page of it.

    python -m docs.tools.notebook            # run docs/lens.ipynb and write its outputs into it

Cells run one after the other in one namespace; what is printed, and the value of a cell's last line, become its output.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

BOOK = Path(__file__).parents[1] / "lens.ipynb"


def run(book: dict[str, Any]) -> dict[str, Any]:
    """A copy of a notebook with the outputs that its code gives today."""
    book = json.loads(json.dumps(book))
    names: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        count += 1
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(tree, f"<cell {count}>", "exec"), names)
            value = (
                None if last is None else eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), names)
            )
        cell["execution_count"] = count
        cell["outputs"] = []
        if said.getvalue():
            text = said.getvalue().splitlines(keepends=True)
            cell["outputs"].append({"name": "stdout", "output_type": "stream", "text": text})
        if value is not None:
            data = {"data": _shown(value), "execution_count": count, "metadata": {}, "output_type": "execute_result"}
            cell["outputs"].append(data)
    return book


def _shown(value: Any) -> dict[str, Any]:
    """A value as a notebook shows it: a picture, a table, or text."""
    shown: dict[str, Any] = {"text/plain": [repr(value)]}
    if hasattr(value, "save") and hasattr(value, "quantize"):  # a picture
        with io.BytesIO() as file:
            value.save(file, "JPEG", quality=70)
            shown["image/jpeg"] = base64.b64encode(file.getvalue()).decode()
        shown["text/plain"] = [f"<picture of {value.width} x {value.height}>"]
    elif hasattr(value, "_repr_html_"):
        shown["text/html"] = value._repr_html_().splitlines(keepends=True)
    return shown


def markdown(text: str) -> str:
    """A notebook as a page in Markdown."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/jpeg" in data:
                parts.append(f'<img src="data:image/jpeg;base64,{data["image/jpeg"]}" alt="What the cell above draws">')
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                said = "".join(output.get("text", data.get("text/plain", [])))
                parts.append(f"```text\n{said.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> int:
    book = run(json.loads(BOOK.read_text(encoding="utf-8")))
    BOOK.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

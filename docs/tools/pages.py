# SPDX-License-Identifier: Apache-2.0
"""The page of a method: what a person wrote in `docs/methods/`, and under it what the class and the results say."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import vtprune
from vtprune.models import served
from vtprune.registry import Pruner

from . import tables

DOCS = Path(__file__).parents[1]
#: What the words of `vtprune.models.served` mean here.
RUNS = {"yes": "runs on", "stand-in": "runs, with something in place of the CLS token, on", "no": "refused on"}
#: What `pictures` drew.
KEPT = DOCS / "methods" / "kept.json"
#: Sections that the written half of a page must have.
SECTIONS = ("Idea", "Formula", "Cost")


def ours() -> dict[str, type[Pruner]]:
    """The methods of this package by name."""
    return {n: cls for n, cls in vtprune.methods().items() if cls.__module__.startswith("vtprune.")}


def page_of(method: str) -> str:
    """File of a method's page, below `docs`."""
    return f"methods/{method.replace('+', '-plus')}.md"


def picture_of(method: str) -> str:
    """File of a method's picture, below `docs`."""
    return page_of(method).replace("methods/", "methods/img/").replace(".md", ".webp")


def complete(method: str, written: str) -> str:
    """The whole page in Markdown."""
    cls = ours()[method]
    # What the picture shows goes under it.
    written = re.sub(r"^!\[.*\)$", lambda match: f"{match[0]}\n\n{caption(method)}", written, flags=re.MULTILINE)
    parts = [written.rstrip(), "## In vtprune", _facts(cls), _options(cls)]
    if differs := _paper(cls):
        parts += ["## The paper, and what differs here", differs]
    parts += ["## Our numbers", tables.of_method(method)]
    return "\n\n".join(parts) + "\n"


def caption(method: str) -> str:
    """What the picture of a method shows."""
    fact = json.loads(KEPT.read_text(encoding="utf-8"))[method]
    where = {"projector": "go before the language model"}
    stages = " and ".join(
        where.get(s, f"sit out the {s}" if s.startswith("attention") else f"go after {s}") for s in fact["stages"]
    )
    return (
        f"*`{fact['model']}` on {fact['prompt']}, asked “{fact['question']}”. With `keep={fact['keep']}`, "
        f"{fact['tokens_out']} of {fact['tokens_in']} visual tokens are left; the others {stages}.*"
    )


def _facts(cls: type[Pruner]) -> str:
    """What the class declares, and who serves it."""
    pruner: Any = cls
    kinds: dict[str, list[str]] = {}
    for family, word in served(cls).items():
        kinds.setdefault(word, []).append(f"`{family}`")
    yes_no = {True: "yes", False: "no"}
    facts = {
        "prunes": ", ".join(pruner.modality),
        "chooses by": ", ".join(pruner.mechanism) or "nothing of the picture's content, or each token by itself",
        "looks at the question": yes_no[pruner.query_aware],
        "needs no training": yes_no[pruner.training_free],
        "finds its own count": yes_no[pruner.adaptive],
        "spreads its budget": f'`allocation="{pruner.allocation}"`',
        **{RUNS[word]: ", ".join(names) for word, names in kinds.items()},
        "source": f"`{cls.__module__.replace('.', '/')}.py`",
    }
    return "\n".join(f"- **{name}**: {text}" for name, text in facts.items())


def _options(cls: type[Pruner]) -> str:
    """The options with what the docstring says of them."""
    about = _parameters(inspect.getdoc(cls) or "")
    fields = [f for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    if not fields:
        return "It has no options."
    body = [[f"`{f.name}`", f"`{f.default!r}`".replace("'", '"'), about.get(f.name, "")] for f in fields]
    return tables.markdown(["option", "default", "meaning"], body)


def _parameters(doc: str) -> dict[str, str]:
    """What the section Parameters of a NumPy docstring says, by name; each on one line."""
    section = re.search(r"^Parameters\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    about: dict[str, str] = {}
    for names, text in re.findall(r"^(\S.*)\n((?:[ \t]+.*\n?|\n)*)", section[1] if section else "", re.MULTILINE):
        line = " ".join(text.split()).replace("``", "`").replace("|", "\\|")
        about.update(dict.fromkeys(re.split(r",\s*", names.split(":")[0].strip()), line))
    return about


def _paper(cls: type[Pruner]) -> str:
    """The docstring from its paragraph about the paper on, as Markdown."""
    doc = re.split(r"^\w+\n-{3,}\n", inspect.getdoc(cls) or "", flags=re.MULTILINE)[0]
    start = re.search(r"^Paper: ", doc, re.MULTILINE)
    text = doc[start.start() :].strip() if start else ""
    text = re.sub(r"arXiv:? ?(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"(?<![(/])https://arxiv\.org/abs/(\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)
    return text.replace("::\n", ":\n").replace("``", "`")

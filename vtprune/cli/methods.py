# SPDX-License-Identifier: Apache-2.0
"""``vtprune methods``."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ..errors import ConfigError
from .common import app, one_line, plain_table

if TYPE_CHECKING:
    from ..registry import Pruner

#: What the words of `vtprune.models.served` mean.
SERVED = {
    "yes": "the conformance suite runs it, with all that it asks of the encoder",
    "stand-in": "it runs, too; without a CLS token something else takes its place",
    "no": "refused, because the encoder lacks what the method needs, or its layers lie too low (name others)",
    "untested": "a method of another package",
}


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its options.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """List the pruning methods: what they declare, and how each family serves them."""
    from ..registry import methods as known
    from ..registry import nearest

    table = known()
    if name is not None and name not in table:
        raise ConfigError(f"unknown method {name!r}{nearest(name, list(table))}; known methods: {', '.join(table)}")
    found = {n: _describe(cls) for n, cls in table.items() if name in (None, n)}
    if as_json:
        print(json.dumps(found, default=str))
    else:
        _print_methods(found, in_full=name is not None)


def _describe(cls: type[Pruner]) -> dict[str, Any]:
    """All that there is to say about a method."""
    from ..models import served
    from ..registry import DECLARED

    # [text before the first section, heading, section, heading, section, ...]
    parts = re.split(r"^(\w+)\n-{3,}\n", inspect.cleandoc(cls.__doc__ or ""), flags=re.MULTILINE)
    section = dict(zip(parts[1::2], parts[2::2], strict=True)).get("Parameters", "")
    about: dict[str, str] = {}
    for names, text in re.findall(r"^(\S.*)\n((?:[ \t]+.*\n?|\n)*)", section, re.MULTILINE):
        about.update(dict.fromkeys(re.split(r",\s*", names.split(":")[0].strip()), one_line(text).replace("`", "")))
    options: dict[str, dict[str, Any]] = {}
    for field in (f for f in fields(cls) if f.init):  # type: ignore[arg-type]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        options[field.name] = {"about": about.get(field.name, "")}
        options[field.name] |= {} if default is MISSING else {"default": default}
    return {
        "about": one_line(parts[0].split("\n\n")[0]).replace("`", ""),
        "paper": cls.paper,
        **{word: getattr(cls, word) for word in DECLARED},
        "families": served(cls),
        "options": options,
    }


def _print_methods(found: dict[str, dict[str, Any]], in_full: bool) -> None:
    """Tables of what `_describe` found; `in_full` with what each does and its options."""
    console = Console(highlight=False, markup=False)
    for name, method in found.items() if in_full else ():
        console.print(Text.assemble((name, "bold"), "  ", method["about"], "\n"))
        options = plain_table("option", "default", "meaning")
        for option, facts in method["options"].items():
            default = json.dumps(facts["default"], default=str) if "default" in facts else "required"
            options.add_row(option, default, facts["about"])
        console.print(options if options.row_count else "It has no options.")
        console.print()
    flags = ("query_aware", "training_free", "adaptive")
    declared = plain_table("method", "mechanism", "query\naware", "training\nfree", "adaptive", "paper")
    alike: dict[tuple[str, ...], list[str]] = {}  # families that all methods here serve alike share a column
    for kind in next(iter(found.values()))["families"]:
        alike.setdefault(tuple(method["families"][kind] for method in found.values()), []).append(kind)
    served = plain_table("method", "modality", *("\n".join(kinds) for kinds in alike.values()))
    for name, method in found.items():
        mechanism, modality = (", ".join(method[kind]) for kind in ("mechanism", "modality"))
        yes_no = ["yes" if method[flag] else "no" for flag in flags]
        declared.add_row(name, mechanism or "none", *yes_no, method["paper"])
        served.add_row(name, modality, *(method["families"][kinds[0]] for kinds in alike.values()))
    for table in (declared, served):
        console.print(table)
        console.print()
    met = {word for method in found.values() for word in method["families"].values()}
    for word in (word for word in SERVED if word in met):
        console.print(f"{word}: {SERVED[word]}", style="dim")

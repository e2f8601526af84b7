# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does besides: method pages, tables, the notebook, formulas, files of the repository that are linked."""

from __future__ import annotations

import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from docs.tools import notebook, pages, tables  # noqa: E402

#: Pages of the repository that are in the navigation; any other file that a page links to is published as it is.
REPOSITORY = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])|(?<=src=\")([^\":]+)(?=\")")


def on_config(config: Any) -> Any:
    """A place in the navigation for each method, and for pages that nobody placed."""
    groups: dict[str, list[Any]] = {}
    for entry in config.nav:
        groups |= {title: group for title, group in entry.items() if isinstance(group, list)}
    groups["Each method"] += [{name: pages.page_of(name)} for name in pages.ours()]
    placed = str(config.nav)
    for path in sorted((ROOT / "docs").glob("*.md")):
        if f"'{path.name}'" not in placed:
            groups["Guides"].append(path.name)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to, and check that every method has a page and a picture."""
    for name, cls in pages.ours().items():
        # A method that must be trained first may have nothing to show yet.
        for wanted in (pages.page_of(name), *([pages.picture_of(name)] if cls.training_free else ())):
            if files.get_file_from_path(wanted) is None:
                raise PluginError(f"method {name} has no docs/{wanted}; see docs/add-a-method.md")
    known = {pages.page_of(name) for name in pages.ours()}
    for file in list(files):  # a page may be written before its method
        if file.src_uri.startswith("methods/") and file.src_uri.endswith(".md") and file.src_uri not in known:
            files.remove(file)
    book = files.get_file_from_path("lens.ipynb")
    if book is not None:  # a page like any other
        files.remove(book)
        text = notebook.markdown((ROOT / "docs/lens.ipynb").read_text(encoding="utf-8"))
        page = File.generated(config, "lens-notebook.md", content=text)
        files.append(page)
    queue = [*(_add(files, config, path) for path in REPOSITORY), *(f for f in files if f.is_documentation_page())]
    done = set()
    while queue:
        file = queue.pop()
        if file.src_uri in done:
            continue
        done.add(file.src_uri)
        for target in _targets(file.content_string, file.src_uri):
            if files.get_file_from_path(target) is None and not target.startswith("docs/"):
                queue.append(_add(files, config, target)) if target.endswith(".md") else _add(files, config, target)
    return files


def _add(files: Files, config: Any, path: str) -> File:
    file = File(path, str(ROOT), config.site_dir, config.use_directory_urls)
    files.append(file)
    return file


def _home(src: str) -> str:
    """Where a page of the site lies in the repository."""
    return src if src in REPOSITORY or not (ROOT / "docs" / src).exists() else f"docs/{src}"


def _place(target: str, src: str) -> str:
    """What a link leads to, as a path of the site."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(_home(src)), target))
    return path.removeprefix("docs/")


def _targets(text: str, src: str) -> set[str]:
    """Files of the repository that a page links to, as paths of the site."""
    found = {_place(match[0], src) for match in _LINK.finditer(_without_code(text))}
    return {target for target in found if (ROOT / target).is_file()}


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Complete method pages, put tables in, and turn links within the repository into links within the site."""
    src = page.file.src_uri
    method = next((name for name in pages.ours() if pages.page_of(name) == src), None)
    if method is not None:
        markdown = pages.complete(method, markdown)
    markdown = re.sub(r"<!-- table: ([\w-]+) -->", lambda match: tables.TABLES[match[1]](), markdown)

    def moved(match: re.Match[str]) -> str:
        place = _place(match[0], src)
        if place == "lens.ipynb":
            place = "lens-notebook.md"
        if files.get_file_from_path(place) is None:
            return match[0]
        if match[2] and not place.endswith(".md"):  # of HTML, which mkdocs leaves alone
            return _url(place, page)
        return posixpath.relpath(place, posixpath.dirname(src) or ".")

    # Code is text, whatever it looks like.
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else _LINK.sub(moved, part) for i, part in enumerate(parts))


def _url(place: str, page: Any) -> str:
    return posixpath.relpath(place, page.url if page.url.endswith("/") else posixpath.dirname(page.url) or ".")


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which browsers draw without a script."""

    def drawn(match: re.Match[str]) -> str:
        tex = html.unescape(match[3])
        return convert(tex, display="block" if match[2] == "[" else "inline")

    pattern = r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>'
    return re.sub(pattern, drawn, content, flags=re.DOTALL)

# SPDX-License-Identifier: Apache-2.0
"""Every tab in a headless Chromium: what users do, with mouse, finger and keyboard; no error in the console."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vtprune.demo import scenes

from .conftest import SHOTS, Server

pytest.importorskip("playwright")

WAIT = 60_000
#: Milliseconds from an input of the slider to the changed picture, in the page's own clock.
TIMER = """() => {
  const keep = document.querySelector('#ask-keep input[type=range]'), shown = document.querySelector('#ask-overlay');
  window.waits = [];
  window.answered = [];
  let start = null, wanted = '';
  keep.addEventListener('input', () => {
    start = performance.now();
    wanted = `keeps ${Math.floor(576 * keep.value / 100 + 1e-6)} of`;
  }, true);
  new MutationObserver(() => {
    if (start === null || !shown.querySelector('img')?.alt.includes(wanted)) return;
    window.waits.push(performance.now() - start);
    window.answered.push(document.querySelector('#ask-answers').innerText);
    start = null;
  }).observe(shown, {childList: true, subtree: true, attributes: true});
}"""


@pytest.fixture
def page(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page that has loaded; afterwards its console must be clean."""
    settings = getattr(request, "param", {"viewport": {"width": 1280, "height": 900}})
    context = browser.new_context(**settings)
    opened = context.new_page()
    opened.set_default_timeout(WAIT)
    bad: list[str] = []
    opened.on("console", lambda message: bad.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: bad.append(str(error)))
    abroad: list[str] = []
    opened.on(
        "request", lambda r: abroad.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else None
    )
    opened.goto(server.url)
    ready(opened)
    yield opened
    context.close()
    assert bad == []
    assert [url for url in abroad if not url.startswith("about:")] == []  # nothing is fetched from anywhere else


def ready(page: Any) -> None:
    """Wait until the page has narrowed its methods to those of the model, which is there by then."""
    page.locator("#picture img").wait_for()
    page.locator("#ready").wait_for(state="attached")


def open_tab(page: Any, name: str) -> None:
    """Tabs that do not fit are in a menu."""
    tab = page.get_by_role("tab", name=name)
    if not tab.first.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(name).click()
    else:
        tab.first.click()


def ask(page: Any) -> list[str]:
    """Ask, and return both answers."""
    page.locator("#ask-go").click()
    page.locator("#ask-answers [aria-busy=false]").wait_for()
    return answers(page, "#ask-answers")


def answers(page: Any, where: str) -> list[str]:
    return [re.sub(r"[✓✗].*", "", text).strip() for text in page.locator(f"{where} .vt-answer").all_inner_texts()]


def kept(page: Any, where: str = "#ask-overlay") -> int:
    alt = page.locator(f"{where} img").get_attribute("alt")
    return int(re.search(r"keeps (\d+) of", alt)[1])


def shoot(page: Any, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, scenes.Scene]:
    """A file with a picture that the demo has not seen."""
    scene = scenes.draw("basic", 777)
    scene.picture.save(tmp_path / "mine.png")
    return tmp_path / "mine.png", scene


def test_upload_ask_and_slide(page: Any, picture: tuple[Path, scenes.Scene]) -> None:
    path, scene = picture
    page.locator("#picture input[type=file]").set_input_files(path)
    page.locator("#known").wait_for(state="hidden")  # nothing is known about pictures of users
    question, answer = next((q, a) for q, a in scene.answers.items() if q.startswith("what color"))
    page.get_by_label("Question", exact=True).fill(question)
    assert ask(page) == [answer, answer]
    cost = dict(re.findall(r"^([^\t]+)\t(.*)$", page.locator("#ask-answers table").inner_text(), re.MULTILINE))
    assert cost["visual tokens"].split() == ["576", "144", "25%"] and kept(page) == 144
    assert 0 < float(cost["LLM prefill, GFLOP"].split()[1]) < float(cost["LLM prefill, GFLOP"].split()[0])
    shoot(page, "ask")

    # The slider, by keyboard: the picture follows at once, without waiting for the answer.
    page.evaluate(TIMER)
    slider = page.locator("#ask-keep input[type=range]")
    slider.focus()
    for step in range(1, 6):
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"window.waits.length >= {step}")
        page.locator(f"#ask-overlay img[alt*='keeps {576 * (25 + step) // 100} of']").wait_for()
    page.locator("#ask-answers table td", has_text=re.compile("^172$")).wait_for()  # 30 %
    assert answers(page, "#ask-answers")[0] == answer  # the dense one stays
    waits = page.evaluate("window.waits")
    print("ms from slider to picture:", [round(wait) for wait in waits])
    # 150 ms where nothing else runs. When a picture came, the answer of its count had not.
    for step, text in enumerate(page.evaluate("window.answered"), 1):
        assert not re.search(rf"visual tokens\s+576\s+{576 * (25 + step) // 100}\b", text)

    # Another method is another picture, by the same way.
    page.locator("#ask-method input").click()
    page.get_by_role("option", name="fastv").click()
    page.locator("#ask-overlay", has_text="known with the answer").wait_for()
    page.locator("#ask-overlay img[alt*='fastv keeps 172 of']").wait_for()


def test_compare(page: Any) -> None:
    before = page.locator("#picture img").get_attribute("src")
    page.locator("#make-scene").click()
    page.wait_for_function("before => document.querySelector('#picture img')?.src !== before", arg=before)
    page.locator("#known").wait_for()
    open_tab(page, "Compare")
    page.locator("#compare-go").click()
    page.locator("#compare-orders img").nth(2).wait_for()
    rows = page.locator("#compare-table tbody tr").all_inner_texts()
    assert [row.split("\t")[0] for row in rows] == ["all tokens", "idpruner", "divprune", "norm"]
    assert all(re.search(r"(right|wrong)\s+\d of \d", row) for row in rows), rows
    good, asked = map(int, re.search(r"(\d) of (\d)", rows[0]).groups())
    assert good >= asked - 2 and asked >= 3  # with all tokens the model is right about nearly everything
    alt = page.locator("#compare-picture img").get_attribute("alt")
    assert alt.count("keeps 144 of 576") == 3
    shoot(page, "compare")


def test_lens(page: Any) -> None:
    open_tab(page, "Lens")
    page.locator("#lens-go").click()
    inside = page.frame_locator("#lens-page iframe")
    inside.locator("rect.token").nth(300).hover()
    tip = inside.locator("#tip")
    tip.wait_for()
    name, *words = tip.inner_text().split("\n")
    assert name in ("alive", "dead", "ViT sink", "LLM sink") and len(words) >= 5
    first = tip.inner_text()
    inside.locator("rect.token").nth(40).click()
    inside.locator("#layer").fill("0")  # the tooltip follows the layer
    assert tip.is_visible() and tip.inner_text() != first
    place = inside.locator("#where").inner_text()
    inside.locator("svg").focus()
    page.keyboard.press("ArrowDown")
    assert inside.locator("#where").inner_text() != place
    shoot(page, "lens")


def test_video(page: Any) -> None:
    open_tab(page, "Video")
    page.locator("#clip-example").click()
    page.locator("#clip video").wait_for()
    page.locator("#clip-known").wait_for()
    page.locator("#clip-go").click()
    page.locator("#clip-answers [aria-busy=false]").wait_for()
    known = page.locator("#clip-answers .vt-hint b").inner_text()
    assert answers(page, "#clip-answers")[0] == known
    assert kept(page, "#clip-strip") == 128
    shoot(page, "video")


def test_video_upload(page: Any, tmp_path: Path) -> None:
    pytest.importorskip("av")
    from vtprune import video

    clip = scenes.clip(5)
    video.write(tmp_path / "mine.webm", clip.frames, fps=2, codec="libvpx-vp9")
    open_tab(page, "Video")
    page.locator("#clip input[type=file]").set_input_files(tmp_path / "mine.webm")
    page.locator("#clip video").wait_for()
    page.locator("#clip-question textarea").fill("how many objects appear ?")
    page.keyboard.press("Enter")
    page.locator("#clip-answers [aria-busy=false]").wait_for()
    assert answers(page, "#clip-answers")[0] == clip.answers["how many objects appear ?"]
    slider = page.locator("#clip-keep input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.locator("#clip-strip img[alt*='keeps 122 of']").wait_for()


def test_board(page: Any) -> None:
    open_tab(page, "Board")
    plot = page.locator("#board-plot svg")
    plot.wait_for()
    page.locator("#picture").wait_for(state="hidden")  # the panel before it goes a moment later on a busy machine
    assert "idpruner" in plot.get_attribute("aria-label")
    before = plot.inner_html()
    page.get_by_role("radio", name="time").check()
    page.wait_for_function("before => document.querySelector('#board-plot svg').innerHTML !== before", arg=before)
    page.locator("#board-table tbody tr").nth(5).wait_for()
    shoot(page, "board")


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in a few kilobytes: it would unfold to almost 5 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_an_example_is_taken_by_a_click(page: Any) -> None:
    scene = scenes.draw("clutter", 12)
    question = page.get_by_label("Question", exact=True)
    assert question.input_value() not in scene.answers
    page.locator("#examples button").nth(1).click()
    for _ in range(300):
        if question.input_value() in scene.answers:
            break
        page.wait_for_timeout(100)
    assert question.input_value() in scene.answers
    assert ask(page)[0]
    page.get_by_text("Known answer").wait_for()


def test_what_is_refused_is_refused_in_words(browser: Any, server: Server, tmp_path: Path) -> None:
    # A page of its own: a picture that cannot be shown may be an error in the console.
    page = browser.new_context().new_page()
    page.set_default_timeout(WAIT)
    page.goto(server.url)
    ready(page)
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    for name, content, said in (
        ("bomb.png", bomb(), "far too many pixels"),
        ("text.png", b"this is no picture", "not a picture"),
        ("picture.svg", svg, "not a picture"),
    ):
        (tmp_path / name).write_bytes(content)
        page.locator("#picture input[type=file]").set_input_files(tmp_path / name)
        page.locator(".toast-body", has_text=said).first.wait_for()
        page.reload()
        ready(page)
    page.get_by_label("Question", exact=True).fill("")
    page.locator("#ask-go").click()
    page.locator(".toast-body", has_text="question is empty").first.wait_for()
    page.context.close()


PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True}


@pytest.mark.parametrize("page", [PHONE], indirect=True, ids=["390px-dark"])
def test_a_phone_in_the_dark(page: Any) -> None:
    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth") <= 390

    assert fits() and ask(page)[0]
    shoot(page, "phone-ask")
    assert fits()
    # One column: what is asked stands above what is answered, both as wide as the phone.
    above, below = (page.locator(one).bounding_box() for one in ("#picture", "#ask-go"))
    assert above["y"] + above["height"] < below["y"] and min(above["width"], below["width"]) > 300
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150
    open_tab(page, "Lens")
    page.locator("#lens-go").tap()
    inside = page.frame_locator("#lens-page iframe")
    inside.locator("rect.token").nth(200).tap()
    inside.locator("#tip span").first.wait_for()  # the browser makes a click of a tap a moment later
    assert inside.locator("#tip span").count() == 5 and fits()
    shoot(page, "phone-lens")
    open_tab(page, "Board")
    page.locator("#board-plot svg").wait_for()
    assert fits()


def test_keyboard_and_names(page: Any) -> None:
    """All controls are reached by Tab alone, and everything has a name."""
    ask(page)
    page.locator("body").click(position={"x": 2, "y": 2})
    wanted = {"#make-scene", "#question", "#model", "#ask-method", "#ask-keep", "#ask-go", "[role=tab]", "#examples"}
    reached: set[str] = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        for one in wanted - reached:
            if page.evaluate("one => !!document.activeElement.closest(one)", one):
                reached.add(one)
        if reached == wanted:
            break
    assert reached == wanted
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([type=file]), textarea, select, iframe, img')]
          .filter(e => e.offsetParent !== null)
          .filter(e => e.tagName === 'IMG' ? e.getAttribute('alt') === null
            : !(e.ariaLabel || e.title || e.innerText?.trim() || e.labels?.length || e.getAttribute('aria-labelledby')
                || e.closest('label')))
          .map(e => e.outerHTML.slice(0, 160))"""
    )
    assert nameless == []


def test_light_and_dark_are_legible(page: Any) -> None:
    """Contrast of the words that are ours, by the formula of WCAG, is at least 4.5 in both."""
    ask(page)
    for theme in ("light", "dark"):
        page.evaluate(f"document.body.classList.toggle('dark', {str(theme == 'dark').lower()})")
        for part in (".vt-answer", ".vt-right", ".vt-table tbody", ".vt-hint"):
            shot = Image.open(io.BytesIO(page.locator(f"#ask-answers {part}").first.screenshot())).convert("L")
            low, high = ((v / 255) ** 2.2 for v in shot.getextrema())
            assert (high + 0.05) / (low + 0.05) > 4.5, (theme, part)
    shoot(page, "ask-dark")

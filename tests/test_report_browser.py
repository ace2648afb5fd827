# SPDX-License-Identifier: Apache-2.0
"""The report in a real browser: two widths, both colour schemes, keyboard, print."""

import re
from contextlib import contextmanager
from itertools import pairwise

import matplotlib.image
import pytest

import browser
from report_data import MadeUp, write_export
from vsraq.report import write_report

pytestmark = pytest.mark.xdist_group("browser")  # one browser for all of them
PATIENCE = 120_000  # ms: other tests may run beside it
EVIL = "<script>alert(1)</script>"
FIGURES = 13

# elements that stick out of the window, but for those that scroll on their own
OVERFLOW = """() => [...document.querySelectorAll("body *")].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1)
    && !element.closest(".scroll, svg") && !element.closest("[hidden]");
}).map((element) => element.outerHTML.slice(0, 120))"""

# WCAG's contrast of the text of an element with what is behind it
CONTRAST = """(selector) => {
  const canvas = document.createElement("canvas").getContext(
    "2d", { willReadFrequently: true }
  );
  const light = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    const clear = colour === "transparent" || colour === "rgba(0, 0, 0, 0)";
    return clear && element.parentElement ? behind(element.parentElement) : colour;
  };
  return [...document.querySelectorAll(selector)].map((element) => {
    const style = getComputedStyle(element);
    const mine = element instanceof SVGElement ? style.fill : style.color;
    const [low, high] = [light(mine), light(behind(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    made = MadeUp({EVIL: 1.0, "AutoRound": 0.7, "VSRAQ": 0.5}, tokens=300)
    return write_report(
        [made.write(folder / "compare"), write_export(folder / "export")],
        folder / "report.html",
    )


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def opened(chromium, report):
    """Open the report; afterwards, nothing was said and nothing asked for."""

    @contextmanager
    def open_(width=1280, scheme="light"):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        said, asked = [], []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(report.as_uri())
        yield page
        context.close()
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [
            report.as_uri()
        ]

    return open_


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_it_fits_and_can_be_read(opened, width, scheme, tmp_path):
    with opened(width, scheme) as page:
        root = "document.documentElement"
        assert page.evaluate(f"{root}.scrollWidth") == width
        assert page.evaluate(OVERFLOW) == []
        boxes = page.evaluate(
            "[...document.querySelectorAll('figure > svg')].map((svg) => {"
            "const box = svg.getBoundingClientRect(); return [box.width, box.height]})"
        )
        assert len(boxes) == FIGURES
        assert min(map(min, boxes)) > 60
        assert min(box[0] for box in boxes) > 280
        texts = (
            "p, li, dd, dt, td, th, small, caption, figcaption, summary, h2, a, text"
        )
        contrasts = page.evaluate(CONTRAST, texts.replace("text", "figure svg text"))
        numbers = page.evaluate(CONTRAST, "[id*=bits] text")
        assert sorted(contrasts)[len(numbers)] >= 4.5  # but for numbers on the map
        path = tmp_path / "page.png"
        page.screenshot(path=path, full_page=True, timeout=PATIENCE)
        image = matplotlib.image.imread(path)
        assert image.shape[1] == width
        corner = image[0, 0, :3].mean()
        assert corner > 0.9 if scheme == "light" else corner < 0.1
        assert image[:, :, :3].std() > 0.03


def column(page, name):
    """The values of a column of the table of all layers, and its head."""
    table = page.locator("table.sortable").first
    head = table.locator("thead th").filter(has_text=name)
    place = head.evaluate("head => head.cellIndex") + 1
    cells = table.locator(f"tbody tr > :nth-child({place})")
    return cells.all_inner_texts(), head


def test_tables_are_sorted_by_mouse_and_by_keyboard(opened):
    with opened() as page:
        before, head = column(page, "Jaccard")
        assert column(page, "Layer")[1].get_attribute("aria-sort") == "ascending"
        head.get_by_role("button").click()
        values, _ = column(page, "Jaccard")
        assert values == sorted(before, key=float) != before
        assert head.get_attribute("aria-sort") == "ascending"
        assert column(page, "Layer")[1].get_attribute("aria-sort") is None
        assert page.locator("#said").inner_text() == "sorted by Jaccard, ascending"
        head.get_by_role("button").focus()
        page.keyboard.press("Enter")
        values, _ = column(page, "Jaccard")
        assert values == sorted(before, key=float, reverse=True)
        assert head.get_attribute("aria-sort") == "descending"
        _, head = column(page, "Method")
        head.get_by_role("button").click()
        assert set(column(page, "Method")[0][:6]) == {EVIL}


def test_values_appear_at_the_pointer(opened):
    with opened() as page:
        tip = page.locator("#tip")
        figure = page.locator("#s0-jaccard_by_layer svg")
        figure.scroll_into_view_if_needed()
        box = figure.locator("[data-tip]").nth(3).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2 + 4, box["y"] + box["height"] / 2)
        assert re.fullmatch(
            r".*, layer 3: Jaccard 0\.\d+ \(.* to .*\)", tip.inner_text()
        )
        assert EVIL in tip.inner_text()
        assert figure.locator("title").count() == 0  # no second one of the browser
        page.mouse.move(2, 2)
        assert tip.is_hidden()

        load = page.locator("#s0-expert_load_2 svg")
        load.scroll_into_view_if_needed()
        box = load.locator("[data-grid]").first.bounding_box()
        # two layers down, three experts to the right
        page.mouse.move(
            box["x"] + 3.5 / 32 * box["width"], box["y"] + 2.5 / 6 * box["height"]
        )
        assert re.fullmatch(
            r"layer 2, expert 3: [\d.]+ times the even share", tip.inner_text()
        )


def test_every_figure_has_values(opened):
    with opened() as page:
        found = page.locator("figure").evaluate_all(
            "every => every.map(figure => [figure.id,"
            "figure.querySelectorAll('svg [data-tip], svg [data-grid]').length,"
            "figure.querySelectorAll('details tbody tr').length])"
        )
        assert len(found) == FIGURES
        for name, marks, rows in found:
            assert rows >= 1, name
            # of pixels there are only the table's
            assert marks >= 1 or name == "s0-jsd_and_sampled_jsd"


def test_values_by_keyboard(opened):
    with opened() as page:
        tip, said = page.locator("#tip"), page.locator("#said")
        page.locator("#s0-dropped_ranks svg").focus()
        page.keyboard.press("ArrowRight")
        first = tip.inner_text()
        page.keyboard.press("ArrowRight")
        assert tip.inner_text() != first
        assert said.inner_text() == tip.inner_text()
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        page.locator("#s0-expert_load_0 svg").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert tip.inner_text().startswith("layer 1, expert 0: ")
        page.keyboard.press("Tab")
        assert tip.is_hidden()


def test_a_screen_reader_finds_its_way(opened):
    with opened() as page:
        levels = page.evaluate(
            "[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])"
        )
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        images = page.get_by_role("img")
        words = images.evaluate_all(
            "every => every.map(svg => ['labelledby', 'describedby'].map(name =>"
            "document.getElementById(svg.getAttribute(`aria-${name}`)).innerText))"
        )
        assert len(words) == FIGURES
        assert len({title for title, _ in words}) == FIGURES
        assert all(len(description) > 30 for _, description in words)
        assert page.locator(".scroll:not([role=region][tabindex='0'])").count() == 0
        assert page.get_by_role("region", name=re.compile("^Every layer ")).count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(opened, scheme):
    from axe_core_python.sync_playwright import Axe

    with opened(scheme=scheme) as page:
        # what is inside a figure is one image; thousands of marks would take minutes
        page.evaluate("document.querySelectorAll('svg').forEach(s => s.innerHTML = '')")
        # one table of values is like the others
        page.evaluate(
            "[...document.querySelectorAll('details tr')].slice(9)"
            ".forEach(row => row.remove())"
        )
        found = Axe().run(page, options={"resultTypes": ["violations"]})["violations"]
        assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found] == []


def test_it_prints_in_light_colours(opened):
    with opened(scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.locator("details").first.is_hidden()
        colour = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(colour) == "rgb(255, 255, 255)"
        assert page.evaluate(OVERFLOW) == []

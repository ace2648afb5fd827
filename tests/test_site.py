# SPDX-License-Identifier: Apache-2.0
"""The documentation site: built strictly, then opened page by page in a browser."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import matplotlib.image
import pytest
from mkdocs.utils.yaml import yaml_load

import browser

pytestmark = pytest.mark.xdist_group("browser")  # one build, one browser
ROOT = Path(__file__).parents[1]
PATIENCE = 120_000  # ms: other tests may run beside it
OWN = "http://localhost/"  # stands for the site in the check of links

# elements that stick out of the window, but for those inside of one that scrolls
OVERFLOW = """() => {
  const scrolls = (element) => {
    for (let e = element.parentElement; e; e = e.parentElement) {
      const style = getComputedStyle(e);
      if (style.overflowX !== "visible" || style.position === "fixed") return true;
    }
    return false;
  };
  return [...document.querySelectorAll(".md-content *, .md-header, .md-footer")]
    .filter((element) => {
      const box = element.getBoundingClientRect();
      return box.width && (box.right > innerWidth + 1 || box.left < -1)
        && !scrolls(element);
    }).map((element) => element.outerHTML.slice(0, 120));
}"""


def build(folder, config=ROOT / "mkdocs.yml"):
    # not -q: warnings that are not shown are not counted
    command = [sys.executable, "-m", "mkdocs", "build", "-f", config]
    return subprocess.run(
        [*command, "-d", folder],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def hooks():
    path = ROOT / "docs" / "hooks" / "site.py"
    spec = importlib.util.spec_from_file_location("site_hooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Links(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        self.links += [found[name] for name in ("href", "src") if found.get(name)]


def nav_pages(nav):
    for entry in nav:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else nav_pages(value)


def pages_of_the_nav():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = nav_pages(yaml_load(text)["nav"])
    return [page.removesuffix(".md") + ".html" for page in pages]


def test_every_page_is_in_the_nav(site):
    built = {str(path.relative_to(site)) for path in site.rglob("*.html")}
    assert built - {"404.html"} == set(pages_of_the_nav())


def test_every_link_and_image_is_there(site):
    pages = {path: Links(path.read_text()) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the root of a server
            continue
        here = OWN + str(path.relative_to(site))
        for link in page.links:
            url, anchor = urldefrag(urljoin(here, link))
            if not url.startswith(OWN):
                assert urlsplit(url).scheme == "https", f"{path}: {link}"
                continue
            target = site / unquote(url.removeprefix(OWN))
            there = pages.get(target)
            if not target.is_file() or (
                anchor and there is not None and unquote(anchor) not in there.ids
            ):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []


def test_every_public_name_has_its_section(site, hooks):
    ids = {i for path in site.glob("api/*.html") for i in Links(path.read_text()).ids}
    missing = [
        f"{module}.{name}"
        for module in hooks.MODULES
        for name in hooks.public_names(module)
        if f"{module}.{name}" not in ids and name != "__version__"
    ]
    assert missing == []


def test_every_room_with_public_names_is_in_the_api(hooks):
    rooms = {
        ".".join(path.relative_to(ROOT / "src").parent.parts)
        for path in (ROOT / "src" / "vsraq").rglob("__init__.py")
        if "__all__" in path.read_text()
    }
    # what only the command line and AutoRound call
    inside = {"vsraq.autoround", "vsraq.console", "vsraq.report.figures"}
    assert rooms - inside <= set(hooks.MODULES)


def test_a_dead_link_or_anchor_ends_the_build(tmp_path):
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    for own in ("docs/hooks/site.py", "paths: [src]"):
        assert own in text
    text = text.replace("docs/hooks/site.py", str(ROOT / "docs/hooks/site.py"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(
        text.replace("docs_dir: docs", f"docs_dir: {tmp_path}/docs").replace(
            "paths: [src]", f"paths: [{ROOT}/src]"
        )
    )
    faults = {
        "[a](nowhere.md)": "'nowhere.md', but the target is not found",
        "[a](#nowhere)": "'#nowhere', but there is no such anchor",
        "[a](/nowhere.md)": "absolute link '/nowhere.md'",
        "[`a`][b.c]": "'b.c'",
    }
    text = "\n\n".join(["# Title", *faults])
    (tmp_path / "docs" / "index.md").write_text(text)
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    for fault in faults.values():
        assert re.search(f"WARNING.*{re.escape(fault)}", done.stderr), fault


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as found:
        yield found


@pytest.fixture
def opened(chromium, address):
    """Open pages; afterwards nothing was said, and nothing asked for elsewhere."""
    contexts, said, asked = [], [], []

    def open_(width, scheme):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme
        )
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{page.url}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"{page.url}: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        page.on(
            "response",
            lambda r: r.status < 400 or said.append(f"{r.url}: {r.status}"),
        )
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []
    assert [u for u in asked if not u.startswith((address, "data:", "blob:"))] == []


@pytest.mark.parametrize("width", [375, 1280])
def test_every_page_opens_and_fits(opened, address, width):
    page = opened(width, "light")
    faults = []
    for path in pages_of_the_nav():
        page.goto(address + path)
        assert page.locator("h1").count() == 1, path
        found = page.evaluate("document.documentElement.scrollWidth")
        if found > width:
            faults.append(f"{path}: {found} px wide")
        faults += [f"{path}: {element}" for element in page.evaluate(OVERFLOW)]
        broken = "[...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)"
        faults += [f"{path}: {src}" for src in page.evaluate(broken)]
    assert faults == []


@pytest.mark.parametrize("width", [375, 1280])
def test_dark_colours_follow_the_system_and_can_be_chosen(
    opened, address, width, tmp_path
):
    light = {}
    for scheme in ("light", "dark"):
        page = opened(width, scheme)
        page.goto(address + "how_it_works.html")
        path = tmp_path / f"{scheme}.png"
        page.locator("h1").screenshot(path=path, timeout=PATIENCE)
        light[scheme] = matplotlib.image.imread(path)[0, 0, :3].mean()
    assert light["light"] > 0.9
    assert light["dark"] < 0.2
    page = opened(1280, "light")
    page.goto(address)
    body = page.locator("body")
    assert body.get_attribute("data-md-color-scheme") == "default"
    for expected in ("default", "slate"):  # from the system's to light to dark
        page.locator("label.md-header__button[for^=__palette]:visible").click()
        page.wait_for_function(
            "scheme => document.body.dataset.mdColorScheme === scheme", arg=expected
        )


def test_the_search_finds_an_option(opened, address):
    page = opened(1280, "light")
    page.goto(address)
    page.locator("input.md-search__input").click()
    page.keyboard.type("next_router_weight", delay=20)
    first = page.locator(".md-search-result__link").first
    first.wait_for()
    assert "options.html" in first.get_attribute("href") or "next_router_weight" in (
        page.locator(".md-search-result__list").inner_text()
    )

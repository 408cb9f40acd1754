"""The report in a real browser: on a phone and a desk, light and dark, drawn, readable, and without a word to the network.

The README's picture is made again, from a real run, by

    python tests/extras/test_report_browser.py runs/digits/report.html docs/images/report.png
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import io
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from PIL import Image
from report_runs import SETTINGS, about, rounds
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from sparkdeep.tracking.report import write

pytestmark = pytest.mark.extras

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
ATTACK = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
LONG = "a_name_without_any_place_to_break_it_" * 6
PAGES = {
    "many": (rounds(120, retried=(57,)), about()),
    "long": (rounds(900, replicas=6, nan=(5, 6, 40)), about(num_rounds=1000, status="failed", error=LONG)),
    "attacked": (rounds(3, replicas=1), about(title=ATTACK, settings={**SETTINGS, ATTACK: ATTACK, LONG: LONG})),
    "one": (rounds(1, replicas=1), about(num_rounds=1)),
    "NaN": (rounds(5, nan=range(1, 6)), about()),
    "none": ([], about(status="failed", error="DataError: no rows")),
}
LAYOUTS = [(375, "light"), (375, "dark"), (1280, "light"), (1280, "dark")]


@contextlib.contextmanager
def chromium(profile):
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    assert all(found.values()), f"{found}: .ci/extras.sh installs both"
    options.binary_location = found["chromium"]
    driver = webdriver.Chrome(options=options, service=Service(found["chromedriver"]))
    driver.set_page_load_timeout(30)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages, on a server that remembers what it was asked for."""
    home, asked = tmp_path_factory.mktemp("site"), []
    for name, (records, facts) in PAGES.items():
        write(records, home / f"{name}.html", facts)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=str(home), **options)

        def end_headers(self):
            self.send_header("Cache-Control", "no-store")
            super().end_headers()

        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


def laid_out(browser, width, scheme):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_is_drawn_and_asks_for_nothing(browser, site, page, width, scheme):
    address, asked = site
    asked.clear()
    laid_out(browser, width, scheme)
    browser.get_log("browser")
    browser.get(f"{address}/{page}.html")
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    assert browser.get_log("browser") == []
    assert asked == [f"/{page}.html"]
    assert browser.title == f"{PAGES[page][1].title} - sparkdeep"
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    wide = browser.execute_script(
        """
        return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
            && (e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1))
            .map(e => e.outerHTML.slice(0, 80))
        """
    )
    assert wide == []
    sizes = browser.execute_script(
        """
        return [...document.querySelectorAll('svg')].map(svg => {
            const box = svg.getBoundingClientRect(), marks = svg.querySelectorAll('.line, .dot, rect:not(.hint)');
            const inside = [...marks].every(m => { const b = m.getBoundingClientRect();
                return b.left >= box.left - 5 && b.right <= box.right + 5 && b.top >= box.top - 5
                    && b.bottom <= box.bottom + 5; });
            return {width: box.width, height: box.height, marks: marks.length, inside};
        })
        """
    )
    assert bool(sizes) == bool(PAGES[page][0])
    for size in sizes:
        assert size["width"] > 0.6 * min(width, 400)
        assert size["height"] > 150
        assert size["inside"]
    expected = 1 if page == "NaN" else 0  # the loss that has no number is an empty chart that says so
    assert [size["marks"] > 0 for size in sizes].count(False) == expected


# Relative luminance and contrast as WCAG 2 defines them.
_CONTRAST = """
const part = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const rgb = s => s.match(/[\\d.]+/g).map(Number);
const luminance = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
const ratio = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05); };
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_and_dark_is_dark(browser, site, scheme):
    laid_out(browser, 1280, scheme)
    browser.get(f"{site[0]}/many.html")
    weak = browser.execute_script(
        _CONTRAST
        + """
        const texts = [...document.querySelectorAll('main *')].filter(e => !e.closest('svg')
            && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
        const found = texts.map(e => [e.outerHTML.slice(0, 60), ratio(rgb(getComputedStyle(e).color), ground(e))])
            .filter(([, r]) => r < 4.5);
        const marks = [...document.querySelectorAll('svg .line, svg .dot, svg rect:not(.hint)')];
        const faint = marks.map(e => [e.outerHTML.slice(0, 60),
            ratio(rgb(getComputedStyle(e).color), ground(e.closest('svg')))])
            .filter(([, r]) => r < 1.9);
        return {texts: texts.length, marks: marks.length, weak: [...found, ...faint]};
        """
    )
    assert weak["texts"] > 50
    assert weak["marks"] > 100
    assert weak["weak"] == []
    page = browser.execute_script(_CONTRAST + "return luminance(ground(document.body))")
    assert page > 0.8 if scheme == "light" else page < 0.05


def test_it_reads_well_without_eyes(browser, site):
    browser.get(f"{site[0]}/many.html")
    assert browser.title == "digits - sparkdeep"
    levels = [int(e.tag_name[1]) for e in browser.find_elements("css selector", "h1, h2, h3")]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    images = [n["name"]["value"] for n in nodes if n.get("role", {}).get("value") in ("image", "img")]
    assert any(name.startswith("Loss by round. training: ") for name in images)
    assert all(len(name) > 20 for name in images)
    assert not [
        e for e in browser.find_elements("css selector", "th") if e.get_attribute("scope") not in ("row", "col")
    ]


def test_a_control_that_overflows_and_asks_is_noticed(browser, site):
    laid_out(browser, 375, "light")
    browser.get(f"{site[0]}/one.html")
    browser.execute_script("document.querySelector('main').insertAdjacentHTML('beforeend', '<pre>' + 'x'.repeat(400))")
    assert not browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    browser.get_log("browser")
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=/never.png>')")
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert "Content Security Policy" in str(browser.get_log("browser"))
    assert "/never.png" not in site[1]


def test_pictures_are_not_blank(browser, site):
    laid_out(browser, 1000, "light")
    browser.get(f"{site[0]}/many.html")
    assert shades(picture(browser, height=1200)) > 30
    browser.execute_script("document.body.textContent = ''")
    assert shades(picture(browser, height=1200)) < 5


def picture(browser, *, height):
    clip = {"x": 0, "y": 0, "width": 1000, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    return base64.b64decode(shot["data"])


def shades(png):
    return len(Image.open(io.BytesIO(png)).convert("RGB").getcolors(1 << 24))


def main(page, kept):
    """Keep a picture of the top of a report."""
    with tempfile.TemporaryDirectory() as profile, chromium(profile) as driver:
        laid_out(driver, 1000, "light")
        driver.get(Path(page).absolute().as_uri())
        height = driver.execute_script("return document.documentElement.scrollHeight")
        Path(kept).write_bytes(picture(driver, height=min(height, 1560)))


if __name__ == "__main__":
    main(*sys.argv[1:])

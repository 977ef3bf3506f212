"""The report's page in a real browser: silent, offline, fit for a phone, readable in the dark, its numbers those of the log."""

import json

import pytest
from browser import CHROMIUM, Browser

from bln_train.report.document import write_report
from bln_train.system.units import format_bytes

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

# Ratio of relative luminances (WCAG) of every text to the nearest background behind it: the smallest, and its text.
WORST_CONTRAST = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor, alpha = channels(color)[3];
      if (alpha === undefined || alpha === 1) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  let worst = [99, ''];
  for (const element of document.querySelectorAll('body, body *')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own) continue;
    const style = getComputedStyle(element);
    const a = light(element.closest('svg') ? style.fill : style.color), b = light(behind(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.textContent.slice(0, 40)];
  }
  return worst;
})()"""
TABLES = """Object.fromEntries([...document.querySelectorAll('table')].map((table) => [
  (table.caption || table.closest('details').querySelector('summary')).textContent,
  [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent))]))"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture
def page(browser, folders, tmp_path):
    """The report of a comparison and one of its runs, beside nothing else."""
    place = tmp_path / "alone" / "report.html"
    write_report([folders], place)
    browser.requests.clear()
    browser.complaints.clear()
    return place


def overflow(browser):
    return browser.evaluate("document.documentElement.scrollWidth - innerWidth")


def test_page_is_silent_and_offline(browser, page):
    """Light, dark, wide, narrow, printed: no message in the console, and no request but the file's own."""
    for options in ({}, {"dark": True}, {"width": 375, "dark": True}, {"media": "print"}):
        browser.open(page, **options)
    assert browser.call("Page.printToPDF")["data"]
    assert set(browser.requests) == {page.resolve().as_uri()}
    assert browser.complaints == []
    assert browser.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_page_never_scrolls_sideways(browser, page, width):
    """At the width of a phone, a tablet and a desk, with every fold open as well."""
    browser.open(page, width=width)
    assert overflow(browser) <= 0
    browser.evaluate("document.querySelectorAll('details').forEach((fold) => fold.open = true)")
    assert overflow(browser) <= 0


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read(browser, page, dark):
    """Contrast of 4.5 : 1 or more, in tables, drawings and prose; the page's ground follows the scheme."""
    browser.open(page, dark=dark)
    worst, text = browser.evaluate(WORST_CONTRAST)
    assert worst >= 4.5, text
    red = browser.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])")
    assert (red < 60) == dark


def test_text_on_a_phone_is_not_tiny(browser, page):
    """The smallest text of any drawing is at least 9 pixels high at 375 pixels."""
    browser.open(page, width=375)
    scales = "[...document.querySelectorAll('svg[role=img]')].map((svg) => svg.clientWidth / svg.viewBox.baseVal.width)"
    assert 11 * min(browser.evaluate(scales)) >= 9


def test_numbers_are_those_of_the_log(browser, page, folders):
    """Every figure of each epoch, the memory split and each layer's likelihood, to the printed digits."""
    browser.open(page)
    tables = browser.evaluate(TABLES)
    for folder in (path for path in (folders / "cells").iterdir() if path.is_dir()):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        expected = [
            [
                str(r["epoch"]), str(r["step"]), f"{r['train_loss']:.4f}", f"{100 * r['train_accuracy']:.2f} %",
                f"{r['test_loss']:.4f}", f"{100 * r['test_accuracy']:.2f} %",
                "-" if r["images_per_second"] is None else f"{r['images_per_second']:.1f}",
            ]
            for r in records if r["kind"] == "epoch"
        ]  # fmt: skip
        assert tables[f"Epochs of {folder}"][1:] == expected
        if "batchless" in folder.name and "seed0" in folder.name:
            last = next(r for r in reversed(records) if r["kind"] == "step" and r["step"] == 6)
            rows = tables[f"Layers of {folder} after step 6"][1:]
            assert [(row[0], row[7]) for row in rows] == [(k, f"{v:.4f}") for k, v in last["nll_by_layer"].items()]
    memory = next(r for r in reversed(records_of_batch(folders)) if r["kind"] == "memory")
    row = next(row for row in tables["Peak memory of training"] if row[0] == "batch, micro-batch 16 of 16")
    parts = ("peak", "parameter", "gradient", "optimizer", "activation", "other")
    assert row[1:7] == [format_bytes(memory[f"{part}_bytes"]) for part in parts]


def records_of_batch(folders):
    lines = (folders / "cells" / "batch-effective16-micro16-seed0" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_drawings_say_what_they_show(browser, page):
    """Each has a title, a name for those who cannot see it, a legend, and units or a plain word on its axes."""
    browser.open(page)
    found = browser.evaluate(
        "[...document.querySelectorAll('figure')].map((f) => [f.querySelector('h3').textContent, "
        "f.querySelector('svg').getAttribute('aria-label'), [...f.querySelectorAll('svg text')].map((t) => t.textContent)])"
    )
    assert len(found) >= 10
    names = (
        "parameters",
        "batch, micro-batch 16 of 16",
        "batchless, micro-batch 4 of 16",
        "channels: smallest to largest",
    )
    for title, label, texts in found:
        assert title == label
        assert any(text.startswith(names) for text in texts), title
    units = " ".join(text for _, _, texts in found for text in texts)
    assert all(
        unit in units
        for unit in ("MiB", "nats", "images/s", "%", "epoch", "optimizer step", "memory budget, 12.00 MiB")
    )


def test_lines_differ_in_more_than_colour(browser, page):
    """No two lines of a drawing share dash and marker."""
    browser.open(page)
    looks = browser.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].map((svg) => [...svg.querySelectorAll('polyline')].map((line) => "
        "line.getAttribute('stroke-dasharray') + (line.nextElementSibling?.tagName ?? '') + "
        "(line.nextElementSibling?.getAttribute('points') ?? '')))"
    )
    assert any(len(lines) > 1 for lines in looks)
    assert all(len(set(lines)) == len(lines) for lines in looks)


def test_folded_tables_are_printed(browser, page):
    """On paper nothing can be opened, so everything is."""
    shown = "[...document.querySelectorAll('details td')].every((cell) => cell.checkVisibility())"
    browser.open(page)
    assert not browser.evaluate(shown)
    browser.open(page, media="print")
    assert browser.evaluate(shown)
    browser.open(page, width=720, media="print")  # about the width of a sheet
    cut = (
        "[...document.querySelectorAll('.wide')].filter((box) => getComputedStyle(box).overflowX !== 'visible').length"
    )
    assert browser.evaluate(cut) == 0
    assert overflow(browser) <= 0


def test_markup_from_folders_is_text(browser, hostile, tmp_path):
    """Scripts and images in recipes, logs and names of folders neither run nor load nor are there; long words break."""
    place = tmp_path / "alone" / "report.html"
    write_report([hostile], place)
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(place, width=375)
    assert browser.requests == [place.resolve().as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.querySelectorAll('script, img, b:not(li > b)').length") == 0
    assert "bold & 'quoted'<" in browser.evaluate("document.title")
    assert browser.evaluate("document.body.textContent").count("<script>document.title='run'</script>") >= 5
    assert overflow(browser) <= 0


def test_the_browser_tells_what_is_wrong(browser, tmp_path):
    """The other tests can fail: a page with a script, a request and a wide box is caught in each."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body style='color:#999;background:#888'><p>dim<script>console.log('x')</script>"
        "<img src='missing.png'><div style='width:5000px'>wide"
    )
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(bad, width=375)
    assert len(browser.requests) == 2
    assert len(browser.complaints) >= 2
    assert overflow(browser) > 0
    assert browser.evaluate(WORST_CONTRAST)[0] < 2

"""The report as a browser shows it: from disk, on a phone and a screen, in light and dark."""

import pytest
from browser import Browser, find_browser
from run_folders import make_run, make_tracker

from snrweights.cli import main

SIZES = [375, 1240]
SCHEMES = ["light", "dark"]

# every element that holds text of its own, with what WCAG 2.2 compares: its colour and that of what lies behind it
TEXTS = """
(() => {
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
    return 'none';
  };
  const texts = [];
  for (const element of document.body.querySelectorAll('*:not(title)')) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).map(n => n.data.trim());
    if (!own.length) continue;
    const style = getComputedStyle(element), box = element.getBoundingClientRect();
    const svg = element.closest('svg');
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    texts.push({text: own.join(' '), colour: svg ? style.fill : style.color, behind: behind(element),
                size: parseFloat(style.fontSize) * scale, width: box.width, left: box.left, right: box.right,
                boxed: !!element.closest('.table')});
  }
  return texts;
})()
"""

# labels of charts that are cut off, or that lie upon each other
BAD_LABELS = """
[...document.querySelectorAll('svg.chart')].flatMap(svg => {
  const view = svg.viewBox.baseVal, texts = [...svg.querySelectorAll('text')], boxes = texts.map(t => t.getBBox());
  const bad = texts.filter((t, i) => boxes[i].x < 0 || boxes[i].y < 0 || boxes[i].width === 0
    || boxes[i].x + boxes[i].width > view.width || boxes[i].y + boxes[i].height > view.height);
  const upon = texts.filter((t, i) => boxes.some((b, j) => j < i && b.x < boxes[i].x + boxes[i].width
    && boxes[i].x < b.x + b.width && b.y + 3 < boxes[i].y + boxes[i].height && boxes[i].y + 3 < b.y + b.height));
  return [...bad, ...upon].map(t => svg.getAttribute('aria-label') + ': ' + t.textContent);
})
"""
OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = Browser(find_browser(), tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    long = "a_name_that_is_rather_long_for_a_phone_and_has_no_spaces_to_break_it_at"
    runs = [make_run(folder / name, seed=i) for i, name in enumerate(("min_snr", long, "third"))]
    make_tracker(folder / "tracked", unit=None, snapshot_every=None)
    made = {"one": runs[:1], "three": runs, "tracker alone": [folder / "tracked"]}
    for name, given in made.items():
        assert main(["report", *map(str, given), "-o", str(folder / f"{name}.html")]) == 0
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(params=["one", "three", "tracker alone"])
def page(request, pages):
    return pages[request.param]


def luminance(colour):
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", SIZES)
def test_it_is_legible_and_whole(browser, page, width, scheme):
    browser.open(page, width, scheme)
    browser.evaluate(OPEN_ALL)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 50
    for text in texts:
        assert text["width"] > 0, text
        assert text["size"] >= 11, text
        assert contrast(text["colour"], text["behind"]) >= 4.5, text
        assert text["boxed"] or (text["left"] >= 0 and text["right"] <= width), text
    assert browser.evaluate(BAD_LABELS) == []
    assert (luminance(texts[0]["behind"]) < 0.1) == (scheme == "dark")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lines_stand_out_from_their_box(browser, pages, scheme):
    browser.open(pages["three"], 1240, scheme)
    box = browser.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    lines = "[...document.querySelectorAll('.swatch .line')].filter(l => l.style.opacity == 1)"
    colours = set(browser.evaluate(f"{lines}.map(l => getComputedStyle(l).stroke)"))
    assert len(colours) == 3
    assert min(contrast(colour, box) for colour in colours) >= 3


def test_it_loads_nothing_and_complains_of_nothing(browser, page):
    browser.open(page, 375, "light")
    browser.evaluate(OPEN_ALL)
    browser.evaluate("Promise.all([...document.images].map(image => image.decode()))")
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked[0] == page.resolve().as_uri()
    assert all(url.startswith("data:") for url in asked[1:])
    loud = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event["method"] in loud] == []


def test_the_browser_tells_of_a_request_and_of_a_complaint(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<img src="absent.png"><script>console.error("no")</script>')
    browser.open(page, 375, "light")
    told = {event["method"] for event in browser.events}
    assert {"Runtime.consoleAPICalled", "Log.entryAdded"} <= told
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert (tmp_path / "absent.png").resolve().as_uri() in asked


def test_samples_are_decoded_and_tiny_ones_are_enlarged_in_squares(browser, pages):
    browser.open(pages["three"], 375, "dark")
    shown = browser.evaluate(
        "[...document.images].map(i => [i.naturalWidth, i.width > 300, getComputedStyle(i).imageRendering])"
    )
    assert shown == [[100, True, "pixelated"]] * 3


def test_what_differs_is_seen_at_once_and_the_rest_on_a_click(browser, pages):
    browser.open(pages["three"], 1240, "light")
    seen = "document.body.innerText"
    assert "3 runs side by side" in browser.evaluate(seen)
    assert "run.seed" in browser.evaluate(seen)
    assert "optimizer.learning_rate" not in browser.evaluate(seen)
    browser.evaluate("document.querySelectorAll('summary').forEach(s => s.click())")
    assert "optimizer.learning_rate" in browser.evaluate(seen)


def test_a_table_that_is_too_wide_scrolls_in_its_box_and_keeps_its_first_column(browser, pages):
    browser.open(pages["three"], 375, "light")
    box = "document.querySelector('.table')"
    assert browser.evaluate(f"{box}.scrollWidth > {box}.clientWidth")
    left = f"{box}.querySelector('tbody th').getBoundingClientRect().left"
    before = browser.evaluate(left)
    browser.evaluate(f"{box}.scrollLeft = 100")
    assert browser.evaluate(f"{box}.scrollLeft") == 100
    assert browser.evaluate(left) == before


def test_figures_stand_side_by_side_where_there_is_room(browser, pages):
    columns = "new Set([...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().left)).size"
    browser.open(pages["three"], 1240, "light")
    assert browser.evaluate(columns) == 3
    browser.open(pages["three"], 375, "light")
    assert browser.evaluate(columns) == 1

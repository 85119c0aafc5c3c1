"Pages tried in a browser: on a phone, in the dark, with the keyboard."
import pytest
from PIL import Image

from histokit.core.checks import error, html_findings, note, warning
from histokit.core.page import Html, html_figure, html_gallery, html_table, page
from histokit.spots.check_page import write_report
from histokit.spots.mistakes import changed_copy, many_mistakes

PHONE, DESK = (390, 844), (1280, 900)
TYPES = ["B cells, naive", "T cells CD4", "macrophages M2 (tumour-associated, a long name)", "Plattenepithel", "NK"]


def named(h5):
    "A file that names its cell types, with everything wrong."
    n = len(h5["spots/Train/S_1"].dtype.names) - 2
    h5.attrs["cell_types"] = [TYPES[i] if i < len(TYPES) else f"another type {i}" for i in range(n)]
    many_mistakes(h5)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return write_report(folder/"check.html", changed_copy(named, folder/"file.h5"))


def wide_page(path):
    "A page of everything that is too wide: names without a blank, many columns, a large picture."
    word = "a_name_without_a_blank_" * 9
    rows = [{f"column {i}": word if i == 3 else i * 1.1 for i in range(30)}] * 3
    findings = [error(word, "mend " + word, word), warning("b", "c"), note("d")]
    photo = Image.new("RGB", (1600, 400), (200, 120, 160))
    sections = [("Findings", html_findings(findings)), ("Table", html_table(rows)),
        ("Stacked", html_table(rows, stacked=True)), (word, word),
        ("Pictures", html_gallery([(word, photo), ("b", photo)])), ("Plot", html_figure(photo, css="plot"))]
    path.write_text(page(word, sections, Html("<p class=facts>facts</p>")), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser):
    "A function that opens a page; what the console said is in its attribute `said`."
    tabs = []

    def open_page(path, size=PHONE, scheme="light"):
        tab = browser.new_page(viewport=dict(width=size[0], height=size[1]), color_scheme=scheme)
        tab.said = []
        tab.on("console", lambda message: tab.said.append(message.text))
        tab.on("pageerror", lambda problem: tab.said.append(str(problem)))
        tab.goto(path.as_uri())
        tabs.append(tab)
        return tab

    yield open_page
    for tab in tabs: tab.close()


def boxes(tab, css):
    "(left, right, height) of every element of a kind that is shown."
    return tab.eval_on_selector_all(css, """all => all.map(e => e.getBoundingClientRect())
        .filter(b => b.height).map(b => [b.left, b.right, b.height])""")


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_lies_beside_the_screen(opened, report, tmp_path, size):
    for path in (report, wide_page(tmp_path/"wide.html")):
        tab = opened(path, size)
        assert tab.evaluate("document.documentElement.scrollWidth") <= size[0] and not tab.said
        for css in ("h1", "h2", "section", "section td", "figure", "img", "p"):
            assert all(0 <= left and right <= size[0] for left, right, _ in boxes(tab, css)), css


def test_every_mend_is_on_the_phone_screen_and_labelled(opened, report):
    tab = opened(report)
    mends = tab.eval_on_selector_all("section td[data-column=mend]", "all => all.map(e => e.innerText)")
    assert len(mends) == 9 and "write it as float64" in mends
    assert len(boxes(tab, "section td[data-column=mend]")) == 9
    label = "getComputedStyle(document.querySelector('td[data-column=mend]'), '::before').content"
    assert "mend" in tab.evaluate(label)
    assert all(right - 0 > 100 for _, right, _ in boxes(tab, "section td"))      # no column of single letters
    assert not boxes(tab, "section th") and boxes(opened(report, DESK), "section th")


# Contrast of each text with what lies behind it, as WCAG 2 counts it.
CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => parse(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (parse(c)[3] !== 0) return c; } return "rgb(255, 255, 255)" };
  const own = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
  return [...document.body.querySelectorAll("*")].filter(own).map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
    return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + " " + e.innerText.slice(0, 30)] }) }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(opened, report, tmp_path, scheme):
    for path in (report, wide_page(tmp_path/"wide.html")):
        tab = opened(path, scheme=scheme)
        found = tab.evaluate(CONTRAST)
        assert len(found) > 20 and min(found)[0] >= 4.5, min(found)
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def sizes_of_text(tab):
    return tab.eval_on_selector_all("td,p,figcaption", "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))")


def test_text_is_large_enough_on_a_phone(opened, report):
    assert min(sizes_of_text(opened(report))) >= 14


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_a_picture_is_enlarged_by_a_click_and_by_the_keyboard(opened, report, size):
    tab = opened(report, size)
    picture = tab.locator(".pictures .zoom").first
    width = lambda: picture.locator("img").bounding_box()["width"]
    small = width()
    picture.locator("summary").click()
    assert width() > 1.5 * small and tab.locator(".zoom[open]").count() == 1
    tab.locator(".zoom[open] summary").click()
    assert width() == small and tab.locator(".zoom[open]").count() == 0
    picture.locator("summary").focus()
    for key, shown in (("Enter", 1), ("Escape", 0), ("Enter", 1), ("Enter", 0)):
        tab.keyboard.press(key)
        assert tab.locator(".zoom[open]").count() == shown, (key, shown)
    assert tab.evaluate("document.activeElement.tagName") == "SUMMARY" and not tab.said


def test_all_of_a_large_picture_can_be_reached(opened, tmp_path):
    tab = opened(wide_page(tmp_path/"wide.html"))
    tab.locator(".zoom summary").first.click()
    inside = tab.locator(".zoom[open] summary")
    assert inside.evaluate("e => [e.scrollWidth, e.clientWidth]") == [1600, 390]       # natural size, to be panned


def test_pictures_have_words_and_types_have_names(opened, report):
    tab = opened(report, DESK)
    assert all(tab.eval_on_selector_all("img", "all => all.map(e => e.alt)"))
    tab.locator("details:not(.zoom) summary").click()
    rows = tab.eval_on_selector_all("details:not(.zoom) tr", "all => all.map(e => e.innerText.split('\\t'))")
    assert rows[0][:2] == ["cell type", "column"] and rows[3][:2] == [TYPES[2], "C3"]
    assert len(rows) == 36                 # the column that one slide spoilt is there all the same

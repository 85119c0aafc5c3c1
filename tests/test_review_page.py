"""The review page in a real browser, from an empty folder to the export: what a lab does with it."""
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("fastapi", reason="the review app is not installed: pip install 'histokit[review]'")
ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT/"web"
MEASURES = ["architecture", "atrophy", "complexes", "fibrosis"]
WAIT = 180_000     # milliseconds that a busy machine may take for one step
AS_SERVED = "from histokit.cli import app; app()"


def run_web(task):
    done = subprocess.run(["bash", str(ROOT/"tools/web.sh"), task], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"the page cannot be built here: {done.stderr.strip().splitlines()[-1]}")


@pytest.fixture(scope="module")
def built():
    "The built page; built of its sources where it is missing or old."
    run_web("build")
    return WEB/"dist"


@pytest.fixture(scope="module")
def axe():
    "The accessibility checker, as the text of a script."
    if not (WEB/"node_modules/axe-core/axe.min.js").is_file(): run_web("packages")
    return (WEB/"node_modules/axe-core/axe.min.js").read_text()


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    "Twelve TIFFs with known scores, and a model trained on them."
    from histokit.review.demo import demo_crops, demo_model
    folder = tmp_path_factory.mktemp("painted")
    table = demo_crops(folder/"crops", n=12)
    demo_model(table, folder/"model.safetensors", lambda line: None)
    return table, folder/"model.safetensors"


class Served:
    "`histokit review` in a process of its own."
    def __init__(self, folder, *flags):
        asked = [sys.executable, "-c", AS_SERVED, "review", "open", str(folder), "--port", "0", "--no-browser", *flags]
        quiet = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.process = subprocess.Popen(asked, env=quiet, cwd=ROOT, **both)
        lines = []
        while not (found := re.search(r"http://\S+/", lines[-1] if lines else "")):
            line = self.process.stdout.readline()
            assert line, f"the server ended: {''.join(lines)}"
            lines.append(line)
        self.url = found.group()

    def end(self):
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory, painted, built):
    "An empty study with a model, served to people who log in."
    server = Served(tmp_path_factory.mktemp("lab")/"study", "--people", "--model", str(painted[1]))
    yield server
    server.end()


class Person:
    "One person's browser; what its console says is kept."
    def __init__(self, browser, url, **context):
        self.url, self.complaints = url, []
        usual = dict(viewport=dict(width=1440, height=900), accept_downloads=True)
        self.context = browser.new_context(**usual | context)
        self.open()

    def open(self, path="/"):
        "A new tab."
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.go(path)

    def go(self, path):
        self.page.goto(f"{self.url}#{path}")
        return self.page

    def api(self, path): return self.context.request.get(self.url + path).json()

    def see(self, selector): return self.page.locator(selector).first.wait_for()

    def until(self, script):
        "Wait until it holds; asked from outside, as the page's policy lets nobody evaluate text inside."
        end = time.monotonic() + WAIT / 1000
        while not self.page.evaluate(script):
            assert time.monotonic() < end, f"never: {script}"
            self.page.wait_for_timeout(40)

    def is_saved(self): self.see(".saving[data-state=saved]")

    def scores(self):
        "What the page shows as one's own: a value for each measure, None where there is none."
        script = """() => Object.fromEntries([...document.querySelectorAll('[role=radiogroup]')].map(g =>
            [g.dataset.measure, g.querySelector('[aria-checked=true]')?.textContent ?? null]))"""
        return self.page.evaluate(script)

    def shows(self, **values):
        "Wait until these are one's own scores on the page."
        end = time.monotonic() + WAIT / 1000
        while (now := self.scores()) != values:
            assert time.monotonic() < end, now
            self.page.wait_for_timeout(40)

    def number(self): return int(re.search(r"review/(\d+)", self.page.url).group(1))

    def press(self, *keys):
        for key in keys: self.page.keyboard.press(key)

    def onward(self, key):
        "Press a key that leads to another picture, and be there."
        before = self.page.url
        self.press(key)
        self.until(f"location.href !== {before!r} && Boolean(document.querySelector('.scores h1'))")
        self.see(".score.active")


def sign_in(person, name, password):
    person.page.fill("input[name=username]", name)
    person.page.fill("input[name=password]", password)
    person.page.get_by_role("button", name="Sign in").click()
    person.see("header.top")


# ------------------------------------------------------------------------------------------ the story, step by step

def first_admin(ada):
    "The first who comes sets the study up; two passwords that differ are refused."
    page = ada.page
    page.fill("input[name=username]", "Ada")
    page.fill("input[name=password]", "a long password")
    page.fill("input[name=again]", "another password")
    page.get_by_role("button", name="Begin").click()
    ada.see("text=The two passwords differ")
    page.fill("input[name=again]", "a long password")
    page.get_by_role("button", name="Begin").click()
    ada.see("text=No pictures yet")


def upload(ada, table, folder):
    "Twelve TIFFs go up and are drafted; a file that is none is refused by name; one that is known is known."
    broken = folder/"S-3700-10X_Image001_ch00.tif"
    broken.write_bytes(Path(table.path[0]).read_bytes()[:3000])
    page = ada.go("/upload")
    page.set_input_files("input[type=file]", [*table.path, str(broken)])
    ada.until("document.querySelectorAll('.file.stored').length === 12")
    ada.until("document.querySelectorAll('.file.refused').length === 1")
    assert broken.name in page.locator(".file.refused").inner_text()
    ada.until("/12\\s+drafted/.test(document.querySelector('section[aria-label=Queue] .tallies').innerText)")
    assert page.locator("section[aria-label=Queue] .state.Completed").count() == 12
    page.set_input_files("input[type=file]", [table.path[3]])
    ada.see(".file.known")
    assert ada.api("api/images")["total"] == 12


def score_by_keyboard(ada):
    "Digits set and go on, brackets step, u takes back; what one types in a field is no score."
    ada.go("/review")
    ada.see(".score.active")
    ada.until("document.querySelectorAll('.option.drafted').length === 4")
    first = ada.number()
    ada.press("2", "Numpad3", "1", "0")
    ada.is_saved()
    ada.shows(architecture="2", atrophy="3", complexes="1", fibrosis="0")
    ada.press("]", "]", "u")
    ada.until("document.querySelector('[data-measure=fibrosis] [aria-checked=true]').textContent === '1'")
    ada.is_saved()
    assert ada.api(f"api/images/{first}")["mine"] == dict(architecture=2, atrophy=3, complexes=1, fibrosis=1)
    ada.page.locator(".work input[type=search]").click()
    ada.press("4", "x", "u", "n")
    assert ada.page.locator(".work input[type=search]").input_value() == "4xun" and ada.number() == first
    ada.page.locator(".work input[type=search]").fill("")
    ada.page.locator(".scores h1").click()
    kinds = [e["kind"] for e in ada.api(f"api/images/{first}")["events"] if e["user"] == "Ada"]
    assert kinds == ["score"] * 6 + ["undo"]
    return first


def accept_and_flag(ada, first):
    "n leads to the next unscored, Enter takes the draft, x flags, p finds nothing before."
    ada.onward("n")
    second = ada.number()
    assert second != first
    ada.until("document.querySelectorAll('.option.drafted').length === 4")
    ada.press("3", "Enter", "x")
    ada.see("button[aria-pressed=true] >> visible=true")
    ada.until("[...document.querySelectorAll('[role=radiogroup]')].every(g => g.querySelector('[aria-checked=true]'))")
    ada.is_saved()
    item = ada.api(f"api/images/{second}")
    assert item["flagged"] and item["mine"] == item["draft"] | dict(architecture=3)
    events = [e for e in item["events"] if e["kind"] == "score"]
    assert len(events) == 4 and all(e["draft_visible"] for e in events) and 0 < sum(e["seconds"] for e in events) < 60
    ada.press("?")
    ada.see("dialog[open]")
    ada.press("4", "Escape")
    ada.page.wait_for_selector("dialog", state="detached")
    assert ada.api(f"api/images/{second}")["mine"] == item["mine"]
    return second


def reload_in_the_middle(ada):
    "Two of four scores, then the page is loaded anew."
    ada.onward("n")
    ada.press("1", "4")
    ada.page.reload()
    ada.see(".score.active")
    ada.until("document.querySelectorAll('[aria-checked=true]').length === 2")
    ada.shows(architecture="1", atrophy="4", complexes=None, fibrosis=None)
    assert ada.page.locator(".score.active .score-name").inner_text() == "Complexes"


def lose_the_network(ada):
    "What is scored without a network lies in the browser, outlives the tab, and is saved once."
    before = len(ada.complaints)
    ada.context.set_offline(True)
    ada.press("0", "2")
    ada.see(".saving[data-state=failed]")
    assert "retry (2)" in ada.page.locator(".saving").inner_text()
    ada.shows(architecture="1", atrophy="4", complexes="0", fibrosis="2")
    number, old = ada.number(), ada.page
    old.close()
    ada.context.set_offline(False)
    del ada.complaints[before:]        # the browser's own words about a lost network
    ada.open(f"/review/{number}")
    ada.see(".score.active")
    ada.is_saved()
    item = ada.api(f"api/images/{number}")
    assert item["mine"] == dict(architecture=1, atrophy=4, complexes=0, fibrosis=2)
    uids = [e["uid"] for e in item["events"] if e["user"] == "Ada"]
    assert len(uids) == len(set(uids)) == 4
    assert ada.page.evaluate("Object.keys(localStorage).filter(k => k.includes('outbox')).length") == 0


def look_closer(ada, number):
    "A scale bar, zoom, brightness and contrast, the model's map and its strength, full screen; Tab and p."
    page = ada.go(f"/review/{number}")
    ada.see(".scale-bar span")
    assert re.fullmatch(r"\d+ (µm|mm)", page.locator(".scale-bar span").inner_text())
    before = page.locator(".zoom-read").inner_text()
    page.get_by_label("Zoom in").click()
    ada.until(f"document.querySelector('.zoom-read').innerText !== {before!r}")
    page.locator("details.light summary").click()
    page.get_by_label("Brightness", exact=True).fill("1.4")
    page.get_by_label("Contrast", exact=True).fill("0.8")
    light = "c => c.style.filter.includes('brightness(1.4) contrast(0.8)')"
    ada.until(f"[...document.querySelectorAll('.osd canvas')].some({light})")
    page.get_by_role("button", name="Reset").click()
    ada.press("g")
    ada.until("document.querySelector('.attention')?.naturalWidth > 0")
    page.get_by_label("Map", exact=True).fill("0.5")
    ada.until("getComputedStyle(document.querySelector('.attention')).opacity === '0.5'")
    ada.press("g")
    page.wait_for_selector(".attention", state="detached")
    page.get_by_role("button", name="Full screen").click()
    ada.until("document.fullscreenElement?.classList.contains('viewer')")
    page.evaluate("document.exitFullscreen()")
    page.locator(".scores h1").click()
    first = page.locator(".score.active .score-name").inner_text()
    ada.press("Tab")
    ada.until(f"document.querySelector('.score.active .score-name').innerText !== {first!r}")
    ada.onward("p")


def score_by_touch(ada, browser, number):
    "On a phone a finger sets a score, and takes the draft for the rest."
    told = dict(has_touch=True, is_mobile=True, storage_state=ada.context.storage_state())
    phone = Person(browser, ada.url, viewport=dict(width=390, height=844), **told)
    phone.go(f"/review/{number}")
    phone.until("document.querySelectorAll('.option.drafted').length === 4")
    phone.page.locator("[data-measure=complexes] .option").nth(3).tap()
    phone.page.get_by_role("button", name="Accept draft").tap()
    phone.is_saved()
    phone.until("document.querySelectorAll('[aria-checked=true]').length === 4")
    item = phone.api(f"api/images/{number}")
    assert item["mine"] == item["draft"] | dict(complexes=3) and phone.complaints == []
    phone.context.close()


def second_person(ada, browser):
    "Ada lets Ben in; his scores stand beside hers and change none of them."
    page = ada.go("/people")
    form = page.get_by_role("form", name="New person")
    form.get_by_label("Name").fill("Ben")
    form.get_by_label("First password").fill("ben's password")
    form.get_by_role("button", name="Add the person").click()
    page.get_by_role("rowheader", name="Ben").wait_for()
    ben = Person(browser, ada.url)
    ben.page.fill("input[name=username]", "Ben")
    ben.page.fill("input[name=password]", "a guess")
    ben.page.get_by_role("button", name="Sign in").click()
    ben.see("[role=alert]")
    ben.complaints.clear()             # the browser reports each 401
    sign_in(ben, "Ben", "ben's password")
    assert ben.page.get_by_role("link", name="People").count() == 0
    return ben


def score_all(person, number, values):
    person.go(f"/review/{number}")
    person.until(f"document.querySelector('.score.active') && location.hash.endsWith('/{number}')")
    person.press(*values)
    person.is_saved()
    person.until("document.querySelectorAll('[aria-checked=true]').length === 4")


def blind_first(ada, ben):
    "The draft appears to Ben only when he has scored; the record says that he had not seen it."
    page = ada.go("/study")
    page.get_by_label("Blind first").check()
    page.get_by_role("button", name="Save the settings").click()
    ada.see("text=Settings saved")
    held = []                            # the list knows the picture before its details come: keys count already
    ben.page.route("**/api/images/7", lambda route: held.append(route))
    ben.page.reload()
    ben.go("/review/7")
    ben.see("text=Blind first")
    assert ben.page.locator(".option.drafted, .draft").count() == 0
    assert ben.api("api/images/7")["draft"] is None
    ben.press("Enter")
    assert ben.api("api/images/7")["mine"] == {}
    ben.press("1", "2", "3", "4")
    assert held, "the details were asked for"
    for route in held: route.continue_()
    ben.page.unroute("**/api/images/7")
    ben.until("document.querySelectorAll('.draft').length === 4")
    assert list(ben.api("api/images/7")["mine"].values()) == [1, 2, 3, 4]
    given = [e for e in ben.api("api/images/7")["events"] if e["kind"] == "score"]
    assert len(given) == 4 and not any(e["draft_visible"] for e in given)


def compare_and_export(ada):
    "Both people's scores are in the agreement and, with the draft, in the export."
    page = ada.go("/agreement")
    page.get_by_role("rowheader", name="Architecture").wait_for()
    assert page.locator(".agreement-table tbody tr").count() == 4
    assert re.search(r"\d\.\d\d", page.locator(".agreement-table .numbers").first.inner_text())
    ada.go("/images")
    with page.expect_download() as asked: page.get_by_role("link", name="Wide CSV").click()
    wide = pd.read_csv(asked.value.path())
    with page.expect_download() as asked: page.get_by_role("link", name="Long CSV").click()
    long = pd.read_csv(asked.value.path())
    assert len(wide) == 12 and wide.astype(str).stack().str.contains("S-3600-001").any()
    assert {"Ada", "Ben"} <= set(long.astype(str).stack()) and {"score", "draft", "undo", "flag"} <= set(long.kind)
    return wide, long


def filter_the_list(ada):
    "Search, filters and sort of the table; every event of a picture on its own page."
    page = ada.go("/images")
    rows = page.locator(".image-row:not(.blank)")
    ada.until("document.querySelectorAll('.image-row:not(.blank)').length === 12")
    page.get_by_label("Search name, serial or group").fill("S-3601")
    ada.until("document.querySelectorAll('.image-row').length === 5")
    page.get_by_label("Search name, serial or group").fill("")
    page.get_by_role("button", name="Flagged").click()
    ada.until("document.querySelectorAll('.image-row').length === 1")
    page.get_by_role("button", name="Clear").click()
    ada.until("document.querySelectorAll('.image-row').length === 12")
    page.get_by_role("button", name="Sort by Picture").click()
    ada.until("document.querySelector('.image-row .c-name b').textContent.startsWith('S-3602')")
    rows.last.get_by_role("link", name=re.compile("Every change")).click()
    page.get_by_role("heading", name="S-3600-001").wait_for()
    assert page.locator("table.events tbody tr").count() >= 4 + 6 + 1 + 4


PAGES = ["/review/1", "/images", "/image/1", "/upload", "/agreement", "/people", "/study"]


def settle(person, path):
    person.go(path)
    person.see("main h1")
    person.page.wait_for_timeout(250)


def serious(page, axe):
    "Serious and critical findings of axe: rule and place."
    page.evaluate(axe + "; undefined")
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    bad = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    return [(v["id"], node["target"], node.get("failureSummary", "")[:200]) for v in bad for node in v["nodes"]]


def look_at_every_page(ada, axe):
    "No serious finding of axe, light and dark; nothing wider than a phone."
    for scheme in ("light", "dark"):
        ada.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for path in PAGES:
            settle(ada, path)
            assert serious(ada.page, axe) == [], (scheme, path)
        ground = ada.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        assert (sum(ground) / 3 > 200) == (scheme == "light")
    ada.page.set_viewport_size(dict(width=390, height=844))
    for path in PAGES:
        settle(ada, path)
        assert ada.page.evaluate("document.documentElement.scrollWidth") <= 390, path
    assert serious(ada.page, axe) == []


def test_the_whole_story(browser, served, painted, axe, tmp_path):
    ada = Person(browser, served.url)
    first_admin(ada)
    upload(ada, painted[0], tmp_path)
    first = score_by_keyboard(ada)
    second = accept_and_flag(ada, first)
    reload_in_the_middle(ada)
    lose_the_network(ada)
    look_closer(ada, second)
    score_by_touch(ada, browser, 10)
    ben = second_person(ada, browser)
    score_all(ben, first, "2311")
    score_all(ben, second, "0124")
    assert ada.api(f"api/images/{first}")["mine"] == dict(architecture=2, atrophy=3, complexes=1, fibrosis=1)
    blind_first(ada, ben)
    compare_and_export(ada)
    filter_the_list(ada)
    look_at_every_page(ada, axe)
    assert ada.complaints == [] and ben.complaints == []


# ------------------------------------------------------------------------------------------ quarter steps, a long list

MANY = 3000


@pytest.fixture(scope="module")
def long_study(tmp_path_factory, built):
    "Three thousand images without files, drafted in quarter steps, served to one person."
    from histokit.review.schema import current, images, utc_now
    from histokit.review.serve import Address, ReviewServer, open_study
    store = open_study(tmp_path_factory.mktemp("long")/"study", "pancreas_quarter")
    row = dict(sha256="0" * 64, size=1, width=900, height=700, matched=True, file="", changed=False)
    names = [f"S-{i // 10:03}-{i % 10:03}" for i in range(MANY)]
    rows = [row | dict(name=f"{n}.tif", serial=n, group=n[:5], created_at=utc_now()) for n in names]
    drafts = [dict(image_id=i, author="model", measure=k, value=i % 13 / 4, event_id=i)
        for i in range(1, MANY + 1) for k in MEASURES]
    with store.writing() as c:
        c.execute(images.insert(), rows)
        c.execute(current.insert(), drafts)
    with ReviewServer(store, Address(port=0), worker=False) as server: yield server
    store.close()


def test_quarter_steps(browser, long_study):
    "A digit gives a whole number, brackets a quarter, a field any value, brought to the scale; none beyond it."
    me = Person(browser, long_study.url)
    page = me.go("/review/7")
    me.see(".score.active")
    me.see("text=file is not in this study")
    me.press("2")                                  # architecture, and on
    me.press("]", "]", "]")                        # atrophy: begins at the draft, 1.75
    me.until("document.querySelector('[aria-label^=\\'Atrophy,\\']').value === '2.25'")
    me.press("4")                                  # its scale ends at 3
    me.see("text=Atrophy goes from 0 to 3 in steps of 0.25")
    field = page.get_by_label("Complexes, 0 to 3 in steps of 0.25")
    field.fill("1,6")
    field.press("Enter")
    me.until("document.querySelector('[aria-label^=\\'Complexes,\\']').value === '1.50'")
    page.get_by_label("Fibrosis one step down").click()
    page.get_by_label("Fibrosis one step down").click()
    me.is_saved()
    want = dict(architecture=2, atrophy=2.25, complexes=1.5, fibrosis=1.5)
    assert me.api("api/images/7")["mine"] == want
    page.reload()
    me.see(".score.active")
    me.until("document.querySelector('[aria-label^=\\'Atrophy,\\']').value === '2.25'")
    answer = me.context.request.post(me.url + "api/images/7/events", headers={"X-Histokit": "1", "Origin": me.url[:-1]},
        data=dict(events=[dict(uid="between-1", measure="atrophy", value=2.3)]))
    assert answer.status == 422 and "in steps of 0.25" in answer.json()["detail"]
    assert me.api("api/images/7")["mine"] == want and [c for c in me.complaints if "404" not in c] == []
    me.context.close()


SCROLL = """async () => {
    const box = document.querySelector('.virtual'), frames = []
    let last = performance.now()
    for (let i = 1; i <= 60; i++) {
        box.scrollTop = box.scrollHeight * i / 60
        await new Promise(requestAnimationFrame)
        frames.push(performance.now() - last)
        last = performance.now()
    }
    return [frames.sort((a, b) => a - b)[30], document.querySelectorAll('.image-row').length]
}"""


def test_three_thousand_rows(browser, long_study):
    "Only the rows in sight are in the page; its end, a search and the arrow keys come at once."
    me = Person(browser, long_study.url)
    page = me.go("/images")
    me.until("document.querySelectorAll('.image-row:not(.blank)').length > 5")
    assert page.locator(".count").first.inner_text() == str(MANY)
    frame, rows = page.evaluate(SCROLL)
    print(f"median frame while scrolling: {frame:.0f} ms")
    assert rows < 60 and frame < 500
    me.until("[...document.querySelectorAll('.image-row .c-name b')].some(b => b.textContent === 'S-299-009')")
    page.get_by_label("Search name, serial or group").fill("S-123-004")
    me.until("document.querySelectorAll('.image-row').length === 1")
    page.get_by_label("Search name, serial or group").fill("")
    me.go("/review/2501")
    me.until("document.querySelector('.scores h1')?.textContent === 'S-250-000'")
    page.wait_for_timeout(1000)                    # the page hears keys once it has been painted
    me.press("ArrowRight")
    me.until("document.querySelector('.scores h1')?.textContent === 'S-250-001'")
    me.context.close()


# ------------------------------------------------------------------------------------------ the build

def test_the_page_is_small_and_asks_nobody_else(built):
    "At most 300 kB gzipped; no address of another host is loaded, nothing inline."
    import gzip
    parts = [p for p in built.rglob("*") if p.suffix in (".html", ".js", ".css", ".svg")]
    assert sum(len(gzip.compress(p.read_bytes(), 9)) for p in parts) <= 300_000
    html = (built/"index.html").read_text()
    assert re.findall(r"(?:src|href)=\"(?!/)", html) == []
    assert "<style" not in html and not re.search(r"<script(?![^>]*src=)", html)
    assert not any("@import" in p.read_text() or "url(http" in p.read_text() for p in built.rglob("*.css"))


def test_the_types_are_those_of_the_back_end():
    "web/src/openapi.d.ts names the digest of the OpenAPI of which it was made."
    from histokit.review.api import openapi
    digest = hashlib.sha256(json.dumps(openapi(), sort_keys=True).encode()).hexdigest()
    assert digest in (WEB/"src/openapi.d.ts").read_text()[:300], "run: tools/web.sh types"


class Listener:
    "What a build says."
    def __init__(self): self.said = []
    def display_warning(self, line): self.said.append(line)


@pytest.fixture
def hook(tmp_path, monkeypatch):
    "The hook of the wheel's build, on a copy of the page's sources, without Node."
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT/"hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    shutil.copytree(WEB, tmp_path/"web", ignore=shutil.ignore_patterns("node_modules", "dist"))
    (tmp_path/"tools").mkdir()
    shutil.copy(ROOT/"tools/web_sources.py", tmp_path/"tools")
    def make(): return module.ReviewPage(str(tmp_path), {}, None, None, str(tmp_path/"out"), "wheel", Listener())
    return make, module.LINE


def included(make):
    data, page = dict(force_include={}), make()
    page.initialize("standard", data)
    return data["force_include"], page.app.said


def test_a_wheel_without_the_page_says_so(hook, tmp_path):
    files, said = included(hook[0])
    [(note, place)] = files.items()
    assert said == [hook[1]] and place == "histokit/_assets/web/MISSING.txt"
    assert Path(note).read_text() == hook[1] + "\n"


def test_a_wheel_takes_the_page_only_of_the_sources_beside_it(hook, tmp_path):
    script = [sys.executable, str(tmp_path/"tools/web_sources.py")]
    digest = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    (tmp_path/"web/dist").mkdir()
    (tmp_path/"web/dist/index.html").write_text("<!doctype html>")
    (tmp_path/"web/dist/.sources").write_text(digest)
    assert included(hook[0]) == ({"web/dist": "histokit/_assets/web"}, [])
    (tmp_path/"web/src/scores.ts").write_text("// another page")
    assert included(hook[0])[1] == [hook[1]]

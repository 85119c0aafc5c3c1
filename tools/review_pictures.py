"""The pictures of nbs/review/review.md: a study of painted crops, scored by two people, photographed in a browser."""
import argparse
import io
import random
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from histokit.review.demo import demo_crops, demo_model
from histokit.review.serve import Address, ReviewServer, open_study

OUT = Path(__file__).resolve().parents[1]/"nbs/review/pictures"
HEAD = {"X-Histokit": "1"}


def keep_small(shot, path):
    "At most 880 px wide, in 112 colours."
    shot = shot.convert("RGB")
    shot.thumbnail((880, 880), Image.Resampling.LANCZOS)
    shot.quantize(112, dither=Image.Dither.NONE).save(path, optimize=True)


class Walk:
    "A browser that takes small pictures."
    def __init__(self, browser, url, out):
        self.browser, self.url, self.out = browser, url, out

    def person(self, **more):
        size = dict(width=1200, height=760) | more.pop("viewport", {})
        context = self.browser.new_context(viewport=size, base_url=self.url, reduced_motion="reduce", **more)
        return context, context.request

    def shoot(self, context, name, path, until, then=None):
        "A picture of one page."
        page = context.new_page()
        page.goto(f"/#{path}")
        page.locator(until).first.wait_for(timeout=120_000)
        if then: then(page)
        page.wait_for_timeout(2500)
        keep_small(Image.open(io.BytesIO(page.screenshot())), self.out/f"{name}.png")
        page.close()


def ask(request, url, method, path, **body):
    answer = request.fetch(path, method=method, data=body, headers=HEAD | {"Origin": url.rstrip("/")})
    assert answer.ok, answer.text()
    return answer.json()


def score(request, url, item, person, rng):
    "Scores near the truth, which stands in the draft."
    events = []
    for number, (measure, value) in enumerate(item["draft"].items()):
        given = min(4, max(0, value + rng.choice([-1, 0, 0, 0, 1])))
        uid = f"{person}-{item['id']:04}-{number:04}"
        events.append(dict(uid=uid, measure=measure, value=given, seconds=2.5, draft_visible=True))
    ask(request, url, "POST", f"api/images/{item['id']}/events", events=events)


def fill(walk, table):
    "Two people, thirty pictures, most of them scored; gives the two browsers."
    ada, ada_asks = walk.person()
    ask(ada_asks, walk.url, "POST", "api/setup", name="Ada", password="a long password")
    ask(ada_asks, walk.url, "POST", "api/people", name="Ben", password="a long password", role="scorer")
    ben, ben_asks = walk.person()
    ask(ben_asks, walk.url, "POST", "api/login", name="Ben", password="a long password")
    page = ada.new_page()
    page.goto("/#/upload")
    page.locator("input[type=file]").set_input_files(list(table.path))
    page.get_by_text("30 drafted").wait_for(timeout=240_000)
    page.close()
    items, rng = ada_asks.get("api/images?limit=100").json()["items"], random.Random(0)
    for item in items[:24]: score(ada_asks, walk.url, item, "ada00000", rng)
    for item in items[4:28]: score(ben_asks, walk.url, item, "ben00000", rng)
    for item in items[5:7]:
        ask(ada_asks, walk.url, "POST", f"api/images/{item['id']}/flag", uid=f"flag-{item['id']:05}", on=True)
    return ada, items


def half(page):
    for key in "31": page.keyboard.press(key)


def map_on(page):
    "Press g and wait for the map, which is drawn on demand."
    page.keyboard.press("g")
    for _ in range(600):
        if page.evaluate("document.querySelector('.attention')?.naturalWidth > 0"): return
        page.wait_for_timeout(100)


def photograph(walk, table):
    ada, items = fill(walk, table)
    late = items[25]["id"]
    walk.shoot(ada, "score", f"/review/{late}", ".score.active", half)
    walk.shoot(ada, "map", f"/review/{items[7]['id']}", ".others", map_on)
    walk.shoot(ada, "pictures", "/images", ".image-row:not(.blank)")
    walk.shoot(ada, "add", "/upload", ".state.Completed")
    walk.shoot(ada, "agreement", "/agreement", ".agreement-table")
    state = ada.storage_state()
    phone, _ = walk.person(viewport=dict(width=390, height=844), storage_state=state)
    walk.shoot(phone, "phone", f"/review/{items[8]['id']}", ".score.active")
    dark, _ = walk.person(color_scheme="dark", storage_state=state)
    walk.shoot(dark, "dark", f"/review/{items[26]['id']}", ".score.active")


def main():
    ask_for = argparse.ArgumentParser(description=__doc__)
    ask_for.add_argument("--out", type=Path, default=OUT)
    ask_for.add_argument("--model", help="a model of the pancreas measures; one is trained where none is given")
    ask_for.add_argument("--chromium", default=shutil.which("chromium"))
    asked = ask_for.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        table, model = demo_crops(f"{folder}/crops", px=640), asked.model or f"{folder}/model.safetensors"
        if not asked.model: demo_model(table, model, print)
        store = open_study(f"{folder}/Pancreas", model=model)
        with ReviewServer(store, Address(port=0, people=True)) as server:
            browser = playwright.chromium.launch(executable_path=asked.chromium, args=["--no-sandbox", "--disable-gpu"])
            photograph(Walk(browser, server.url, asked.out), table)
            browser.close()


if __name__ == "__main__": main()

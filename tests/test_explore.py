"The explorer: what it sends, the page in a real browser, the widget in a notebook; and the cards of slides."
import base64
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from urllib.request import urlopen

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from histokit.cli import app
from histokit.core.page import INLINE_BYTES
from histokit.core.text import BadInput
from histokit.spots import explore as explore_module
from histokit.spots.cache import SlideCache
from histokit.spots.cards import html_factory, html_sample, html_slide, html_split, thumbnail
from histokit.spots.explore import can_draw_widgets, explore, widget_class
from histokit.spots.explore_page import explorer_page, explorer_server, write_explorer
from histokit.spots.explore_scene import COLOURINGS, Scene, SceneServer, as_view, palette_colours, patch_sizes
from histokit.spots.explore_still import explore_static
from histokit.spots.patches import HESpotDataset
from histokit.spots.slides import DataFactory
from histokit.spots.splits import assign_folds

ROOT = "document.getElementById('explorer').explorer"
N_SPOTS, N_TYPES = 1000, 12


@pytest.fixture(scope="module")
def scene(demo_file):
    factory = DataFactory(demo_file)
    train = factory.spots.split.eq("Train")
    return Scene(factory, factory.spots.loc[train, factory.targets].to_numpy() * 2)


# ------------------------------------------------------------------------------------------ without a browser

WRONG_VIEWS = [
    (dict(slide="s_1"), "did you mean 'S_1'"),
    (dict(target="c1"), "did you mean 'C1'"),
    (dict(target=99), "there are 35"),
    (dict(kind="prediction"), "unknown kind"),
    (dict(spot=10**6), "counted from 0"),
    (dict(beside="S_9"), "unknown slide"),
    (dict(beside="S_1"), "the same twice"),
    (dict(zoom=0), "or more"),
    (dict(zoom="2"), "are numbers"),
    (dict(x=float("nan")), "from 0 to 1"),
    (dict(colour=1), "unknown part of a view"),
    (dict(widgets="maybe"), "unknown widgets"),
]


@pytest.mark.parametrize("view,message", WRONG_VIEWS)
def test_wrong_views_are_refused_in_one_line(scene, view, message):
    with pytest.raises(BadInput, match=message) as e: explore(scene.factory, **view)
    assert "\n" not in str(e.value)


def test_predictions_must_fit(scene):
    for shape, message in (((5, 35), "fit neither"), ((len(scene.spots), 3), "a column for each")):
        with pytest.raises(BadInput, match=message): Scene(scene.factory, np.ones(shape))
    assert as_view(scene, target=scene.types[2]).target == 2


def test_patch_sizes_are_physical(scene):
    info = scene.factory.slides["S_1"]
    assert [label for _, label in patch_sizes(info)] == ["100 µm", "300 µm", "900 µm"]
    assert np.isclose(patch_sizes(info)[2][0] * info.um_per_px, 900, atol=info.um_per_px)


def test_module_import_is_light():
    names = ("matplotlib", "ipywidgets", "anywidget", "IPython", "anndata", "tifffile")
    code = f"import sys, histokit.spots.explore; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


def test_a_still_picture_says_why_and_is_not_pyplots(scene):
    before = plt.get_fignums()
    fig = explore(scene.factory, slide="S_2", target="C3", zoom=2.)
    assert can_draw_widgets() == (False, "not in a notebook")
    assert isinstance(fig, plt.Figure) and plt.get_fignums() == before
    assert fig._supxlabel.get_text() == "still picture: not in a notebook"


def test_a_still_picture_ends_a_cell_once(scene):
    "What IPython shows of it is one picture, whether or not pyplot was loaded; pyplot shows no second."
    from IPython.core.formatters import DisplayFormatter
    data, _ = DisplayFormatter().format(explore(scene.factory))
    assert data["image/png"][:4] == b"\x89PNG"
    assert plt.get_fignums() == []


def test_without_anywidget_one_line_says_what_to_install(scene, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "anywidget" else find(name, *a))
    widget_class.cache_clear()
    with pytest.raises(BadInput, match=r"pip install 'histokit\[lab\]'") as e: explore(scene.factory, widgets="yes")
    assert "\n" not in str(e.value)
    monkeypatch.setattr(explore_module, "can_draw_widgets", lambda: (False, "anywidget is not installed"))
    assert "anywidget" in explore(scene.factory)._supxlabel.get_text()


def test_a_widget_answers_messages_and_leaves_a_picture(scene):
    pytest.importorskip("anywidget")
    ex, sent = explore(scene.factory, scene.predicted, widgets="yes", slide="S_2", target="C3"), []
    ex.send = lambda content, buffers: sent.append((content, buffers))
    ex.answer(ex, dict(id="a", get=["tile", 1, 0, 0, 0]), [])
    ex.answer(ex, dict(id="b", get=["tile", 1, 0, 99, 0]), [])
    assert sent[0] == (dict(id="a"), [SceneServer(scene).get("tile", 1, 0, 0, 0)])
    assert "no tile" in sent[1][0]["error"] and sent[1][1] == []
    data = ex._repr_mimebundle_()[0]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert base64.b64decode(data["image/png"])[:4] == b"\x89PNG"
    ex.close()


def test_the_script_travels_with_the_package():
    from importlib.resources import files
    for kind in ("js", "css"): assert (files("histokit.spots")/f"explorer.{kind}").is_file()


BAD_COMMANDS = [
    ([], "does not exist"), (["--slide", "s_1"], "did you mean 'S_1'"), (["--kind", "score"], "unknown kind"),
    (["--target", "C99"], "unknown target"), (["--beside", "S_9"], "unknown slide"),
    (["--port", "70000", "--no-browser"], "port 70000"),
    (["--html", "a.html", "--max-mb", "nan"], "give a size"), (["--html", "."], "is a folder"),
]


@pytest.mark.parametrize("options,message", BAD_COMMANDS)
def test_the_command_refuses_in_one_line(demo_file, options, message):
    done = CliRunner().invoke(app, ["explore", demo_file if options else "no.h5", *options])
    assert done.exit_code == 1 and message in done.stderr and done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_named(scene):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadInput, match="give another, or 0"): explorer_server(scene, taken.getsockname()[1])


def test_the_command_prints_the_address(demo_file, monkeypatch):
    def stop(server): raise KeyboardInterrupt
    monkeypatch.setattr("histokit.spots.explore_page._Server.serve_forever", stop)
    done = CliRunner().invoke(app, ["explore", demo_file, "--no-browser"])
    assert done.exit_code == 0 and re.search(r"at http://localhost:\d+/ ", done.stdout)


# ------------------------------------------------------------------------------------------ in a browser

def hex_lattice(n, pitch, start):
    "n spots in rows that are shifted by half a pitch."
    rows, cols = np.divmod(np.arange(n), 40)
    return np.c_[start + pitch * (cols + rows % 2 / 2), start + pitch * .866 * rows]


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    "Two slides of 1000 spots, different in scale and shape, and one of a few spots to be predicted."
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("explore")/"thousand.h5"
    names = ["x", "y", *(f"C{i + 1}" for i in range(N_TYPES))]
    def spots(n, pitch, targets):
        xy = hex_lattice(n, pitch, 60) + rng.uniform(-1, 1, (n, 2))
        columns = [*xy.T, *rng.lognormal(-1, 1.5, (targets, n))]
        return np.rec.fromarrays(columns, names=names[:2 + targets])
    with h5py.File(path, "w") as h5:
        for name, shape, pitch, um in (("S_1", (1100, 1600, 3), 36, 2.8), ("S_2", (900, 1000, 3), 20, 5.)):
            low = rng.integers(90, 250, (shape[0] // 20, shape[1] // 20, 3), dtype=np.uint8)
            h5[f"images/Train/{name}"] = np.kron(low, np.ones((20, 20, 1), np.uint8))
            h5[f"spots/Train/{name}"] = spots(N_SPOTS, pitch, N_TYPES)
            h5[f"images/Train/{name}"].attrs["um_per_px"] = um
        h5["images/Train/S_1"].attrs["spot_diameter_px"] = 22.
        h5["images/Test/S_3"], h5["spots/Test/S_3"] = np.full((400, 700, 3), 200, np.uint8), spots(30, 15, 0)
    factory = DataFactory(path)
    truth = factory.spots.loc[factory.spots.split.eq("Train"), factory.targets].to_numpy()
    return Scene(factory, truth * rng.lognormal(0, 1, truth.shape))


@pytest.fixture(scope="module")
def address(thousand):
    with explorer_server(thousand) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


class Tab:
    "An open explorer, used with a mouse and keys."
    def __init__(self, page, root=ROOT): self.page, self.root = page, root

    def settle(self):
        "Wait until all is drawn, half a minute at most."
        self.page.wait_for_function(f"!{self.root}.busy()", timeout=30_000)
        return self.page.evaluate(f"{self.root}.settled()")

    def set(self, **changes):
        self.page.evaluate(f"{self.root}.set({json.dumps(changes)})")
        return self.settle()

    def get(self, what): return self.page.evaluate(f"{self.root}.{what}")

    def at(self, x, y, panel=0):
        "Where a place of a slide is on the page."
        return self.get(f"panels[{panel}].toScreen({x}, {y})")

    def click(self, x, y, panel=0):
        self.page.mouse.click(*self.at(x, y, panel))
        return self.settle()

    def drag(self, start, dx, dy):
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        for k in range(1, 5): mouse.move(start[0] + dx * k / 4, start[1] + dy * k / 4)
        mouse.up()
        return self.settle()

    def pixel(self, layer, x, y, panel=0):
        "The colour of a canvas at a place of the slide."
        return self.page.evaluate(f"""(() => {{ const p = {self.root}.panels[{panel}], f = p.frame();
            const at = [Math.round(({x} - f.cx) * f.k + f.w / 2), Math.round(({y} - f.cy) * f.k + f.h / 2)];
            return [...p.canvases.{layer}.getContext('2d').getImageData(...at, 1, 1).data]; }})()""")


@pytest.fixture
def tab(browser, address):
    "The served page in a window of a desk; any error on its console fails the test."
    page = browser.new_page(viewport=dict(width=1300, height=800))
    errors = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(address)
    tab = Tab(page)
    tab.settle()
    yield tab
    page.close()
    assert errors == []


def spot_places(scene, slide): return scene.spots.loc[scene.rows[slide], ["x", "y"]].to_numpy()


def test_a_click_picks_that_spot(tab, thousand):
    xy = spot_places(thousand, "S_1")
    for i in (0, 7, 555, 999):
        assert tab.click(*xy[i] + [3, -3])["spot"] == i
    assert tab.get("typed.value") == tab.get("controls.spot.value") == "999"
    assert "999 of 1000 on S_1" in tab.page.inner_text(".hk-facts")
    assert tab.click(1590, 1090)["spot"] == 999                                  # there is no spot near


def test_the_wheel_zooms_at_the_pointer(tab):
    place = (400., 300.)
    for _ in range(3):
        at = tab.at(*place)
        tab.page.mouse.move(*at)
        tab.page.mouse.wheel(0, -240)
        tab.settle()
        assert np.allclose(tab.at(*place), at, atol=.6)
    assert tab.get("view.zoom") > 3 and tab.get("view.spot") == 0
    for _ in range(9): tab.page.mouse.wheel(0, 240)
    assert tab.settle()["zoom"] == 1


def test_a_drag_pans_and_picks_nothing(tab, thousand):
    tab.set(zoom=3, spot=5)
    start, before = tab.at(*spot_places(thousand, "S_1")[500]), tab.at(300, 300)
    view = tab.drag(start, 80, -50)
    assert np.allclose(tab.at(300, 300), np.add(before, [80, -50]), atol=.6)
    assert view["spot"] == 5 and view["zoom"] == 3


def test_two_slides_beside_each_other_have_one_scale(tab, thousand):
    tab.set(beside="S_2", zoom=2)
    steps = [np.subtract(tab.at(101, 201, k), tab.at(100, 200, k)) for k in (0, 1)]
    assert np.allclose([s[0] / s[1] for s in steps], 1, atol=1e-6)                  # a pixel is a square
    assert np.isclose(steps[0][0] / 2.8, steps[1][0] / 5., rtol=1e-6)               # and a µm a µm
    for k in (0, 1):
        assert len({tuple(tab.pixel("tiles", 500 + 20 * i, 450, k)) for i in range(9)}) > 5         # a picture is there
    i = int(np.abs(spot_places(thousand, "S_2") - [500, 450]).sum(1).argmin())
    view = tab.click(*spot_places(thousand, "S_2")[i], 1)
    assert (view["slide"], view["beside"], view["spot_of"], view["spot"]) == ("S_1", "S_2", "S_2", i)
    assert "on S_2" in tab.page.inner_text(".hk-facts")
    assert tab.set(slide="S_2")["beside_kind"] == "prediction"                      # the same slide in other colours
    moved = tab.drag(tab.at(500, 450, 1), 40, 0)
    assert np.subtract(tab.at(500, 450, 0), tab.at(500, 450, 1))[1] == 0 and moved["x"] < .5    # both move as one


def test_spots_are_circles_of_the_files_diameter(tab, thousand):
    tab.set(zoom=4, x=.3, y=.3)
    xy = spot_places(thousand, "S_1")
    x, y = xy[np.abs(xy - [480, 330]).sum(1).argmin()]
    inside = tab.pixel("spots", x, y)
    assert inside[3] == 255
    for angle in np.radians(np.arange(0, 360, 30)):
        step = np.array([np.cos(angle), np.sin(angle)])
        assert tab.pixel("spots", *([x, y] + 10 * step))[3] == 255                  # the diameter is 22
        assert tab.pixel("spots", *([x, y] + 12 * step))[3] == 0
    assert tab.get("facts.slides.map((s) => s.spot_px)")[0] == 22


@pytest.mark.parametrize("kind", COLOURINGS)
def test_colours_are_the_values_asked_for(tab, thousand, kind):
    tab.set(kind=kind, target=3)
    xy, rows = spot_places(thousand, "S_1"), thousand.rows["S_1"]
    low, high = thousand.limits(kind, 3)
    share = np.clip((thousand.values(kind, 3)[rows] - low) / (high - low), 0, 1)
    due = palette_colours(COLOURINGS[kind].palette)[np.floor(255 * share + .5).astype(int)].astype(int)
    for i in range(0, 1000, 83): assert np.abs(np.subtract(tab.pixel("spots", *xy[i])[:3], due[i])).max() <= 3
    assert COLOURINGS[kind].unit in tab.page.inner_text(".hk-unit >> nth=0")


def test_a_step_takes_less_than_200_ms_and_redraws_only_marks(tab):
    script = """async () => { const e = ROOT, stage = e.panels[0].stage, out = [];
        for (let i = 0; i < 12; i++) {
            const t = performance.now();
            stage.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }));
            await e.settled();
            out.push(performance.now() - t);
        }
        return out; }""".replace("ROOT", ROOT)
    before = dict(tab.get("counts"))
    times = tab.page.evaluate(script)
    after = tab.get("counts")
    assert tab.get("view.spot") == 12 and np.median(times) < 200, times
    assert {k: after[k] - before[k] for k in ("tiles", "spots", "bar", "caption", "marks")} == dict(tiles=0, spots=0,
        bar=0, caption=0, marks=12)
    print(f"a step among {N_SPOTS} spots: {np.median(times):.0f} ms, at most {max(times):.0f}")


def test_keys_step_from_spot_to_spot(tab, thousand):
    tab.click(*spot_places(thousand, "S_1")[500])
    def press(*keys):
        for key in keys: tab.page.keyboard.press(key)
        return tab.settle()["spot"]
    assert press("ArrowRight") == 501 and press("ArrowLeft", "ArrowLeft") == 499 and press("PageDown") == 509
    assert press("Shift+ArrowRight") == 510 and press("Shift+ArrowDown") in (549, 550, 551)
    assert press("Home") == 0 and press("ArrowLeft") == 0 and press("End") == 999
    tab.set(zoom=8, x=.1, y=.1)
    press("ArrowLeft")                                                               # far outside: it comes into view
    box = tab.page.locator(".hk-stage").first.bounding_box()
    x, y = tab.at(*spot_places(thousand, "S_1")[998])
    assert box["x"] < x < box["x"] + box["width"] and box["y"] < y < box["y"] + box["height"]


def test_the_spot_under_the_pointer_is_named(tab, thousand):
    tab.page.mouse.move(*tab.at(*spot_places(thousand, "S_1")[77]))
    tab.settle()
    text = tab.page.inner_text(".hk-tip")
    assert all(word in text for word in ("77 of 1000", "C1", "truth", "prediction", "rank", "score"))
    assert tab.get("view.spot") == 0
    tab.page.mouse.move(*tab.at(1590, 1090))
    assert tab.page.locator(".hk-tip").is_hidden()


def test_a_slide_without_truth_has_rings_and_says_so(tab, thousand):
    tab.set(slide="S_3")
    assert "not known here" in tab.page.inner_text("figcaption >> nth=0")
    assert tab.pixel("spots", *spot_places(thousand, "S_3")[3])[3] == 0
    assert "nothing is known" in tab.page.inner_text(".hk-bars")


def test_controls_follow_and_lead(tab):
    page = tab.page
    page.select_option("select[aria-label='cell type']", "4")
    page.select_option("select[aria-label='beside it']", "S_2")
    page.fill("input[type=number]", "42")
    page.keyboard.press("Enter")
    page.get_by_label("zoom in").click()
    view = tab.settle()
    assert (view["target"], view["beside"], view["spot"], view["zoom"]) == (4, "S_2", 42, 2)
    counts = dict(tab.get("counts"))
    move = "(i) => { i.value = .3; i.dispatchEvent(new Event('input')); }"
    page.evaluate(move, page.query_selector("[aria-label=opacity]"))
    assert tab.settle()["opacity"] == .3 and tab.get("counts") == counts             # the browser fades what is drawn
    page.get_by_label("the whole slide").click()
    page.select_option("select[aria-label='slide']", "S_3")
    view = tab.settle()
    assert (view["slide"], view["spot"], view["zoom"], tab.get("typed.max")) == ("S_3", 0, 1, "29")


def test_a_phone_and_the_dark(browser, address):
    page = browser.new_page(viewport=dict(width=390, height=844), color_scheme="dark", device_scale_factor=2)
    page.goto(address)
    tab = Tab(page)
    for beside in ("", "S_2"):
        tab.set(beside=beside)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    ink, paper = (page.evaluate(f"getComputedStyle(document.querySelector('.hk-explorer')).{v}")
        for v in ("color", "backgroundColor"))
    assert sum(map(int, re.findall(r"\d+", ink)[:3])) > 600 > 150 > sum(map(int, re.findall(r"\d+", paper)[:3]))
    page.close()


def test_a_page_that_holds_everything(browser, thousand, tmp_path):
    out = tmp_path/"all.html"
    assert "reduced to fit: S_1 1:2" in write_explorer(out, thousand, most_mb=1., kind="score", beside="S_2")
    assert out.stat().st_size < 1_600_000
    page = browser.new_page(viewport=dict(width=1300, height=800))
    asked, errors = [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(out.as_uri())
    tab = Tab(page)
    tab.settle()
    i = int(np.abs(spot_places(thousand, "S_2") - [500, 450]).sum(1).argmin())
    view = tab.click(*spot_places(thousand, "S_2")[i], 1)
    assert (view["kind"], view["spot_of"], view["spot"]) == ("score", "S_2", i)
    tab.set(zoom=20)
    assert page.inner_text(".hk-status").startswith("The wheel") and errors == []
    assert [u for u in asked if not u.startswith(("file:", "data:", "blob:"))] == []
    page.close()


# ------------------------------------------------------------------------------------------ in JupyterLab

@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a free port, in an empty folder."
    pytest.importorskip("jupyterlab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [f"--ServerApp.port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    given += ["--no-browser", "--ServerApp.port_retries=0", "--LabApp.news_url=None", "--allow-root"]
    own = {f"JUPYTER_{k}_DIR": str(tmp_path/f".{k}") for k in ("CONFIG", "RUNTIME", "DATA")}
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *given], env=os.environ | own,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        try:
            urlopen(f"http://127.0.0.1:{port}/api").close()
            break
        except OSError: time.sleep(.1)
    yield f"http://127.0.0.1:{port}", tmp_path
    process.terminate()
    process.wait(20)


@pytest.mark.slow
def test_in_jupyterlab(browser, lab, thousand):
    "A notebook's cell is run; the mouse and the keys do what they do on the page."
    import nbformat
    address, folder = lab
    pytest.importorskip("anywidget")
    source = ["import numpy as np", "from histokit.spots.explore import explore",
        "from histokit.spots.slides import DataFactory", f"f = DataFactory({str(thousand.factory.path)!r})",
        "t = f.spots.loc[f.spots.split.eq('Train'), f.targets].to_numpy()", "ex = explore(f, t * 2)", "ex"]
    after = ["print('at', ex.viewpoint.spot)", "ex.show(spot=7);"]
    cells = [nbformat.v4.new_code_cell("\n".join(lines)) for lines in (source, after)]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder/"a.ipynb")
    page = browser.new_page(viewport=dict(width=1500, height=1000))
    errors = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.goto(f"{address}/lab/tree/a.ipynb")
    page.locator(".jp-CodeCell .cm-content").first.click(timeout=60_000)
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".hk-explorer .hk-facts dd", timeout=90_000)
    tab = Tab(page, "document.querySelector('.hk-explorer').explorer")
    tab.settle()
    assert page.locator(".jp-OutputArea-child").count() == 1
    page.locator(".hk-stage").first.scroll_into_view_if_needed()
    xy = spot_places(thousand, "S_1")
    assert tab.click(*xy[123])["spot"] == 123
    assert tab.get("view.spot") == 123
    page.keyboard.press("ArrowDown")
    assert tab.settle()["spot"] == 124                                   # JupyterLab leaves the key to the explorer
    at = tab.at(*xy[124])
    page.mouse.move(*at)
    page.mouse.wheel(0, -240)
    tab.settle()
    assert np.allclose(tab.at(*xy[124]), at, atol=.6) and tab.get("view.zoom") > 1.3
    view = tab.drag(at, 60, 30)
    assert view["spot"] == 124 and np.allclose(tab.at(*xy[124]), np.add(at, [60, 30]), atol=.6)
    times = page.evaluate("""async () => { const e = document.querySelector('.hk-explorer').explorer, out = [];
        for (let i = 0; i < 8; i++) {
            const t = performance.now();
            e.step(e.view.spot + 1);
            await e.settled();
            out.push(performance.now() - t);
        }
        return out; }""")
    assert np.median(times) < 200, times
    tab.set(beside="S_2", kind="difference")
    for k in (0, 1): assert tab.get(f"panels[{k}].canvases.spots.width") > 100 and tab.pixel("tiles", 500, 450, k)[3]
    page.wait_for_timeout(400)                                           # the view reaches Python
    page.locator(".jp-CodeCell .cm-content").nth(1).click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector("text=at 132", timeout=20_000)
    page.wait_for_function(f"{tab.root}.view.spot == 7", timeout=20_000)                    # and Python's the browser
    if folder := os.environ.get("HISTOKIT_PICTURES"): page.screenshot(path=f"{folder}/lab.png")
    assert errors == []
    print(f"a step in JupyterLab among {N_SPOTS} spots: {np.median(times):.0f} ms, at most {max(times):.0f}")
    page.close()


# ------------------------------------------------------------------------------------------ cards

def inline(page):
    "The picture of a page; the page is small."
    source = re.search(r'src="data:image/png;base64,(.*?)"', page)[1]
    assert len(source) < INLINE_BYTES and page.count("<table") == page.count("</table>")
    return Image.open(io.BytesIO(base64.b64decode(source)))


def test_card_of_a_slide(scene):
    info = scene.factory.slides["S_1"]
    page = html_slide(info, scene.factory)
    inline(page)
    assert all(str(w) in page for w in ("S_1", info.n_spots, "µm/px", "hex"))


def test_card_of_a_file(scene):
    page = html_factory(scene.factory)
    inline(page)
    assert "35: C1" in page and scene.factory.path.name in page


def test_card_of_a_split(scene):
    spots = scene.spots.assign(fold=assign_folds(scene.spots))
    page = html_split(spots)
    inline(page)
    assert "fold 2" in page and "leak" not in page
    assert "leak" in html_split(spots.assign(patient="P1"))
    with pytest.raises(BadInput, match="assign_folds"): html_split(scene.spots)


def test_card_of_a_sample(scene, demo_file):
    f, spots = scene.factory, scene.spots
    train = spots[spots.split.eq("Train")].reset_index(drop=True)
    page = html_sample(HESpotDataset(train, SlideCache(demo_file), 56, 64, target=train[f.targets]), 3, f.cell_types)
    inline(page)
    largest = int(train[f.targets].iloc[3].to_numpy().argmax())
    assert "sample 3 of" in page and f.cell_types[largest] in page


@pytest.fixture
def noisy(tmp_path):
    "A file of pictures that do not compress, three spots each, with names that look like markup."
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    spots = np.rec.fromarrays([[5, 50, 900], [7, 70, 300], [.1, .2, .3]], names="x,y,C1")
    path = tmp_path/"<b>n.h5"
    with h5py.File(path, "w") as h5:
        for i in range(12):
            h5[f"images/Train/S_{i}"] = noise
            h5[f"spots/Train/S_{i}"] = spots
        h5.attrs["cell_types"] = ["<script>"]
    return DataFactory(path)


def test_cards_stay_small_and_safe(noisy):
    "A picture that does not compress is made smaller; names are not taken for markup."
    for page in (html_factory(noisy), html_slide(noisy.slides["S_3"], noisy)):
        inline(page)
        assert "<script>" not in page and "<b>n" not in page
    assert max(thumbnail(noisy, "S_1", 100).size) == 100


def test_a_slide_without_lattice_and_scale_is_drawn(noisy):
    scene = Scene(noisy)
    assert explore_static(scene, "S_1")._repr_png_()[:4] == b"\x89PNG"
    server = SceneServer(scene)
    assert [label for _, label in server.facts()["slides"][0]["patches"]] == ["1 pitch", "3 pitches", "9 pitches"]
    assert explorer_page(server, as_view(scene)).count("<script") == 1                      # a type's name is no script

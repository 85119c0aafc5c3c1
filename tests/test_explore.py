"The explorer without a browser: controls are set as a person would move them, and what is drawn is looked at."
import base64
import importlib.util
import io
import os
import re
import subprocess
import sys

import h5py
import matplotlib
import numpy as np
import pytest
from PIL import Image

from histokit.core.text import BadInput
from histokit.spots.slides import DataFactory
from histokit.spots.patches import HESpotDataset
from histokit.spots.cache import SlideCache
from histokit.spots.splits import assign_folds
from histokit.core.page import INLINE_BYTES
from histokit.spots.explore import Explorer, Scene, Viewpoint, as_view, can_draw_widgets, explore, explore_static, moved, nearest_spot, patch_sizes, ranked, window
from histokit.spots.cards import html_factory, html_sample, html_slide, html_split, thumbnail

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed; the explorer's controls are not tested here")


@pytest.fixture(scope="module")
def look(demo_file):
    factory = DataFactory(demo_file)
    train = factory.spots.split.eq("Train")
    return Scene(factory, factory.spots.loc[train, factory.targets].to_numpy() * 2)


@pytest.fixture
def ex(look):
    ex = Explorer(look, Viewpoint("S_1"), mouse="no")
    yield ex
    ex.close()


def picture(ex): return np.asarray(Image.open(io.BytesIO(ex.picture.value)).convert("RGB"))


def dots(ax):
    "The values of the coloured spots of a drawn slide."
    return next(c.get_array() for c in ax.collections if c.get_array() is not None)


@pytest.mark.parametrize("name,value", [("slide", "S_2"), ("target", 4), ("kind", "difference"), ("spot", 5), ("zoom", 4.), ("beside", "S_3")])
def test_each_control_changes_the_view_and_the_picture(ex, name, value):
    before, shape = ex.picture.value, picture(ex).shape
    getattr(ex, name).value = value
    assert getattr(ex.view, name) == value and ex.picture.value != before
    assert (picture(ex).shape != shape) == (name == "beside")
    assert all(w.value == getattr(ex.view, k) for k, w in ex.values.items())


def test_window_moves_only_when_zoomed(ex):
    ex.zoom.value = 4.
    before = ex.picture.value
    ex.x.value, ex.y.value = .2, .8
    assert (ex.view.x, ex.view.y) == (.2, .8) and ex.picture.value != before
    for label, x in (("→", .25 / 4), ("←", -.25 / 4)):
        was = ex.view.x; ex.press(label); assert np.isclose(ex.view.x, was + x, atol=2e-3)
    ex.show(moved(ex.view, 0, -99))
    assert window(ex.look.factory.slides["S_1"], ex.view)[2] == 0
    ex.press("⤢"); assert (ex.view.zoom, ex.view.x, ex.view.y) == (1, .5, .5)
    ex.press("+"); assert ex.view.zoom == 2
    ex.press("−"); ex.press("−"); assert ex.view.zoom == 1


def test_buttons_are_wired(ex):
    ex.buttons["+"].click(); assert ex.view.zoom == 2
    ex.buttons["⤢"].click(); assert ex.view.zoom == 1


def test_colours_are_the_values_asked_for(ex, look):
    rows = look.of["S_1"]
    assert np.allclose(dots(ex.axes[0]), np.log10(np.maximum(look.truth[rows, 0], 1e-6)))
    ex.kind.value = "difference"
    assert np.allclose(dots(ex.axes[0]), np.log10(2), atol=1e-3)
    ex.kind.value, ex.target.value = "prediction", 7
    assert np.allclose(dots(ex.axes[0]), np.log10(np.maximum(2 * look.truth[rows, 7], 1e-6)))


def test_two_slides_share_their_colours(ex):
    ex.beside.value = "S_2"
    first, second = (next(c for c in ax.collections if c.get_array() is not None) for ax in ex.axes)
    assert first.get_clim() == second.get_clim() and [a.get_title()[:3] for a in ex.axes] == ["S_1", "S_2"]
    ex.slide.value = "S_2"                                                # the same slide twice makes no sense
    assert ex.view.beside == "" and ex.beside.value == ""


def test_the_spot_number_follows_the_slide(ex, look):
    ex.spot.value = ex.spot.max
    ex.slide.value = "S_3"
    assert ex.spot.max == len(look.of["S_3"]) - 1 and ex.view.spot == 0


def test_a_click_chooses_the_nearest_spot(ex, look):
    at = look.spots.loc[look.of["S_1"], ["x", "y"]].to_numpy()
    ex.click(*at[6] + 1)
    assert ex.spot.value == 6 and "6 of" in ex.facts.value and nearest_spot(look, "S_1", *at[6]) == 6
    ex.beside.value = "S_2"
    ex.click(*look.spots.loc[look.of["S_2"][4], ["x", "y"]], "S_2")
    assert (ex.view.slide, ex.view.beside, ex.view.spot) == ("S_2", "S_1", 4)


def test_a_test_slide_has_rings_and_says_so(look):
    ex = Explorer(look, Viewpoint("S_4"), mouse="no")
    assert "no truth known" in ex.axes[0].get_title() and len(dots(ex.axes[0])) == 0 and ranked(look, ex.view).truth.isna().all()
    ex.close()


def test_mouse_by_ipympl(look):
    if importlib.util.find_spec("ipympl") is None:
        with pytest.raises(BadInput, match="pip install ipympl"): Explorer(look, Viewpoint("S_1"), mouse="yes")
        pytest.skip("ipympl is not installed; clicks and the wheel are tested without its canvas only")
    from matplotlib.backend_bases import MouseEvent
    ex = Explorer(look, Viewpoint("S_1"), mouse="yes"); ex.picture.draw()
    def event(name, xy, **more): return MouseEvent(name, ex.picture, *ex.axes[0].transData.transform(xy), **more)
    at = look.spots.loc[look.of["S_1"], ["x", "y"]].to_numpy()
    ex.picture.callbacks.process("button_press_event", event("button_press_event", at[3], button=1)); assert ex.view.spot == 3
    ex.picture.draw(); ex.picture.callbacks.process("scroll_event", event("scroll_event", at[3], step=1, button="up")); assert ex.view.zoom == 1.25


def test_widgets_and_picture_side_by_side(ex):
    bundle = ex._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and base64.b64decode(bundle["image/png"])[:4] == b"\x89PNG"


def test_explore_is_still_here_and_says_why(look):
    assert can_draw_widgets() == (False, "not in a notebook")
    fig = explore(look.factory, slide="S_2", target="C3", zoom=2.)
    assert isinstance(fig, matplotlib.figure.Figure) and fig.texts[-1].get_text() == "still picture: not in a notebook"
    ex = explore(look.factory, widgets="yes", slide="S_2", target="C3", mouse="no")
    assert ex.view == Viewpoint("S_2", 2)
    ex.close(); matplotlib.pyplot.close(fig)


@pytest.mark.parametrize("view,message", [(dict(slide="s_1"), "did you mean 'S_1'"), (dict(target="c1"), "did you mean 'C1'"), (dict(target=99), "there are 35"), (dict(kind="prediction"), "unknown kind"),
    (dict(spot=10**6), "counted from 0"), (dict(beside="S_9"), "unknown slide"), (dict(widgets="maybe"), "unknown widgets")])
def test_wrong_views_are_refused_in_one_line(look, view, message):
    with pytest.raises(BadInput, match=message) as e: explore(look.factory, **view)
    assert "\n" not in str(e.value)


def test_predictions_must_fit(look):
    for shape, message in (((5, 35), "fit neither"), ((len(look.spots), 3), "a column for each")):
        with pytest.raises(BadInput, match=message): Scene(look.factory, np.ones(shape))
    assert as_view(look, target=look.types[2]).target == 2


def test_patch_sizes_are_physical(look):
    info = look.factory.slides["S_1"]
    assert [label for _, label in patch_sizes(info)] == ["100 µm", "300 µm", "900 µm"] and np.isclose(patch_sizes(info)[2][0] * info.um_per_px, 900, atol=info.um_per_px)


def test_module_import_is_light():
    code = "import sys, histokit.explore; print([m for m in ('matplotlib', 'ipywidgets', 'ipympl', 'IPython', 'anndata', 'tifffile') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ).stdout.strip() == "[]"


def inline(page):
    "The picture of a page; the page is small."
    source = re.search(r'src="data:image/png;base64,(.*?)"', page)[1]
    assert len(source) < INLINE_BYTES and page.count("<table") == page.count("</table>")
    return Image.open(io.BytesIO(base64.b64decode(source)))


def test_small_pages(look, demo_file):
    f, spots = look.factory, look.spots.assign(fold=assign_folds(look.spots))
    page = html_slide(f.slides["S_1"], f); inline(page)
    assert all(str(w) in page for w in ("S_1", f.slides["S_1"].n_spots, "µm/px", "hex"))
    page = html_factory(f); inline(page); assert "35: C1" in page and f.path.name in page
    page = html_split(spots); inline(page); assert "fold 2" in page and "leak" not in page
    assert "leak" in html_split(spots.assign(patient="P1"))
    with pytest.raises(BadInput, match="assign_folds"): html_split(look.spots)
    train = spots[spots.split.eq("Train")].reset_index(drop=True)
    page = html_sample(HESpotDataset(train, SlideCache(demo_file), 56, 64, train[f.targets]), 3, f.cell_types)
    inline(page); assert "sample 3 of" in page and f.cell_types[int(train[f.targets].iloc[3].to_numpy().argmax())] in page


def test_pages_stay_small_and_safe(tmp_path):
    "A picture that does not compress is made smaller; names are not taken for markup."
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    with h5py.File(tmp_path/"<b>n.h5", "w") as h5:
        for i in range(12):
            h5[f"images/Train/S_{i}"] = noise
            h5[f"spots/Train/S_{i}"] = np.rec.fromarrays([[5, 50, 900], [7, 70, 300], [.1, .2, .3]], names="x,y,C1")
        h5.attrs["cell_types"] = ["<script>"]
    f = DataFactory(tmp_path/"<b>n.h5")
    for page in (html_factory(f), html_slide(f.slides["S_3"], f)): inline(page); assert "<script>" not in page and "<b>n" not in page
    assert max(thumbnail(f, "S_1", 100).size) == 100
    fig = explore_static(f, "S_1"); matplotlib.pyplot.close(fig)                                   # no lattice, no scale

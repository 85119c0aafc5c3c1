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

from histokit.core.page import INLINE_BYTES
from histokit.core.text import BadInput
from histokit.spots.cache import SlideCache
from histokit.spots.cards import html_factory, html_sample, html_slide, html_split, thumbnail
from histokit.spots.explore import (Explorer, Scene, Viewpoint, as_view, can_draw_widgets, explore, explore_static,
    most_abundant, move_view, nearest_spot, patch_sizes, view_window)
from histokit.spots.patches import HESpotDataset
from histokit.spots.slides import DataFactory
from histokit.spots.splits import assign_folds

pytest.importorskip("ipywidgets", reason="ipywidgets is not installed; the explorer's controls are not tested here")


@pytest.fixture(scope="module")
def scene(demo_file):
    factory = DataFactory(demo_file)
    train = factory.spots.split.eq("Train")
    return Scene(factory, factory.spots.loc[train, factory.targets].to_numpy() * 2)


@pytest.fixture
def ex(scene):
    ex = Explorer(scene, Viewpoint("S_1"), mouse="no")
    yield ex
    ex.close()


def picture(ex): return np.asarray(Image.open(io.BytesIO(ex.picture.value)).convert("RGB"))


def dots(ax):
    "The values of the coloured spots of a drawn slide."
    return next(c.get_array() for c in ax.collections if c.get_array() is not None)


CONTROLS = [("slide", "S_2"), ("target", 4), ("kind", "difference"), ("spot", 5), ("zoom", 4.), ("beside", "S_3")]


@pytest.mark.parametrize("name,value", CONTROLS)
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
        was = ex.view.x
        ex.press(label)
        assert np.isclose(ex.view.x, was + x, atol=2e-3)
    ex.show(move_view(ex.view, 0, -99))
    assert view_window(ex.scene.factory.slides["S_1"], ex.view)[2] == 0
    ex.press("⤢")
    assert (ex.view.zoom, ex.view.x, ex.view.y) == (1, .5, .5)
    ex.press("+")
    assert ex.view.zoom == 2
    for _ in range(2): ex.press("−")
    assert ex.view.zoom == 1


def test_buttons_are_wired(ex):
    ex.buttons["+"].click()
    assert ex.view.zoom == 2
    ex.buttons["⤢"].click()
    assert ex.view.zoom == 1


def test_colours_are_the_values_asked_for(ex, scene):
    rows = scene.rows["S_1"]
    assert np.allclose(dots(ex.axes[0]), np.log10(np.maximum(scene.truth[rows, 0], 1e-6)))
    ex.kind.value = "difference"
    assert np.allclose(dots(ex.axes[0]), np.log10(2), atol=1e-3)
    ex.kind.value, ex.target.value = "prediction", 7
    assert np.allclose(dots(ex.axes[0]), np.log10(np.maximum(2 * scene.truth[rows, 7], 1e-6)))


def test_two_slides_share_their_colours(ex):
    ex.beside.value = "S_2"
    first, second = (next(c for c in ax.collections if c.get_array() is not None) for ax in ex.axes)
    assert first.get_clim() == second.get_clim() and [a.get_title()[:3] for a in ex.axes] == ["S_1", "S_2"]
    ex.slide.value = "S_2"                                                # the same slide twice makes no sense
    assert ex.view.beside == "" and ex.beside.value == ""


def test_the_spot_number_follows_the_slide(ex, scene):
    ex.spot.value = ex.spot.max
    ex.slide.value = "S_3"
    assert ex.spot.max == len(scene.rows["S_3"]) - 1 and ex.view.spot == 0


def test_a_click_chooses_the_nearest_spot(ex, scene):
    at = scene.spots.loc[scene.rows["S_1"], ["x", "y"]].to_numpy()
    ex.click(*at[6] + 1)
    assert ex.spot.value == 6 and "6 of" in ex.facts.value and nearest_spot(scene, "S_1", *at[6]) == 6
    ex.beside.value = "S_2"
    ex.click(*scene.spots.loc[scene.rows["S_2"][4], ["x", "y"]], "S_2")
    assert (ex.view.slide, ex.view.beside, ex.view.spot) == ("S_2", "S_1", 4)


def test_a_test_slide_has_rings_and_says_so(scene):
    ex = Explorer(scene, Viewpoint("S_4"), mouse="no")
    assert "no truth known" in ex.axes[0].get_title() and len(dots(ex.axes[0])) == 0
    assert most_abundant(scene, ex.view).truth.isna().all()
    ex.close()


def test_mouse_by_ipympl(scene):
    if importlib.util.find_spec("ipympl") is None:
        with pytest.raises(BadInput, match="pip install ipympl"): Explorer(scene, Viewpoint("S_1"), mouse="yes")
        pytest.skip("ipympl is not installed; clicks and the wheel are tested without its canvas only")
    from matplotlib.backend_bases import MouseEvent
    ex = Explorer(scene, Viewpoint("S_1"), mouse="yes")
    at = scene.spots.loc[scene.rows["S_1"], ["x", "y"]].to_numpy()
    def send(name, xy, **more):
        ex.picture.draw()
        event = MouseEvent(name, ex.picture, *ex.axes[0].transData.transform(xy), **more)
        ex.picture.callbacks.process(name, event)
    send("button_press_event", at[3], button=1)
    assert ex.view.spot == 3
    send("scroll_event", at[3], step=1, button="up")
    assert ex.view.zoom == 1.25


def test_widgets_and_picture_side_by_side(ex):
    bundle = ex._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"])[:4] == b"\x89PNG"


def test_explore_is_still_here_and_says_why(scene):
    assert can_draw_widgets() == (False, "not in a notebook")
    fig = explore(scene.factory, slide="S_2", target="C3", zoom=2.)
    assert isinstance(fig, matplotlib.figure.Figure) and fig.texts[-1].get_text() == "still picture: not in a notebook"
    ex = explore(scene.factory, widgets="yes", slide="S_2", target="C3", mouse="no")
    assert ex.view == Viewpoint("S_2", 2)
    ex.close()
    matplotlib.pyplot.close(fig)


WRONG_VIEWS = [
    (dict(slide="s_1"), "did you mean 'S_1'"),
    (dict(target="c1"), "did you mean 'C1'"),
    (dict(target=99), "there are 35"),
    (dict(kind="prediction"), "unknown kind"),
    (dict(spot=10**6), "counted from 0"),
    (dict(beside="S_9"), "unknown slide"),
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
    names = ("matplotlib", "ipywidgets", "ipympl", "IPython", "anndata", "tifffile")
    code = f"import sys, histokit.spots.explore; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


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
    matplotlib.pyplot.close(explore_static(noisy, "S_1"))

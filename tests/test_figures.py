"Every figure that a run writes, looked at by a program: text that is large enough, and none over another."
import copy
import itertools
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from histokit.core.checks import error, note, warning
from histokit.core.runs import RunFolder
from histokit.learn.ladder import show_ladder
from histokit.learn.trainer import show_history
from histokit.spots.answers import answer_test, open_answers, out_of_fold, show_costs, show_steps
from histokit.spots.cache import SlideCache
from histokit.spots.check_patches import show_checks
from histokit.spots.contributions import contributions, show_contributions, show_swaps, swaps
from histokit.spots.maps import show_maps, show_slides, show_targets
from histokit.spots.patches import HESpotDataset, PatchSampler
from histokit.spots.prepare import draw_prepared
from histokit.spots.register import Registration, show_registration
from histokit.spots.results import open_stage, read_run, show_comparison
from histokit.spots.settings import PredictionSettings
from histokit.spots.slides import DataFactory
from histokit.spots.stain_files import compare_slides, plot_slides, plot_stain_change

LEAST = 8                     # points


def texts_of(fig):
    "The texts of a figure that are shown, with the box of each in pixels."
    fig.set_canvas(FigureCanvasAgg(fig))
    fig.canvas.draw()
    hidden = {t for axis in fig.findobj(Axis) for t in (*axis.get_minorticklabels(), axis.offsetText)}
    for axis in fig.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-6 * (high - low)
        for tick in axis.get_major_ticks():
            seen = low - slack <= tick.get_loc() <= high + slack
            if not (seen and axis.axes.axison): hidden |= {tick.label1, tick.label2}
    shown = [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in hidden]
    return {t: t.get_window_extent(fig.canvas.get_renderer()) for t in shown}


def common(a, b):
    "(width, height) that two boxes have in common."
    return min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)


def faults(fig):
    "What is wrong with the text of a figure, a sentence each."
    boxes = texts_of(fig)
    small = [f"'{t.get_text()}' has {t.get_fontsize():g} points" for t in boxes if t.get_fontsize() < LEAST]
    pairs = itertools.combinations(boxes.items(), 2)
    over = [f"'{a.get_text()}' lies on '{b.get_text()}'" for (a, one), (b, two) in pairs if min(common(one, two)) > 1]
    return [f.replace("\n", " / ") for f in small + over]


def unlabelled(fig):
    "Maps whose colours nothing explains: collections with values, in a figure without a colour bar."
    coloured = [ax for ax in fig.axes if any(c.get_array() is not None for c in ax.collections) and ax.images]
    bars = [ax for ax in fig.axes if ax.get_label() == "<colorbar>"]
    return len(coloured) if not bars else 0


def test_the_eye_sees_what_is_wrong():
    fig, ax = plt.subplots(figsize=(3, 2))
    ax.set_xticks(range(3), ["a label that is long"] * 3)
    ax.set_title("small", fontsize=7)
    found = faults(fig)
    assert "'small' has 7 points" in found and "'a label that is long' lies on 'a label that is long'" in found
    assert faults(plt.figure(figsize=(3, 2))) == []
    plt.close("all")


@pytest.fixture(scope="module")
def run(finished_run):
    return RunFolder(finished_run)


@pytest.fixture(scope="module")
def data_path(run): return run.json("run.json")["parameters"]["data_path"]


def prepared_figures(run, data_path, tmp_path):
    factory, spots = open_stage(run, data_path)
    return draw_prepared(RunFolder(tmp_path), factory, spots, dict.fromkeys(factory.names(), Registration()))


def stain_figures(run, data_path, tmp_path):
    found = compare_slides(data_path, run/"slides.h5")
    return dict(slides=plot_slides(found), vectors=plot_stain_change(found))


def training_figures(run, data_path, tmp_path):
    histories = {f"fold {k}": pd.read_csv(run.fold_dir(k)/"history.csv") for k in run.folds()}
    ladders = {name: show_ladder(pd.DataFrame(rows), name) for name, rows in run.json("metrics.json").items()
        if name in ("oof", "test") and rows}
    return dict(history=show_history(histories, "per-spot Spearman"), **ladders)


def prediction_figures(run, data_path, tmp_path):
    folds = open_answers(run, data_path, PredictionSettings(views="none", smoothing="1"))
    widths = dict.fromkeys(folds.extras, 1.)
    rungs = out_of_fold(folds, widths)
    return dict(maps=show_steps(folds, rungs, answer_test(folds, widths)), **show_costs(folds, rungs))


def check_figures(run, data_path, tmp_path):
    factory = DataFactory(data_path)
    sampler = PatchSampler(SlideCache(data_path), (dict.fromkeys(factory.names(), 50),), 32)
    dataset = HESpotDataset(factory.spots[factory.spots.split.eq("Train")].reset_index(drop=True), sampler)
    return dict(checks=show_checks(dict(file=[error("a"), note("b")], slides=[], training=[warning("c")]), dataset))


def comparison_figures(run, data_path, tmp_path):
    result = read_run(run.path)
    other = replace(result, name="another run with a long name", pred=result.pred + result.true)
    args = result.pred, result.true, [f"cell type {t} with a long name" for t in result.targets]
    return dict(comparison=show_comparison([result, other]), types=show_contributions({"run": contributions(*args)}),
        pairs=show_swaps({"run": swaps(*args)}))


@pytest.mark.parametrize("make", [prepared_figures, stain_figures, training_figures, prediction_figures, check_figures,
    comparison_figures], ids=lambda make: make.__name__.split("_")[0])
def test_figures_of_a_run_can_be_read(run, data_path, tmp_path, make):
    figures = make(run, data_path, tmp_path)
    found = {name: faults(fig) for name, fig in figures.items()}
    plt.close("all")
    assert not any(found.values()), found
    assert not any(unlabelled(fig) for fig in figures.values())


@pytest.fixture(scope="module")
def factory(demo_file): return DataFactory(demo_file)


def with_long_names(factory):
    "The same slides under names that people give."
    other, long = copy.copy(factory), lambda name: f"CytAssist FFPE human breast cancer, block {name}, section 2"
    other.slides = {long(name): replace(info, name=long(name)) for name, info in factory.slides.items()}
    other.spots = factory.spots.assign(slide=factory.spots.slide.map(long))
    return other


def test_long_names_fit(factory, monkeypatch):
    long = with_long_names(factory)
    small = lambda f, name, side, dots: Image.new("RGB", (side, side), "pink")
    monkeypatch.setattr("histokit.spots.maps.thumbnail", small)
    values = np.arange(len(long.spots), dtype=float)
    names = [f"macrophages and monocytes, activated, number {i}" for i in range(30)]
    figures = [show_slides(long), show_slides(long, None, values, "rank of macrophages in the spot"),
        show_maps(long, long.spots, {"truth": values, "+ smoothing over neighbours": values}, "rank in the spot"),
        show_targets(np.random.default_rng(0).lognormal(size=(50, 30)), names)]
    assert [faults(fig) for fig in figures] == [[]] * 4
    plt.close("all")


def test_what_is_not_known_is_said(factory):
    "The test slide is there, grey, and named so; a map of nothing but unknown values is drawn."
    train = factory.spots.split.eq("Train").to_numpy()
    values = np.where(train, 1. + np.arange(len(train)), np.nan)
    fig = show_slides(factory, None, values, "rank")
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert [("grey: not known" in t) for t in titles] == [s.split == "Test" for s in factory.slides.values()]
    unknown = factory.spots[~train].reset_index(drop=True)
    fig = show_maps(factory, unknown, {"truth": np.full(len(unknown), np.nan)}, "rank")
    assert fig.axes[0].get_xlabel() == "grey: not known" and faults(fig) == []
    plt.close("all")


@pytest.mark.parametrize("r,said,panels", [
    (Registration(confident=True), "nothing to correct", 2), (Registration.none(), "left as given (switched off)", 2),
    (Registration(.95, 3, 4, True), "scaled by 0.9500, then moved by 3.0 and 4.0 px", 3)])
def test_a_registration_says_what_it_did(r, said, panels):
    xy = np.random.default_rng(0).uniform(20, 180, (40, 2))
    fig = show_registration(np.full((200, 220, 3), 200, np.uint8), xy, r, "S_1")
    assert said in fig.get_suptitle() and len(fig.axes) == panels and faults(fig) == []
    plt.close("all")

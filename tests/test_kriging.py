"Kriging and the other heads on a frozen encoder, through the pipeline; and runs compared."
import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from histokit.cli import app
from histokit.core.files import read_json
from histokit.core.submission import check_submission, read_submission
from histokit.core.text import BadInput
from histokit.learn.scores import mean_spearman, spearman_columns, spearman_rows
from histokit.pipeline import run_pipeline
from histokit.spots.kriging import (KrigingData, KrigingSettings, appearances, choose_levels, fit_deviations,
    gaussian_kernel, keep_row_order, krige, krige_fold, kriging_data, place_features, similarity_features,
    slide_distance, slide_level)
from histokit.spots.slides import DataFactory

SMALL = ["backbone=test_resnet.r160_in1k", "weights=none", "input_px=32", "views=none"]
SCALES = ["patch_um=200", "context_um=400", "stages=-2,-1", "pca=64"]


def cli(*args): return CliRunner().invoke(app, [str(a) for a in args])


def run_quietly(recipe, parameters, run): return run_pipeline(recipe, parameters, run, show=lambda line: None)


def check_answers(run, demo_file):
    "The submission of a run is what the competition would take."
    factory = DataFactory(demo_file)
    rows = int(factory.spots.split.eq("Test").sum())
    check_submission(read_submission(run/"submission.csv"), rows, factory.targets)


@pytest.fixture(scope="module")
def best_run(tmp_path_factory, demo_file):
    return run_quietly("best", [f"data_path={demo_file}", *SMALL, *SCALES], tmp_path_factory.mktemp("best")/"run")


# ---- through the pipeline

def test_best_runs_to_a_submission(best_run, demo_file):
    check_answers(best_run, demo_file)
    names, spots = DataFactory(demo_file).targets, pd.read_parquet(best_run/"spots.parquet")
    answers, oof = np.load(best_run/"answers.npy"), pd.read_parquet(best_run/"oof.parquet")
    assert answers.shape == (1, len(spots), len(names)) and np.isfinite(answers).all()
    assert np.allclose(answers[0, spots.split.eq("Train")], oof[names])


def test_best_says_what_it_did(best_run):
    metrics = read_json(best_run/"metrics.json")
    assert {"random_split", "held_out"} <= set(metrics["random_split"])
    assert metrics["oof"][-1]["name"] == "+ smoothing"
    assert read_json(best_run/"folds"/"0"/"config.json")["extra"]["method"] == "kriging"


def test_a_folder_used_again_by_another_method_keeps_nothing_of_the_first(best_run, demo_file, tmp_path):
    run = shutil.copytree(best_run, tmp_path/"run")
    other = ["patch_um=200", "method=finetune", "epochs=1", "unfreeze=all", "context_um=", "stages="]
    run_quietly("best", [f"data_path={demo_file}", *SMALL, *other], run)
    names = DataFactory(demo_file).targets
    before, after = (read_submission(r/"submission.csv")[names].to_numpy() for r in (best_run, run))
    assert not np.allclose(before, after)
    assert read_json(run/"folds"/"0"/"config.json")["extra"]["method"] == "finetune"
    assert not (run/"answers.npy").exists() and (run/"folds"/"0"/"model.safetensors").exists()


def test_only_a_network_head_takes_neighbours(best_run, demo_file, tmp_path):
    run = shutil.copytree(best_run, tmp_path/"run")
    with pytest.raises(BadInput, match="neighbours=mean is for method=head; method=kriging"):
        run_quietly("best", [f"data_path={demo_file}", *SMALL, *SCALES, "neighbours=mean"], run)
    assert (run/"submission.csv").read_bytes() == (best_run/"submission.csv").read_bytes()


SLOW = [["method=head"], ["method=head", "neighbours=attention"]]


@pytest.mark.parametrize("how", [["method=pls"], *(pytest.param(how, marks=pytest.mark.slow) for how in SLOW)])
def test_other_heads(how, tmp_path, demo_file):
    parameters = [f"data_path={demo_file}", *SMALL, *how, "stain_method=none"]
    check_answers(run_quietly("probe", parameters, tmp_path/"run"), demo_file)


# ---- runs compared

def test_two_runs_compared(best_run, finished_run, tmp_path):
    done = cli("compare", finished_run, best_run, "--picture", tmp_path/"two.png", "--json")
    table = json.loads(done.stdout)
    assert done.exit_code == 0 and len(table) == 2 and (tmp_path/"two.png").stat().st_size > 1000
    second = table[1]
    assert second["diff_low"] <= second["difference"] <= second["diff_high"] and second["gap"] > 0


def test_two_runs_compared_in_words(best_run, finished_run, tmp_path):
    assert "difference to" in cli("compare", finished_run, best_run, "--picture", tmp_path/"three.png").stdout


def test_compare_refuses_what_is_no_run(finished_run, tmp_path):
    (tmp_path/"empty").mkdir()
    done = cli("compare", finished_run, tmp_path/"empty")
    assert done.exit_code == 1 and "holds no" in done.stderr and len(done.stderr.strip().splitlines()) == 1


# ---- on made-up spots

def field(slides=4, n=60, types=6, seed=0):
    "Slide, features, places and values of spots whose deviations follow the features."
    r = np.random.default_rng(seed)
    number = np.repeat(np.arange(slides), n)
    x, xy = r.normal(size=(len(number), 12)), r.uniform(-4, 4, (len(number), 2))
    log = x[:, :3] @ r.normal(size=(3, types)) + r.normal(size=(slides, types))[number]
    return np.array([f"S_{i}" for i in number]), x, xy, np.exp(log)


def fold(held="S_1", **kw):
    "Data, values, training rows, rows of the held-out slide and slides of made-up spots."
    slide, x, _, y = field(**kw)
    rows = np.arange(len(slide))
    return KrigingData([x], slide, slide_distance([x], slide)), y, rows[slide != held], rows[slide == held], slide


@pytest.mark.parametrize("order", [0., 1.])
def test_labels_of_the_slide_are_not_read(order):
    data, y, train, out, slide = fold()
    hidden = y.copy()
    hidden[out] = np.nan
    settings = KrigingSettings(order=order)
    one, two = (krige_fold(data, v, train, out, unit=slide, settings=settings).answer for v in (y, hidden))
    assert np.array_equal(one, two) and np.isfinite(two).all()


def test_maps_are_drawn_in_their_own_order_and_rows_stay():
    "Rows keep their order to the last place, and so their score; columns come nearer to the truth."
    data, y, train, out, slide = fold()
    settings = [KrigingSettings(order=o) for o in (0., 1.)]
    plain, drawn = (krige_fold(data, y, train, out, unit=slide, settings=s).answer for s in settings)
    assert np.array_equal(np.argsort(plain, 1), np.argsort(drawn, 1))
    assert np.array_equal(spearman_rows(plain, y[out]), spearman_rows(drawn, y[out]))
    assert spearman_columns(drawn, y[out]).mean() > spearman_columns(plain, y[out]).mean() + .05


def test_kept_rows_are_the_nearest():
    "No other table whose rows have that order comes nearer to what was wanted."
    r = np.random.default_rng(0)
    v, w = r.normal(size=(40, 6)), r.normal(size=(40, 6))
    kept, places = keep_row_order(v, w), v.argsort(1).argsort(1)
    assert np.array_equal(np.argsort(kept, 1), np.argsort(v, 1))
    off = ((kept - w) ** 2).sum(1)
    for _ in range(200):                                              # near the answer and far from it
        moved = kept + r.choice([.01, .3, 2.]) * r.normal(size=v.shape)
        other = np.take_along_axis(np.sort(moved, 1), places, 1)
        assert (((other - w) ** 2).sum(1) > off - 1e-4).all()


def test_a_patient_with_slides_follows_them():
    "The level of the own patient's slide is right, that of the other patient is far off."
    data, y, train, out, slide = fold(n=80)
    patient = np.where(np.isin(slide, ["S_0", "S_1"]), "A", "B")
    factor = np.exp(6 * np.random.default_rng(5).normal(size=(2, 6)))
    y = y * factor[(patient == "B").astype(int)]
    asked = [dataclasses.replace(data, patient_of=p) for p in (dict(zip(slide, patient)), None)]
    known, unknown = (krige_fold(d, y, train, out, unit=patient).answer for d in asked)
    assert mean_spearman(known, y[out]) > mean_spearman(unknown, y[out]) + .05


@pytest.mark.parametrize("kind", ["rank", "mean"])
def test_the_level_is_of_the_kind_that_carries_over(kind):
    "A type that fills one spot in ten is common by its mean, rare by its rank: the spots say which they have more of."
    slide, rows = np.repeat(["S_1", "S_2", "S_3"], 50), np.arange(150)
    y = np.exp(np.arange(5) + .1 * np.random.default_rng(0).normal(size=(150, 5)))
    if kind == "rank": y[::10, 0] = 1e6                               # the mean would put it first everywhere
    else:
        y[(slide == "S_1") & (rows % 10 == 0), 0] = 1e6               # on one slide it comes in bursts
        y[slide != "S_1", 0] = 1e5                                    # on the others it is everywhere
        y[:50, 1] *= .5
    names = ["S_1", "S_2", "S_3"]
    data = KrigingData([], slide, pd.DataFrame(np.zeros((3, 3)), names, names))
    settings = KrigingSettings(slide_length_scale=0.)
    assert choose_levels(data, y, rows, unit=slide, settings=settings)[0] == kind


def test_weights_of_slides_fall_by_the_length_scale():
    "One length scale further away is e times less; the nearest slide's distance does not matter."
    levels = pd.DataFrame(dict(a=[0., 1.]), ["S_1", "S_2"])
    for first in (0., 3.):
        distance = pd.DataFrame([[first, first + .5]], ["S_3"], levels.index)
        assert np.isclose(slide_level(levels, distance, "S_3", .5)[0], np.exp(-1) / (1 + np.exp(-1)))


def test_similarity_does_not_depend_on_how_slides_were_stained():
    r = np.random.default_rng(0)
    slide, place = np.repeat(["S_1", "S_2"], 40), r.uniform(0, 6, (80, 2))
    x = r.normal(size=(80, 12))
    tinted = np.where(slide[:, None] == "S_1", x, 3 * x + 5)
    seen = [appearances(np.split(v, 4, 1), 2, slide, place) for v in (x, tinted)]
    one, two = (similarity_features(v) for v in seen)
    assert len(seen[0]) == 2 + 2 + 2                                  # scales, stages, scales with the spots around
    assert np.allclose(one @ one.T, two @ two.T, atol=5e-3)


def test_gaussian_kernel():
    x = np.random.default_rng(0).normal(size=(80, 12))
    squares = ((x[:, None] - x) ** 2).sum(-1)
    assert np.allclose(gaussian_kernel(x, x, 2.), np.exp(squares / -8))


def test_inner_predictions_do_not_see_their_slide():
    "A slide's labels are moved among its spots, which leaves its mean as it is."
    data, y, train, out, slide = fold()
    changed, mine = y.copy(), slide == "S_2"
    changed[mine] = changed[mine][::-1]
    settings = KrigingSettings(penalties=(1.,))
    one, two = (krige(data, v, train, out, unit=slide, settings=settings).inner for v in (y, changed))
    assert np.allclose(one[mine[train]], two[mine[train]], atol=1e-8)
    assert not np.allclose(one[~mine[train]], two[~mine[train]])


def test_a_leak_is_an_error():
    data, y, _, _, slide = fold()
    rows = np.arange(len(slide))
    with pytest.raises(BadInput, match="leak"): krige(data, y, rows, rows[:3], unit=slide)
    settings = KrigingSettings(within_slides=True)
    assert np.isfinite(krige(data, y, rows[3:], rows[:3], unit=slide, settings=settings).answer).all()


def test_places_of_two_blocks_do_not_compare():
    _, _, xy, _ = field()
    tissue = np.repeat(["A", "B"], len(xy) // 2)
    near = place_features(xy, tissue)
    assert np.abs(near[tissue == "A"] @ near[tissue == "B"].T).max() == 0
    assert np.allclose((near @ near.T).diagonal(), 1, atol=.1)


@pytest.mark.parametrize("patients, alike", [("AABB", False), ("ABCD", True)])
def test_places_compare_within_a_patient_or_everywhere(patients, alike):
    "Where no patient has two slides, a place on one slide is near the same place on all."
    slide, x, xy, _ = field(n=20)
    spots = pd.DataFrame(xy, columns=["x", "y"]).assign(slide=slide, patient=np.repeat(list(patients), 20))
    settings = KrigingSettings(place_weights=(0., 1.))
    data = kriging_data([x], 1, spots, np.ones(80), settings)
    without, beside = data.candidates
    near = beside[:, without.shape[1]:]
    assert (np.abs(near[:40] @ near[40:].T).max() > 0) == alike
    assert data.patient_of == dict(zip(sorted(set(slide)), patients))


def test_one_unit_cannot_choose():
    slide, x, _, y = field(slides=1)
    with pytest.raises(BadInput, match="one unit"): fit_deviations([x], y - y.mean(0), slide, slide, [x])


@pytest.mark.parametrize("settings, message", [
    (dict(slide_length_scale=-1.), "slide_length_scale"), (dict(order=1.5), "order"), (dict(landmarks=0), "landmarks"),
    (dict(width=0.), "width"), (dict(pca=-1), "pca"), (dict(penalties=(0.,)), "penalties"),
    (dict(place_widths=()), "place_widths"), (dict(place_weights=(-.1,)), "place_weights")])
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(BadInput, match=message): KrigingSettings(**settings)

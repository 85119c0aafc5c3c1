"Kriging and the other heads on a frozen encoder, through the pipeline; and runs compared."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from histokit.core.text import BadInput
from histokit.core.files import read_json
from histokit.spots.slides import DataFactory
from histokit.spots.kriging import alike_features, choose_levels, fit_field, gaussian, keep_rows, krige, krige_fold, place_features, respects, slide_distance
from histokit.learn.scores import mean_spearman, spearman_columns, spearman_rows
from histokit.cli import app
from histokit.pipeline import run_pipeline
from histokit.core.submission import check_submission, read_submission

SMALL = ["backbone=test_resnet.r160_in1k", "weights=none", "input_px=32", "views=none"]


def cli(*args): return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def best_run(tmp_path_factory, demo_file):
    return run_pipeline("best", [f"data_path={demo_file}", *SMALL, "patch_um=200", "context_um=400", "stages=-2,-1", "pca=64"], tmp_path_factory.mktemp("best")/"run", show=lambda line: None)


def field(slides=4, n=60, types=6, seed=0):
    "Slide, features, places and values of spots whose deviations follow the features."
    r = np.random.default_rng(seed)
    slide = np.repeat([f"S_{i}" for i in range(slides)], n); x = r.normal(size=(len(slide), 12)); xy = r.uniform(-4, 4, (len(slide), 2))
    return slide, x, xy, np.exp(x[:, :3] @ r.normal(size=(3, types)) + r.normal(size=(slides, types))[np.repeat(np.arange(slides), n)])


def test_best_runs_to_a_submission(best_run, demo_file):
    factory = DataFactory(demo_file); spots = pd.read_parquet(best_run/"spots.parquet")
    check_submission(read_submission(best_run/"submission.csv"), int(factory.spots.split.eq("Test").sum()), factory.targets)
    answers = np.load(best_run/"answers.npy"); oof = pd.read_parquet(best_run/"oof.parquet")
    assert answers.shape == (1, len(spots), len(factory.targets)) and np.isfinite(answers).all()
    assert np.allclose(answers[0, spots.split.eq("Train")], oof[factory.targets])
    said = read_json(best_run/"metrics.json")
    assert {"random_split", "held_out"} <= set(said["random_split"]) and said["oof"][-1]["name"] == "+ smoothing"
    assert read_json(best_run/"folds"/"0"/"config.json")["extra"]["method"] == "kriging"


def test_a_folder_used_again_by_another_method_keeps_nothing_of_the_first(best_run, demo_file, tmp_path):
    run = shutil.copytree(best_run, tmp_path/"run")
    run_pipeline("best", [f"data_path={demo_file}", *SMALL, "patch_um=200", "method=finetune", "epochs=1", "unfreeze=all", "context_um=", "stages="], run, show=lambda line: None)
    names = DataFactory(demo_file).targets
    before, after = (read_submission(r/"submission.csv")[names].to_numpy() for r in (best_run, run))
    assert read_json(run/"folds"/"0"/"config.json")["extra"]["method"] == "finetune" and not np.allclose(before, after)
    assert not (run/"answers.npy").exists() and (run/"folds"/"0"/"model.safetensors").exists()


def test_two_runs_compared(best_run, finished_run, tmp_path):
    done = cli("compare", finished_run, best_run, "--picture", tmp_path/"two.png", "--json")
    table = json.loads(done.stdout)
    assert done.exit_code == 0 and len(table) == 2 and (tmp_path/"two.png").stat().st_size > 1000
    assert table[1]["diff_low"] <= table[1]["difference"] <= table[1]["diff_high"] and table[1]["gap"] > 0
    assert "difference to" in cli("compare", finished_run, best_run, "--picture", tmp_path/"three.png").stdout


def test_compare_refuses_what_is_no_run(finished_run, tmp_path):
    (tmp_path/"empty").mkdir()
    done = cli("compare", finished_run, tmp_path/"empty")
    assert done.exit_code == 1 and "holds no" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("order", [0., 1.])
def test_labels_of_the_slide_are_not_read(order):
    slide, x, _, y = field(); rows = np.arange(len(slide)); a, c = rows[slide != "S_1"], rows[slide == "S_1"]
    apart = slide_distance([x], slide)
    hidden = y.copy(); hidden[c] = np.nan
    one, two = (krige_fold(x, v, slide, a, c, slide, apart, order=order) for v in (y, hidden))
    assert np.array_equal(one["answer"], two["answer"]) and np.isfinite(two["answer"]).all()


def test_maps_are_drawn_in_their_own_order_and_rows_stay():
    slide, x, _, y = field(); rows = np.arange(len(slide)); a, c = rows[slide != "S_1"], rows[slide == "S_1"]; apart = slide_distance([x], slide)
    plain, drawn = (krige_fold(x, y, slide, a, c, slide, apart, order=o)["answer"] for o in (0., 1.))
    assert np.array_equal(np.argsort(plain, 1), np.argsort(drawn, 1))
    assert np.array_equal(spearman_rows(plain, y[c]), spearman_rows(drawn, y[c])) and spearman_columns(drawn, y[c]).mean() > spearman_columns(plain, y[c]).mean() + .05


def test_kept_rows_are_the_nearest():
    "No other table whose rows have that order comes nearer to what was wanted."
    r = np.random.default_rng(0); v, w = r.normal(size=(40, 6)), r.normal(size=(40, 6)); kept = keep_rows(v, w)
    assert np.array_equal(np.argsort(kept, 1), np.argsort(v, 1))
    off = ((kept - w) ** 2).sum(1)
    for _ in range(200):                                               # rows of the same order, near the answer and far from it
        other = np.take_along_axis(np.sort(kept + r.choice([.01, .3, 2.]) * r.normal(size=v.shape), 1), v.argsort(1).argsort(1), 1)
        assert (((other - w) ** 2).sum(1) > off - 1e-4).all()


def test_a_patient_with_slides_is_told_from_them():
    "The level of the own patient's slide is right, that of the other patient is far off."
    slide, x, _, y = field(n=80); patient = np.where(np.isin(slide, ["S_0", "S_1"]), "A", "B"); rows = np.arange(len(slide))
    y = y * np.exp(6 * np.random.default_rng(5).normal(size=(2, 6)))[(patient == "B").astype(int)]
    kin, a, c = dict(zip(slide, patient)), rows[slide != "S_1"], rows[slide == "S_1"]; apart = slide_distance([x], slide)
    known, unknown = (mean_spearman(krige_fold(x, y, slide, a, c, patient, apart, kin=k)["answer"], y[c]) for k in (kin, None))
    assert known > unknown + .05


@pytest.mark.parametrize("kind", ["rank", "mean"])
def test_the_level_is_of_the_kind_that_carries_over(kind):
    "A type that fills one spot in ten on each slide is common by its mean, rare by its rank: the spots say which they have more of."
    r = np.random.default_rng(0); slide = np.repeat(["S_1", "S_2", "S_3"], 50); y = np.exp(np.arange(5) + .1 * r.normal(size=(150, 5)))
    if kind == "rank": y[::10, 0] = 1e6                                # the mean would put it first everywhere
    else:                                                              # on one slide it is a burst, on the others everywhere
        y[(slide == "S_1") & (np.arange(150) % 10 == 0), 0] = 1e6; y[slide != "S_1", 0] = 1e5
        y[:50][:, 1] *= .5
    apart = pd.DataFrame(np.zeros((3, 3)), ["S_1", "S_2", "S_3"], ["S_1", "S_2", "S_3"])
    assert choose_levels(y, slide, slide, apart, 0.)[0] == kind


def test_likeness_does_not_depend_on_how_slides_were_stained():
    r = np.random.default_rng(0); slide = np.repeat(["S_1", "S_2"], 40); place = r.uniform(0, 6, (80, 2)); x = r.normal(size=(80, 12))
    tinted = x * np.where(slide == "S_1", 1, 3)[:, None] + np.where(slide == "S_1", 0, 5)[:, None]
    one, two = (alike_features(respects(np.split(v, 4, 1), 2, slide, place)) for v in (x, tinted))
    assert np.allclose(one @ one.T, two @ two.T, atol=5e-3) and len(respects(np.split(x, 4, 1), 2, slide, place)) == 2 + 2 + 2
    assert np.allclose(gaussian(x, x, 2.), np.exp(-((x[:, None] - x) ** 2).sum(-1) / 8))


def test_inner_predictions_do_not_see_their_slide():
    slide, x, _, y = field(); rows = np.arange(len(slide)); a, c = rows[slide != "S_1"], rows[slide == "S_1"]
    apart, changed = slide_distance([x], slide), y.copy(); mine = slide == "S_2"
    before = krige(x, y, slide, a, c, slide, apart, penalties=(1.,))["inner"][slide[a] == "S_2"]
    changed[mine] = changed[mine][::-1]                                # the slide's mean stays, its spots' labels move
    z = lambda v: krige(x, v, slide, a, c, slide, apart, penalties=(1.,))["inner"][slide[a] == "S_2"]
    assert np.allclose(before, z(changed), atol=1e-8)


def test_a_leak_is_an_error():
    slide, x, _, y = field(); rows = np.arange(len(slide)); apart = slide_distance([x], slide)
    with pytest.raises(BadInput, match="leak"): krige(x, y, slide, rows, rows[:3], slide, apart)
    assert np.isfinite(krige(x, y, slide, rows[3:], rows[:3], slide, apart, within=True)["answer"]).all()


def test_places_of_two_blocks_do_not_compare():
    _, _, xy, _ = field(); tissue = np.repeat(["A", "B"], len(xy) // 2); near = place_features(xy, tissue)
    assert np.abs(near[tissue == "A"] @ near[tissue == "B"].T).max() == 0
    assert np.allclose((near @ near.T).diagonal(), 1, atol=.1)


def test_only_a_network_head_looks_around(best_run, demo_file, tmp_path):
    run = shutil.copytree(best_run, tmp_path/"run")
    with pytest.raises(BadInput, match="neighbours=mean is for method=head; method=kriging"):
        run_pipeline("best", [f"data_path={demo_file}", *SMALL, "patch_um=200", "context_um=400", "stages=-2,-1", "pca=64", "neighbours=mean"], run, show=lambda line: None)
    assert (run/"submission.csv").read_bytes() == (best_run/"submission.csv").read_bytes()


def test_one_unit_cannot_choose():
    slide, x, _, y = field(slides=1)
    with pytest.raises(BadInput, match="one unit"): fit_field(x, y - y.mean(0), slide, slide, x)


@pytest.mark.parametrize("how", [["method=pls"], pytest.param(["method=head"], marks=pytest.mark.slow), pytest.param(["method=head", "neighbours=attention"], marks=pytest.mark.slow)])
def test_other_heads(how, tmp_path, demo_file):
    run = run_pipeline("probe", [f"data_path={demo_file}", *SMALL, *how, "stain_method=none"], tmp_path/"run", show=lambda line: None)
    factory = DataFactory(demo_file)
    check_submission(read_submission(run/"submission.csv"), int(factory.spots.split.eq("Test").sum()), factory.targets)

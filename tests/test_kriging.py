"Kriging and the other heads on a frozen encoder, through the pipeline; and runs compared."
import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from histokit.core import BadInput, read_json
from histokit.data import DataFactory
from histokit.kriging import fit_field, krige, krige_fold, place_features, slide_distance
from histokit.pipeline import app, run_pipeline
from histokit.tta_smoothing import check_submission, read_submission

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


def test_one_unit_cannot_choose():
    slide, x, _, y = field(slides=1)
    with pytest.raises(BadInput, match="one unit"): fit_field(x, y - y.mean(0), slide, slide, x)


@pytest.mark.parametrize("method", ["pls", pytest.param("head", marks=pytest.mark.slow)])
def test_other_heads(method, tmp_path, demo_file):
    run = run_pipeline("probe", [f"data_path={demo_file}", *SMALL, f"method={method}", "stain_method=none"], tmp_path/"run", show=lambda line: None)
    factory = DataFactory(demo_file)
    check_submission(read_submission(run/"submission.csv"), int(factory.spots.split.eq("Test").sum()), factory.targets)

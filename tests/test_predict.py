"A trained run answers slides: its own to the submission's numbers, others by themselves, and says how sure it is."
import importlib.util
import json
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pandas as pd
import pytest

from histokit.core.runs import RunFolder
from histokit.core.submission import read_submission
from histokit.core.text import BadInput
from histokit.spots.answers import run_prediction
from histokit.spots.cache import SlideCache
from histokit.spots.crossval import run_training
from histokit.spots.familiar import FeatureReference, Limits, familiar, spot_distance
from histokit.spots.kept_run import KEPT_FOLDER, KEPT_VERSION, KeptRun
from histokit.spots.lattice import measure_lattice
from histokit.spots.layout import read_slide
from histokit.spots.patches import HESpotDataset, normalised_coords
from histokit.spots.predictor import Predictor, predict_run, run_test_slides
from histokit.spots.settings import PredictionSettings, TrainingSettings
from histokit.spots.slide_heads import slide_neighbours
from histokit.spots.slides import DataFactory
from histokit.tissue.measure import measure_stain

NETWORK = dict(backbone="test_resnet.r160_in1k", weights="none", head="linear")
SMALL = dict(input_px=32, compare_random=False, views="mirror", device="cpu")
METHODS = dict(
    finetune=dict(method="finetune", epochs=1, target="log", standardise=True),
    place=dict(method="finetune", epochs=1, target="clr"),
    ridge=dict(method="ridge", target="rank", pca=16),
    stages=dict(method="ridge", target="rank", pca=16, stages="-2,-1"),
    pls=dict(method="pls", target="log", patch_px=40),
    kernel=dict(method="kernel", target="rank"),
    boost=dict(method="boost", target="rank", standardise=True),
    head=dict(method="head", target="rank"),
    neighbours=dict(method="head", target="rank", neighbours="attention", views="flips"),
    kriging=dict(method="kriging", context_um="400", stages="-2,-1", pca=32))
NETWORKS = dict(place=dict(fusion="product", head="mlp", hidden="16"))


def train(folder, method, data, views="mirror", **more):
    "A run folder with prepared slides, trained and predicted, which needs no other file."
    run = RunFolder(folder).make()
    shutil.copyfile(data, run/"slides.h5")
    settings = TrainingSettings(**SMALL | METHODS[method] | more)
    network = NETWORK | NETWORKS.get(method, {}) | dict(scales=len(settings.sizes_um))
    run_training(run, "", settings, network, say=lambda line: None)
    run_prediction(run, "", PredictionSettings(views=views, smoothing="1", device="cpu"))
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo_file):
    "Method -> run folder, trained when it is first asked for."
    made = {}

    def of(method):
        if method == "boost" and not importlib.util.find_spec("lightgbm"): pytest.skip("LightGBM is not installed")
        if method not in made: made[method] = train(tmp_path_factory.mktemp(method)/"run", method, demo_file)
        return made[method]
    return of


@pytest.fixture
def copied(runs, tmp_path):
    "A copy of a run, to be spoilt."
    return lambda method: RunFolder(shutil.copytree(runs(method).path, tmp_path/"copy"))


def submitted(run):
    table = read_submission(run/"submission.csv").sort_values("ID")
    return table.drop(columns="ID").to_numpy()


def alone(run, name="somebody's slide", patient=None):
    "The test slide given as a picture and places on it, under another name."
    predictor = Predictor.load(run, device="cpu")
    path, spots = run_test_slides(run)
    pixels, scale = SlideCache(path)[spots.slide[0]], DataFactory(path).slides[spots.slide[0]].um_per_px
    mine = spots[["x", "y"]].assign(slide=name, **({} if patient is None else dict(patient=patient)))
    dataset = HESpotDataset(mine, predictor.sampler({name: pixels}, scale))
    return predictor, mine, dataset


# ---- the run's own slides

SLOW = dict(boost=pytest.mark.slow, head=pytest.mark.slow)       # trees; a network whose like is neighbours


@pytest.mark.parametrize("method", [pytest.param(m, marks=SLOW.get(m, ())) for m in METHODS])
def test_the_submission_again_from_the_folder_alone(runs, tmp_path, method):
    moved = shutil.copytree(runs(method).path, tmp_path/"elsewhere")
    (moved/"answers.npy").unlink(missing_ok=True)                  # what was answered then is not read
    again = predict_run(moved, device="cpu")
    assert again.ID.tolist() == list(range(len(again)))
    np.testing.assert_allclose(again.to_numpy()[:, 1:], submitted(runs(method)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["ridge", "place", "kriging", "neighbours"])
def test_a_picture_alone_is_answered_as_in_the_pipeline(runs, method):
    predictor, mine, dataset = alone(runs(method))
    answer = predictor.answer(mine, predictor.encode(dataset), size=(10**6, 10**6))
    np.testing.assert_allclose(answer.values, submitted(runs(method)), rtol=1e-4, atol=1e-7)


def test_a_finished_pipeline_is_predicted_again(finished_run):
    again, before = predict_run(finished_run, device="cpu"), submitted(RunFolder(finished_run))
    np.testing.assert_allclose(again.to_numpy()[:, 1:], before, rtol=1e-4)
    predictor = Predictor.load(finished_run, device="cpu")
    assert predictor.stain["method"] == "macenko" and predictor.lattice == "hex"
    assert abs(predictor.pitch_um - 100) < 1 and predictor.sizes_um == [200.] and len(predictor.cell_types)
    assert set(predictor.familiarity.stains) == set(predictor.slides) == set(predictor.familiarity.um_per_px)


def two_test_slides(source, path):
    "A copy of the demo with a second test slide, brighter and turned."
    shutil.copyfile(source, path)
    with h5py.File(path, "r+") as h5:
        pixels, spots = read_slide(h5["images/Test/S_4"]), h5["spots/Test/S_4"]
        h5["images/Test"].create_dataset("S_5", data=255 - (255 - pixels[::-1, ::-1]) // 2)
        h5["images/Test/S_5"].attrs.update(h5["images/Test/S_4"].attrs)
        turned = spots[:]
        for axis, side in (("x", pixels.shape[1]), ("y", pixels.shape[0])): turned[axis] = side - 1 - turned[axis]
        h5["spots/Test"].create_dataset("S_5", data=turned)
        h5["spots/Test/S_5"].attrs.update(spots.attrs)
    return path


@pytest.mark.parametrize("method", ["kriging", pytest.param("neighbours", marks=pytest.mark.slow)])
def test_no_slide_depends_on_another(runs, tmp_path, demo_file, method):
    both = train(tmp_path/"both", method, two_test_slides(demo_file, tmp_path/"two.h5"))
    one, two = submitted(runs(method)), submitted(both)
    assert len(two) == 2 * len(one) and one.max() < 1e6               # amounts, not ranks taken for logarithms
    np.testing.assert_allclose(two[:len(one)], one, rtol=1e-6)
    assert not np.allclose(two[len(one):], one, rtol=1e-2)
    np.testing.assert_allclose(predict_run(both, device="cpu").to_numpy()[:, 1:], two, rtol=1e-4)


# ---- any slide

@pytest.mark.parametrize("method", ["place", "stages", "kriging"])
def test_spots_cut_into_chunks_give_the_same(runs, method):
    predictor, mine, dataset = alone(runs(method))
    whole, sampler = predictor.encode(dataset), dataset.sampler
    assert whole.dtype == np.float32 and whole.shape[1] == len(mine)
    order = np.random.default_rng(0).permutation(len(mine))
    chunks = [order[:1], order[1:34], order[34:]]
    one = lambda rows: HESpotDataset(mine.iloc[rows], sampler, coords=dataset.coords.numpy()[rows])
    parts = np.concatenate([predictor.encode(one(rows)) for rows in chunks], 1)
    np.testing.assert_allclose(parts, whole[:, order], rtol=0, atol=1e-6)


def test_folds_and_views_are_kept_apart_in_the_spread(runs):
    predictor, mine, dataset = alone(runs("finetune"))
    answer = predictor.answer(mine, predictor.encode(dataset))
    assert answer.steps["folds"] == 3 and answer.steps["views"] == ["identity", "mirror"]
    assert answer.spread.shape == answer.values.shape and (answer.spread > 0).all()
    predictor, mine, dataset = alone(runs("kriging"))
    assert np.isnan(predictor.answer(mine, predictor.encode(dataset)).spread).all()       # one answer has no spread


def test_other_views_are_used_when_asked_for(runs):
    predictor = Predictor.load(runs("ridge"), views="dihedral", device="cpu")
    _, mine, dataset = alone(runs("ridge"))
    encoded = predictor.encode(dataset)
    assert len(encoded) == 8 and len(np.unique(encoded[:, 0, 0])) > 1
    with pytest.raises(BadInput, match="views"): Predictor.load(runs("ridge"), views="dihedrals", device="cpu")


def test_a_known_patient_is_answered_from_that_patient(runs):
    answers = []
    for patient in (None, "S_1"):
        predictor, mine, dataset = alone(runs("kriging"), patient=patient)
        answers.append(predictor.answer(mine, predictor.encode(dataset)).natural)
    assert np.abs(answers[0] - answers[1]).max() > .1


def test_a_new_slide_may_have_the_name_of_a_training_slide(runs):
    answers = []
    for name in ("new", "S_1"):
        predictor, mine, dataset = alone(runs("kriging"), name=name)
        answers.append(predictor.answer(mine, predictor.encode(dataset)).values)
    np.testing.assert_allclose(*answers, rtol=1e-5)


@pytest.mark.parametrize("method", ["ridge", "neighbours", "kriging"])
def test_a_finer_lattice_gives_the_map_of_the_trained_one(runs, method):
    predictor, mine, dataset = alone(runs(method))
    coarse = predictor.answer(mine, predictor.encode(dataset))
    pitch = measure_lattice(mine[["x", "y"]].to_numpy())[0]
    steps = pitch / 2 * np.array([[0, 0], [1, 0], [.5, .866], [-.5, .866]])
    fine = np.concatenate([mine[["x", "y"]].to_numpy() + step for step in steps])
    fine = pd.DataFrame(fine, columns=["x", "y"]).assign(slide="somebody's slide")
    encoded = predictor.encode(HESpotDataset(fine, dataset.sampler))
    answer = predictor.answer(fine, encoded, pitch_px=pitch)
    there = answer.natural[:len(mine)]                                # at the places of the coarse lattice
    moved, differ = np.abs(there - coarse.natural).mean(), coarse.natural.std(0).mean()
    assert moved < .5 * differ, (moved, differ)


def test_neighbours_on_a_finer_lattice_lie_a_pitch_away():
    r, c = np.divmod(np.arange(30 * 30), 30)
    fine = np.column_stack([(c + r % 2 / 2) * 20, r * 20 * .866])
    inner = 15 * 30 + 15
    table = slide_neighbours(fine, 60., "hex")
    steps = np.hypot(*(fine[table.index[inner]] - fine[inner]).T)
    assert table.mask[inner].all() and np.allclose(steps, 60, rtol=.01)
    assert np.allclose(np.hypot(*table.offset[inner].T), 1, rtol=.01)
    own = slide_neighbours(fine, None, "hex")
    assert np.allclose(np.hypot(*(fine[own.index[inner]] - fine[inner]).T), 20, rtol=.01)


BAD_SPOTS = {
    "two slides": (lambda s: s.assign(slide=["a", "b"] * (len(s) // 2) + ["a"] * (len(s) % 2)), "one slide at a time"),
    "other spots": (lambda s: s.iloc[1:], "encode these spots"),
    "nowhere": (lambda s: s.assign(x=np.nan), "not finite"),
    "outside": (lambda s: s.assign(x=s.x + 1e5), "outside the .* picture")}


@pytest.mark.parametrize("what", BAD_SPOTS)
def test_spots_that_cannot_be_answered(runs, what):
    predictor, mine, dataset = alone(runs("ridge"))
    change, says = BAD_SPOTS[what]
    with pytest.raises(BadInput, match=says):
        predictor.answer(change(mine), predictor.encode(dataset), size=(5000, 5000))


# ---- folders that are not whole

def one_line(run, says):
    with pytest.raises(BadInput, match=says) as e: predict_run(run, device="cpu")
    assert "\n" not in str(e.value)


def test_a_folder_without_models(tmp_path, runs, copied):
    one_line(tmp_path, "holds no models")
    one_line(tmp_path/"nowhere", "is no folder")
    run = copied("finetune")
    shutil.rmtree(run/KEPT_FOLDER)
    one_line(run, "before runs kept what new slides need")


def test_a_folder_of_a_later_version(copied):
    run = copied("ridge")
    kept = run.json(f"{KEPT_FOLDER}/kept.json")
    run.write_json(f"{KEPT_FOLDER}/kept.json", kept | dict(version=KEPT_VERSION + 1, histokit="9.0"))
    one_line(run, "histokit 9.0 and is of version .*install a newer histokit")


@pytest.mark.parametrize("method", ["finetune", "kriging"])
def test_every_kept_file_is_watched(copied, method):
    run = copied(method)
    for name in KeptRun.read(run).files:
        before = (run/name).read_bytes()
        (run/name).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))          # one bit, as a bad disk does it
        one_line(run, f"{name.rpartition('/')[2]} is damaged")
        (run/name).unlink()
        one_line(run, f"{name.rpartition('/')[2]} is missing")
        (run/name).write_bytes(before)
    predict_run(run, device="cpu")


SPOILT = {
    "no prediction": (lambda run: (run/"prediction.json").unlink(), "prediction.json.*04_tta_smoothing"),
    "half a description": (lambda run: (run/KEPT_FOLDER/"kept.json").write_text('{"version": 1}'), "is damaged"),
    "no JSON": (lambda run: (run/KEPT_FOLDER/"kept.json").write_text("{"), "not readable JSON"),
    "other targets": (lambda run: run.write_json("prediction.json", run.json("prediction.json") | dict(targets=["C1"])),
        "other targets"),
    "no slides": (lambda run: (run/"slides.h5").unlink(), "no slides.h5")}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_folder(copied, what):
    run, (spoil, says) = copied("ridge"), SPOILT[what]
    spoil(run)
    one_line(run, says)


def test_a_training_that_is_begun_again_leaves_nothing_of_the_last(copied, demo_file):
    run = copied("kriging")
    settings = TrainingSettings(**SMALL | METHODS["ridge"])
    run_training(run, "", settings, NETWORK, say=lambda line: None)
    assert not (run/KEPT_FOLDER/"head"/"training.parquet").exists()
    assert KeptRun.read(run).method == "ridge"


# ---- how sure

@pytest.fixture(scope="module")
def shown(runs):
    "The run's own test slide, and its negative."
    predictor, mine, dataset = alone(runs("ridge"))
    pixels = dataset.slides["somebody's slide"]
    negative = predictor.sampler({"somebody's slide": 255 - pixels}, predictor.um_per_px)
    strange = HESpotDataset(mine, negative, coords=normalised_coords(mine))
    answers = [predictor.answer(mine, predictor.encode(d)) for d in (dataset, strange)]
    return predictor, pixels, answers


def test_what_is_unlike_the_training_slides_is_outside(shown):
    predictor, _, (like, unlike) = shown
    found, strange = (familiar(predictor, a, None, predictor.um_per_px) for a in (like, unlike))
    assert strange["verdict"] == "outside" and strange["features"]["verdict"] == "outside"
    assert "outside" in strange["reasons"][0] and strange["features"]["share_beyond"] > .9
    assert found["features"]["distance"] < found["features"]["far"] < strange["features"]["distance"]
    assert np.median(spot_distance(predictor, unlike)) > np.median(spot_distance(predictor, like))
    json.dumps([found, strange], allow_nan=False)


def test_scale_and_stain_have_their_say(shown):
    predictor, pixels, (like, _) = shown
    um = predictor.um_per_px
    verdicts = [familiar(predictor, like, None, um * times)["um_per_px"]["verdict"] for times in (1, 1.2, 1.8, 4, .2)]
    assert verdicts == ["inside", "inside", "at the edge", "outside", "outside"]
    measured = {name: measure_stain(pixels) for name in predictor.slides}
    known = replace(predictor.familiarity, stains=measured)
    predictor.familiarity, before = known, predictor.familiarity
    try:
        same, blank = (familiar(predictor, like, m, um)["stain"] for m in (measured["S_1"], measure_stain(pixels * 0)))
        stained = measure_stain(np.minimum(pixels, [255, 120, 120]).astype(np.uint8))
        red = familiar(predictor, like, stained, um)["stain"]
        predictor.familiarity = replace(known, normalised=True)
        mended = familiar(predictor, like, stained, um)
    finally: predictor.familiarity = before
    assert same["verdict"] == "inside" and blank["verdict"] == "outside" and red["verdict"] == "outside"
    assert mended["stain"]["verdict"] in ("at the edge", "outside")
    json.dumps([same, blank, red, mended], allow_nan=False)


def test_limits_come_from_slides_that_were_left_out():
    rng = np.random.default_rng(1)
    unit = np.repeat([f"S_{i}" for i in range(8)], 150)
    looks = rng.normal(size=(1200, 40)) + rng.normal(0, .7, (8, 40))[np.repeat(range(8), 150)]
    reference = FeatureReference.fit(looks, unit)
    limits = Limits.of(reference.left_out(looks, unit).values())
    verdicts = []
    for seed in range(40):
        new = np.random.default_rng(100 + seed)
        slide = new.normal(size=(150, 40)) + new.normal(0, .7, 40)
        verdicts.append(limits.verdict(np.median(reference.distance(reference.project(slide)))))
    assert verdicts.count("inside") >= 24 and verdicts.count("outside") <= 4

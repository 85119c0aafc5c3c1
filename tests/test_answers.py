"From fold models to an answer: finishing, smoothing, a budget of time, ensembles, and submissions that are broken."
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, rankdata, spearmanr
from typer.testing import CliRunner

import histokit.cli_ensemble  # noqa: F401 (registers its command)
from histokit.cli import app
from histokit.core.checks import has_error
from histokit.core.runs import RunFolder
from histokit.core.submission import read_submission, write_submission
from histokit.core.text import BadInput
from histokit.learn.scores import mean_spearman, row_ranks
from histokit.spots import answers as answers_page
from histokit.spots.answers import FoldAnswers, fit_budget
from histokit.spots.check_predictions import check_submission_file
from histokit.spots.colocalisation import ShiftedMaps, discoveries
from histokit.spots.demo import demo_paths
from histokit.spots.ensemble import choose_combination, combine, rank_weights, write_ensemble
from histokit.spots.finish import AGGREGATES, Finish, PredictionPlan, Smoothing, aggregate_answers, answer_spread
from histokit.spots.lattice import local_mean, measure_lattice, smooth
from histokit.spots.predict import choose_smoothing
from histokit.spots.results import open_stage
from histokit.spots.settings import PredictionSettings
from histokit.spots.slides import DataFactory
from histokit.spots.targets import TargetTransform
from histokit.spots.uncertainty import spread_worth

RNG = np.random.default_rng(0)


def lattice(kind, rows=14, columns=15, pitch=40.):
    r, c = np.divmod(np.arange(rows * columns), columns)
    if kind == "square": return np.column_stack([c, r]) * pitch
    return np.column_stack([c + r % 2 / 2, r * np.sqrt(3) / 2]) * pitch


def table(xy, slide="A"): return pd.DataFrame(dict(slide=slide, x=xy[:, 0], y=xy[:, 1]))


# --- finishing ---------------------------------------------------------------------------------

@pytest.mark.parametrize("how", AGGREGATES)
def test_answers_become_one_as_written_out(how):
    members = RNG.normal(size=(3, 4, 20, 7))
    every = members.reshape(12, 20, 7)
    if how == "mean": wanted = every.mean(0)
    elif how == "median": wanted = np.median(every, 0)
    else:
        order = np.mean([[rankdata(row) for row in m] for m in every], 0)
        amounts = np.sort(every.mean(0), 1)
        wanted = np.stack([a[rankdata(o, "ordinal") - 1] for a, o in zip(amounts, order)])
    np.testing.assert_allclose(aggregate_answers(members, how), wanted, atol=1e-12)
    np.testing.assert_allclose(answer_spread(members), every.std(0, ddof=1))


def test_one_exaggerating_fold_moves_the_mean_alone():
    quiet = RNG.normal(size=(5, 1, 30, 7))
    loud = np.concatenate([quiet[:4], quiet[4:] * 50])
    moved = {how: spearmanr(aggregate_answers(quiet, how).ravel(), aggregate_answers(loud, how).ravel())[0]
        for how in AGGREGATES}
    assert moved["mean"] < .8 < min(moved["median"], moved["rank-mean"])


@pytest.mark.parametrize("finish", [Finish(), Finish("median", True, Smoothing((1.,), .2, True)),
    Finish("rank-mean", False, Smoothing((0., .5, 1.)), .5, (1., 2., 3.))])
def test_a_plan_comes_back_from_its_file(finish, tmp_path):
    run, spots = RunFolder(tmp_path), table(lattice("hex", 4, 5))
    PredictionPlan(("identity",), ("a", "b", "c"), finish).write(run)
    members = RNG.normal(size=(2, 3, 20, 3))
    read = PredictionPlan.read(run)
    assert read.finish == finish and read.views == ("identity",)
    np.testing.assert_array_equal(read.finish(members, spots), finish(members, spots))


@pytest.mark.parametrize("text, says", [("{}", "damaged"), ("[]", "damaged"),
    ('{"version": 9}', "install a newer"),
    ('{"version": 1, "views": [], "targets": [], "finish": {"smoothing": 3}}', "damaged"), ("{", "not readable JSON")])
def test_a_plan_that_cannot_be_read_is_refused(text, says, tmp_path):
    (tmp_path/"prediction.json").write_text(text)
    with pytest.raises(BadInput, match=says): PredictionPlan.read(RunFolder(tmp_path))


def test_the_kept_plan_gives_the_submission_again(finished_run):
    run = RunFolder(finished_run)
    factory, spots = open_stage(run)
    folds, plan = FoldAnswers(run, factory, spots, PredictionSettings(views="none")), PredictionPlan.read(run)
    members = np.stack([folds.of(k, folds.is_test) for k in folds.extras])
    amounts = folds.transform(min(folds.extras)).abundance(plan.finish(members, folds.test))
    kept = read_submission(run/"submission.csv")[folds.names].to_numpy()
    np.testing.assert_allclose(amounts, kept, rtol=1e-6)
    assert plan.views == ("identity",) and list(plan.targets) == folds.names


def test_held_out_answers_are_kept_as_they_were_scored(finished_run):
    run = RunFolder(finished_run)
    spots, final = run.table("spots.parquet"), run.table("oof_final.parquet")
    targets = [c for c in final if c.startswith("C")]
    both = final[["slide", "ID"]].merge(spots, on=["slide", "ID"])
    score = mean_spearman(final[targets].to_numpy(), both[targets].to_numpy())
    assert score == pytest.approx(run.json("metrics.json")["oof"][-1]["per_spot"], abs=1e-6)
    spread = run.table("uncertainty.parquet")
    assert len(spread) == len(spots)
    test = spread.split.eq("Test")
    assert np.isfinite(spread.loc[test, targets]).all(axis=None)               # folds disagree
    assert spread.loc[~test, targets].isna().all(axis=None)                    # one fold, one view: nothing to spread


@pytest.mark.parametrize("minutes, used", [(0, 4), (100, 4), (2.7, 2), (.001, 1)])
def test_a_budget_lowers_the_views_and_says_so(finished_run, monkeypatch, minutes, used):
    run = RunFolder(finished_run)
    folds = FoldAnswers(run, *open_stage(run), PredictionSettings(views="flips", budget_hours=minutes / 60))
    monkeypatch.setattr(answers_page, "_view_seconds", lambda folds: 60.)
    said = fit_budget(folds)
    assert len(folds.views) == used and said == ("" if used == 4 else f"views {used} of 4")
    assert folds.seen_as == ("flips" if used == 4 else f"{used} of flips")


# --- smoothing ---------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["hex", "square"])
def test_smoothing_is_the_written_sum(kind):
    xy, v = lattice(kind), RNG.random((210, 3))
    assert measure_lattice(xy)[1] == kind
    width, looks = 1.3, RNG.random((210, 2))
    far = np.linalg.norm(xy[:, None] - xy, axis=2) / 40
    near = np.where(far <= 3 * width, np.exp(-far ** 2 / (2 * width ** 2)), 0)
    unlike = np.linalg.norm(looks[:, None] - looks, axis=2)
    for weights, more in ((near, {}), (near * np.exp(-unlike ** 2 / (2 * .3 ** 2)), dict(looks=looks, tolerance=.3))):
        wanted = weights @ v / weights.sum(1, keepdims=True)
        np.testing.assert_allclose(smooth(v, table(xy), width, **more), wanted, atol=1e-9)


@pytest.mark.parametrize("smoothing", [Smoothing((2.,)), Smoothing((2.,), .1), Smoothing((0., 1., 3.), .2, True)])
def test_constants_and_lone_spots_stay(smoothing):
    spots = pd.concat([table(lattice("hex")), table(np.array([[5., 5.]]), "lone")], ignore_index=True)
    flat = np.tile([3., 1., 2.], (len(spots), 1))
    np.testing.assert_allclose(smoothing(flat, spots), flat)
    mixed = RNG.random(flat.shape)
    np.testing.assert_array_equal(smoothing(mixed, spots)[-1], mixed[-1])
    other = mixed.copy()
    other[-1] = 9
    np.testing.assert_array_equal(smoothing(other, spots)[:-1], smoothing(mixed, spots)[:-1])      # slides do not mix


def test_many_spots_are_averaged_in_parts(monkeypatch):
    from histokit.spots import lattice as page
    xy, v = lattice("hex", 40, 40), RNG.random((1600, 3))
    whole = local_mean(v, xy, 50.), local_mean(v, xy, 50., looks=v, tolerance=.2)
    monkeypatch.setattr(page, "_CHUNK", 100)
    parts = local_mean(v, xy, 50.), local_mean(v, xy, 50., looks=v, tolerance=.2)
    for a, b in zip(whole, parts): np.testing.assert_allclose(a, b, atol=1e-12)


def test_a_chosen_smoothing_does_not_see_its_own_fold():
    spots = pd.concat([table(lattice("hex"), name) for name in "ABC"], ignore_index=True)
    fold = pd.factorize(spots.slide)[0]
    true = np.cumsum(RNG.normal(size=(len(spots), 8)), 0)
    pred = true + RNG.normal(0, 6, true.shape)
    chosen = choose_smoothing(pred, true, spots, fold)
    for k in range(3):
        spoilt = np.where((fold == k)[:, None], true[:, ::-1], true)
        again = choose_smoothing(pred, spoilt, spots, fold)
        assert again.by_fold[k] == chosen.by_fold[k]
        np.testing.assert_array_equal(again.answer[fold == k], chosen.answer[fold == k])
    assert mean_spearman(chosen.answer, true) > mean_spearman(pred, true)


# --- what is made of it ------------------------------------------------------------------------

def test_discoveries_are_those_of_scipy():
    p = np.r_[RNG.random(200), RNG.random(30) * .003]
    assert (discoveries(p) == (false_discovery_control(p) <= .05)).all()


def test_a_shifted_map_stays_on_its_slide_and_stays_smooth():
    spots = pd.concat([table(lattice("hex"), "A"), table(lattice("square"), "B")], ignore_index=True)
    rows = ShiftedMaps(spots).rows(np.random.default_rng(1))
    assert (spots.slide.to_numpy()[rows] == spots.slide.to_numpy()).all() and (rows != np.arange(len(rows))).mean() > .9
    field = np.sin(spots.x / 90) + np.sin(spots.y / 70)
    near = lambda v: np.corrcoef(v[:-1], v[1:])[0, 1]
    assert near(field.to_numpy()[rows]) > .7


def test_spread_is_worth_what_it_is():
    true, slide = RNG.normal(size=(300, 10)), np.repeat(list("abc"), 100)
    size = RNG.uniform(.1, 3, (300, 1))
    pred = true + size * RNG.normal(size=true.shape)
    known, blind = (spread_worth(s, pred, true, slide, 100) for s in (size * np.ones(10), RNG.random(true.shape)))
    assert known["low"] > .5 and abs(blind["rises"]) < .2
    assert known["quarters"][0] > known["quarters"][-1] + .3


# --- ensembles ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def second_run(finished_run, tmp_path_factory):
    "Another run of the same data: the first one's answers with noise."
    folder, noise = tmp_path_factory.mktemp("second")/"second", np.random.default_rng(1)
    folder.mkdir()
    for name in ("spots.parquet", "params.yaml", "metrics.json"): shutil.copy(finished_run/name, folder/name)
    for name in ("oof.parquet", "oof_final.parquet", "submission.csv"):
        read = pd.read_csv if name.endswith("csv") else pd.read_parquet
        made = read(finished_run/name)
        targets = [c for c in made if c.startswith("C")]
        made[targets] = made[targets] * np.exp(noise.normal(0, .5, made[targets].shape))
        made.to_csv(folder/name, index=False) if name.endswith("csv") else made.to_parquet(folder/name)
    return folder


def ensemble(*words): return CliRunner().invoke(app, ["ensemble", *map(str, words)])


@pytest.mark.parametrize("way", ["auto", "log", "rank", "weights"])
def test_runs_become_a_valid_submission(finished_run, second_run, demo_file, tmp_path, way):
    done = ensemble(finished_run, second_run, "-o", tmp_path/"both", "--way", way, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert sum(said["weights"].values()) == pytest.approx(1) and min(said["weights"].values()) >= 0
    assert not has_error(check_submission_file(tmp_path/"both"/"submission.csv", DataFactory(demo_file)))
    assert said["gain"]["low"] <= said["gain"]["difference"] <= said["gain"]["high"]
    kept, oof = json.loads((tmp_path/"both"/"metrics.json").read_text()), pd.read_parquet(tmp_path/"both"/"oof.parquet")
    assert [r["name"] for r in kept["oof"]][-1] == "chosen out of fold"
    compared = CliRunner().invoke(app, ["compare", str(finished_run), str(tmp_path/"both"), "--picture", ""])
    assert compared.exit_code == 0 and len(oof) == len(pd.read_parquet(finished_run/"oof.parquet"))


def test_weights_find_the_better_run_and_only_on_other_folds(finished_run, second_run):
    spots = pd.read_parquet(finished_run/"spots.parquet").query("split == 'Train'")
    parts = [pd.read_parquet(f/"oof_final.parquet") for f in (finished_run, second_run)]
    targets = [c for c in parts[0] if c.startswith("C")]
    true = parts[0][["slide", "ID"]].merge(spots, on=["slide", "ID"])[targets].to_numpy()
    members, fold = np.stack([p[targets].to_numpy() for p in parts]), parts[0].fold.to_numpy()
    assert rank_weights(members, true)[0] > .8
    found = choose_combination(members, true, fold, "weights")
    spoilt = np.where((fold == 0)[:, None], true[:, ::-1], true)
    again = choose_combination(members, spoilt, fold, "weights")
    np.testing.assert_array_equal(again.answers["weights"][fold == 0], found.answers["weights"][fold == 0])
    for way in ("log", "rank"): assert (combine(members[:1], way) == pytest.approx(members[0]))


def bad_members(finished_run, second_run, tmp_path):
    "Words -> what is said."
    other = tmp_path/"other"
    shutil.copytree(second_run, other)
    spots = pd.read_parquet(other/"spots.parquet")
    spots.loc[spots.split.eq("Train"), "C1"] *= 2
    spots.to_parquet(other/"spots.parquet")
    bare = tmp_path/"bare"
    shutil.copytree(second_run, bare)
    (bare/"oof_final.parquet").unlink()
    short = tmp_path/"short"
    shutil.copytree(second_run, short)
    pd.read_csv(short/"submission.csv").iloc[:-1].to_csv(short/"submission.csv", index=False)
    full = tmp_path/"full"
    full.mkdir()
    (full/"notes.txt").write_text("mine")
    out = ["-o", tmp_path/"out"]
    return [((finished_run, *out), "two or more"), ((finished_run, finished_run, *out), "named twice"),
        ((finished_run, tmp_path/"nowhere", *out), "holds no"), ((finished_run, other, *out), "different true values"),
        ((finished_run, bare, *out), "oof_final.parquet"), ((finished_run, short, *out), "rows for"),
        ((finished_run, second_run, "-o", full), "other files already"),
        ((finished_run, second_run, "-o", full/"notes.txt"), "is a file"),
        ((finished_run, second_run, "-o", second_run), "one of the runs itself"),
        ((finished_run, second_run, *out, "--way", "best"), "unknown way to combine"),
        ((full, full/"notes.txt", *out), "holds no")]


def test_what_cannot_be_combined_is_one_line_and_loses_nothing(finished_run, second_run, tmp_path):
    before = (second_run/"submission.csv").read_bytes()
    for words, says in bad_members(finished_run, second_run, tmp_path):
        refused = ensemble(*words)
        assert refused.exit_code == 1 and says in refused.output, (says, refused.output)
        assert refused.stderr.count("\n") == 1
    assert (second_run/"submission.csv").read_bytes() == before
    assert (tmp_path/"full"/"notes.txt").read_text() == "mine" and not (tmp_path/"out"/"submission.csv").exists()


def test_an_ensemble_that_is_there_is_kept(finished_run, second_run, tmp_path):
    write_ensemble([finished_run, second_run], tmp_path/"both", "log")
    before = (tmp_path/"both"/"submission.csv").read_bytes()
    with pytest.raises(BadInput, match="--fresh"): write_ensemble([finished_run, second_run], tmp_path/"both", "rank")
    assert (tmp_path/"both"/"submission.csv").read_bytes() == before
    assert write_ensemble([finished_run, second_run], tmp_path/"both", "rank", fresh=True).way == "rank"


# --- broken submissions ------------------------------------------------------------------------

@pytest.fixture(scope="module")
def right(demo_file):
    "A good answer: the truth with some noise."
    made = pd.read_csv(demo_paths(demo_file).truth).sort_values("ID", ignore_index=True)
    targets = list(made.columns[1:])
    made[targets] *= np.exp(np.random.default_rng(0).normal(0, .4, made[targets].shape))
    return made


def columns(function):
    "A damage of the values alone."
    return lambda t: t.assign(**{c: v for c, v in zip(t.columns[1:], function(t.iloc[:, 1:].to_numpy()).T)})


def one_cell(value): return lambda t: t.astype({"C2": object}).assign(C2=[value, *t.C2[1:]])


def swapped(t): return t.rename(columns={"C1": "C2", "C2": "C1"})


def mixed(v): return v[np.random.default_rng(0).permutation(len(v))]


def text_order(v): return v[np.argsort(np.arange(len(v)).astype(str))]


SHUFFLED = np.random.default_rng(1)
REFUSED = {
    "rows are missing": (lambda t: t.drop(index=[3, 9]), "rows for"),
    "the last row is missing": (lambda t: t.iloc[:-1], "rows for"),
    "a row is there twice": (lambda t: pd.concat([t, t.iloc[:1]]), "rows for"),
    "a row twice, another missing": (lambda t: pd.concat([t.iloc[:1], t.iloc[:-1]]), "IDs count"),
    "no row at all": (lambda t: t.iloc[:0], "rows for"),
    "rows backwards": (lambda t: t.iloc[::-1], "IDs count"),
    "rows in the order of the text of the ID": (lambda t: t.iloc[np.argsort(t.ID.astype(str))], "IDs count"),
    "IDs from 1": (lambda t: t.assign(ID=t.ID + 1), "IDs count"),
    "IDs with halves": (lambda t: t.assign(ID=t.ID + .5), "IDs count"),
    "IDs of text": (lambda t: t.assign(ID="spot " + t.ID.astype(str)), "holds text"),
    "an ID is missing": (lambda t: t.assign(ID=t.ID.where(t.ID != 4)), "has ID"),
    "no ID": (lambda t: t.drop(columns="ID"), "the columns are"),
    "the ID is last": (lambda t: t[[*t.columns[1:], "ID"]], "the columns are"),
    "the ID is called id": (lambda t: t.rename(columns=dict(ID="id")), "the columns are"),
    "the index was written too": (lambda t: t.reset_index(), "the columns are"),
    "a type is missing": (lambda t: t.drop(columns="C5"), "the columns are"),
    "a type too many": (lambda t: t.assign(C99=1.), "columns, not"),
    "columns in another order": (lambda t: t[["ID", *t.columns[:0:-1]]], "the columns are"),
    "names exchanged": (swapped, "the columns are"),
    "columns sorted as text": (lambda t: t[["ID", *sorted(t.columns[1:])]], "the columns are"),
    "names with blanks": (lambda t: t.rename(columns=lambda c: f" {c}"), "the columns are"),
    "an empty cell": (one_cell(None), "not finite"),
    "a cell that is infinite": (one_cell(np.inf), "not finite"),
    "a cell of text": (one_cell("high"), "holds text"),
    "a decimal comma": (one_cell("0,5"), "holds text"),
    "z-scores": (columns(lambda v: (v - v.mean(0)) / v.std(0)), "z-scores"),
    "z-scores of the logarithms": (columns(lambda v: (np.log(v) - np.log(v).mean(0)) / np.log(v).std(0)), "z-scores"),
    "the table turned on its side": (lambda t: t.T.reset_index(), "the columns are"),
}
SUSPECT = {
    "one answer for all": (columns(lambda v: np.tile(v.mean(0), (len(v), 1))), "same prediction"),
    "one order for all": (columns(lambda v: np.outer(1 + np.arange(len(v)), v.mean(0))), "same order"),
    "rows without an order": (columns(lambda v: np.repeat(v[:, :1], v.shape[1], 1)), "rows are constant"),
    "negative amounts": (columns(lambda v: v - v.mean()), "negative"),
    "rounded": (columns(lambda v: v.round(1)), "ties"),
    "clipped": (columns(lambda v: np.maximum(v, np.median(v))), "ties"),
    "columns from 0 to 1": (columns(lambda v: (v - v.min(0)) / np.ptp(v, axis=0)), "on one scale"),
    "z-scores made positive": (columns(lambda v: (z := (v - v.mean(0)) / v.std(0)) - z.min() + 1), "on one scale"),
    "columns exchanged": (columns(lambda v: v[:, SHUFFLED.permutation(v.shape[1])]), "usual order"),
    "upside down": (columns(lambda v: -v + v.max() + 1), "usual order"),
    "rows shuffled under right IDs": (columns(mixed), "nothing to do with each other"),
    "rows by text under right IDs": (columns(text_order), "by the text of their ID"),
}
FILES = {"an empty file": b"", "a picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "a web page": b"<html>sign in</html>", "zeros": bytes(4000), "semicolons": b"ID;C1;C2\n0;1;2\n"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_submission_is_refused(right, demo_file, tmp_path, name):
    damage, says = REFUSED[name]
    damage(right.copy()).to_csv(tmp_path/"answer.csv", index=False)
    found = check_submission_file(tmp_path/"answer.csv", DataFactory(demo_file))
    assert has_error(found) and any(says in f.what + f.mend for f in found), found


@pytest.mark.parametrize("name", SUSPECT)
def test_a_valid_submission_that_lost_its_score_is_named(right, demo_file, tmp_path, name):
    damage, says = SUSPECT[name]
    damage(right.copy()).to_csv(tmp_path/"answer.csv", index=False)
    found = check_submission_file(tmp_path/"answer.csv", DataFactory(demo_file))
    assert not has_error(found) and any(f.level == "warning" and says in f.what for f in found), found


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_submission_is_refused(demo_file, tmp_path, name):
    (tmp_path/"answer.csv").write_bytes(FILES[name])
    refused = CliRunner().invoke(app, ["validate", str(tmp_path/"answer.csv"), "--data", demo_file])
    assert refused.exit_code == 1 and refused.stderr.count("\n") == 1
    assert (tmp_path/"answer.csv").read_bytes() == FILES[name]


def test_good_submissions_raise_nothing(right, demo_file, finished_run, tmp_path):
    right.to_csv(tmp_path/"answer.csv", index=False)
    for file in (tmp_path/"answer.csv", finished_run/"submission.csv"):
        found = check_submission_file(file, DataFactory(demo_file))
        assert all(f.level == "note" for f in found), found
    done = CliRunner().invoke(app, ["validate", str(tmp_path/"answer.csv"), "--data", demo_file])
    assert done.exit_code == 0 and "is valid" in done.stdout


def test_a_refused_answer_never_replaces_a_file(right, tmp_path):
    targets = list(right.columns[1:])
    write_submission(tmp_path/"answer.csv", right[targets].to_numpy(), targets)
    before = (tmp_path/"answer.csv").read_bytes()
    spoilt = right[targets].to_numpy().copy()
    spoilt[3, 3] = np.nan
    with pytest.raises(BadInput, match="not finite"): write_submission(tmp_path/"answer.csv", spoilt, targets)
    assert (tmp_path/"answer.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_amounts_of_every_scale_keep_the_order(right):
    values = right.iloc[:, 1:].to_numpy()
    for kind in TargetTransform.kinds:
        transform = TargetTransform(kind).fit(values)
        natural = transform.natural(transform.transform(values))
        ranks = row_ranks(transform.abundance(aggregate_answers(np.stack([natural] * 3)[:, None], "rank-mean")))
        assert spearmanr(ranks.ravel(), row_ranks(values).ravel())[0] > .999

"What the pages on scores, intervals, ladders and results leave to say: odd shapes, both engines, faults."
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn import metrics as sk

from histokit.core.files import write_json, write_table
from histokit.core.text import BadInput
from histokit.learn.bootstrap import (
    Bootstrap, bootstrap_interval, bootstrap_means, bootstrap_scores, count_units, mean_difference, mean_interval,
    paired_difference)
from histokit.learn.ladder import Rung, format_ladder, ladder, show_ladder, split_gap, split_rungs
from histokit.learn.scores import (
    SCORES, SPEARMAN, RunningMean, Score, UndefinedScore, _tensor_ranks, accuracy, average_precision, balanced_accuracy,
    kappa_score, mean_absolute_error, mean_spearman, pearson_columns, pearson_rows_score, quadratic_weighted_kappa,
    roc_auc, row_ranks, sensitivity, spearman_columns, spearman_rows, specificity)
from histokit.spots.contributions import compare_types, contributions, swaps, top_k_agreement
from histokit.spots.blend import choose_blend
from histokit.spots.ladder import (EQUAL_SLIDES, OWN_SLIDE, PER_SPOT, PER_TYPE, held_out_constants, new_slide_rungs,
    spot_ladder, standard_rungs)
from histokit.spots.leaderboard import simulate_leaderboard
from histokit.spots.results import compare_runs, differing_parameters, format_comparison, read_run, run_predictions

rng = np.random.default_rng(0)
AUC, KAPPA = SCORES["roc_auc"], kappa_score(5)


def tables(n, t, values=6):
    return rng.integers(0, values, (n, t)).astype(float), rng.random((n, t))


def of_rows(score, a, b):
    return [score(p, t).statistic for p, t in zip(a, b)]


# --- ranks and correlations

SHAPES = [(1, 2), (7, 35), (3, 5000), (1001, 35), (40, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_of_both_engines(shape):
    "Ties, signed zeros, infinite spread and one column: as scipy ranks them."
    wide = rng.standard_normal(shape) * 10. ** rng.integers(-300, 300, shape)
    zeros = np.zeros(shape) * rng.choice([-1, 1], shape)
    for x in (rng.integers(0, 4, shape) - 2., wide, zeros):
        for ranks in (row_ranks(x), row_ranks(torch.tensor(x)), _tensor_ranks(torch.tensor(x))):
            np.testing.assert_array_equal(ranks, rankdata(x, axis=1))
    assert row_ranks(np.asfortranarray(x)[::-1]).shape == shape


@pytest.mark.parametrize("share", [0, .3, 1])
def test_ranks_of_what_is_there(share):
    "NaN and masks on both engines, rows with nothing in them, infinities beside missing values."
    x, mask = rng.integers(0, 4, (60, 9)) - 1., rng.random((60, 9)) >= share
    x[0], mask[0] = np.inf, np.arange(9) > 3
    x[1, :3] = -np.inf
    want = rankdata(np.where(mask, x, np.nan), axis=1, nan_policy="omit")
    tensor, there = torch.tensor(x), torch.tensor(mask)
    given = row_ranks(x, mask), row_ranks(np.where(mask, x, np.nan)), row_ranks(tensor, there)
    for ranks in (*given, torch.where(there, _tensor_ranks(torch.where(there, tensor, torch.nan)), torch.nan)):
        np.testing.assert_array_equal(ranks, want)
    assert row_ranks(pd.DataFrame(x)).shape == (60, 9)
    with pytest.raises(BadInput, match="tables"): row_ranks(np.ones(3))


KINDS = [np.float32, np.int64, np.uint8, torch.float16, torch.bfloat16, torch.int32, pd.DataFrame]


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_table(kind):
    pred, true = tables(20, 9, 40)
    tensor = isinstance(kind, torch.dtype)
    if tensor: given = torch.tensor(pred).to(kind)
    else: given = kind(pred) if kind is pd.DataFrame else pred.astype(kind)
    out = spearman_rows(given, true)
    assert isinstance(out, torch.Tensor) == tensor
    np.testing.assert_allclose(out, of_rows(spearmanr, pred, true), atol=1e-12)


@pytest.mark.parametrize("n", [1, 467, 468, 469, 1500])
def test_pieces_do_not_show(n):
    "The processor scores rows in pieces; the result is that of every row alone."
    pred, true = tables(n, 35)
    for score in (spearman_rows, pearson_rows_score):
        whole = score(pred, true)
        alone = np.concatenate([score(pred[i:i + 1], true[i:i + 1]) for i in range(n)])
        np.testing.assert_array_equal(whole, alone)
        np.testing.assert_allclose(score(torch.tensor(pred), torch.tensor(true)), whole, atol=1e-14)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_stays_on_the_gpu():
    pred, true = tables(3000, 35)
    on = [torch.tensor(v, device="cuda") for v in (pred, true)]
    for score in (spearman_rows, spearman_columns, pearson_columns, pearson_rows_score, top_k_agreement):
        assert score(*on).is_cuda
        np.testing.assert_allclose(score(*on).cpu(), score(pred, true), atol=1e-12)
    mask = torch.rand(3000, 35, device="cuda") < .8
    np.testing.assert_array_equal(row_ranks(on[0], mask).cpu(), row_ranks(pred, mask.cpu().numpy()))
    assert RunningMean().update(*on).total.is_cuda and contributions(*on).equals(contributions(pred, true))
    assert bootstrap_interval(SPEARMAN, *on) == pytest.approx(bootstrap_interval(SPEARMAN, pred, true))
    with pytest.raises(BadInput, match="one device"): spearman_rows(on[0], torch.tensor(true))


def test_wide_rows_keep_precision():
    pred, true = tables(3, 20_000, 50)
    found = spearman_rows(torch.tensor(pred), torch.tensor(true))
    np.testing.assert_allclose(found, of_rows(spearmanr, pred, true), atol=1e-10)


def test_pearson_is_steady():
    "Large offsets, tiny scales, and constants that only rounding makes uneven."
    a, b = rng.random((4, 30)), rng.random((4, 30))
    want = of_rows(pearsonr, a, b)
    changes = [(1, 0, 1e-13), (1e-200, 0, 1e-12), (1e150, 0, 1e-12), (1, 1e6, 1e-8)]
    for scale, offset, eps in changes:
        np.testing.assert_allclose(pearson_rows_score(a * scale + offset, b), want, atol=eps)
    assert pearson_columns(np.full((9, 2), .1), rng.random((9, 2))).tolist() == [0, 0]


def test_constant_rows_are_zero_and_gradients_are_dropped():
    x = torch.ones(2, 5, requires_grad=True)
    assert spearman_rows(x, torch.rand(2, 5)).tolist() == [0, 0] and not spearman_rows(x, x).requires_grad
    assert not row_ranks(x).requires_grad
    assert spearman_columns([[1, 2]], [[1, 2]]).tolist() == [0, 0]


ONE = np.ones((1, 2))
BAD = [
    (np.ones((2, 3)), np.ones((3, 2)), "must be equal"),
    (np.ones(3), np.ones(3), "tables"),
    (np.ones((2, 0)), np.ones((2, 0)), "tables"),
    (ONE * np.inf, ONE, "not finite"),
    (torch.tensor(ONE * np.nan), ONE, "not finite"),
    (torch.ones(1, 2), torch.ones(1, 2, device="meta"), "one device")]


@pytest.mark.parametrize("pred, true, message", BAD)
def test_refusals(pred, true, message):
    for score in (spearman_rows, spearman_columns, pearson_columns, top_k_agreement):
        with pytest.raises(BadInput, match=message): score(pred, true)


def test_no_rows():
    assert spearman_rows(np.ones((0, 3)), np.ones((0, 3))).shape == (0,)
    empty = np.ones((0, 3))
    for score in (mean_spearman, SPEARMAN, SCORES["accuracy"]):
        with pytest.raises(BadInput, match="no rows"): score(empty, empty)
    with pytest.raises(BadInput, match="no rows"): mean_interval([])
    with pytest.raises(BadInput, match="update"): RunningMean().compute()


@pytest.mark.parametrize("cuts", [(1, 2, 3), (50,), (99,), ()])
@pytest.mark.parametrize("name", ["spearman", "mean_absolute_error"])
def test_batches_of_any_size(cuts, name):
    score, (pred, true) = SCORES[name], tables(100, 12)
    parts = list(zip(np.split(pred, cuts), np.split(true, cuts)))
    fed, added = RunningMean(score), sum((RunningMean(score).update(*p) for p in parts), RunningMean(score))
    for p, t in parts: fed.update(torch.tensor(p), torch.tensor(t))
    assert fed.compute() == pytest.approx(score(pred, true), abs=1e-12) == added.compute()
    assert (fed.count, added.count) == (100, 100)


# --- classifiers

@pytest.mark.parametrize("decimals", [0, 1, 9])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, pd.DataFrame])
def test_labels_against_scikit_learn(decimals, kind):
    "Many ties, one tie in all, none; imbalance; any kind of table."
    true = (rng.random((120, 4)) < [.5, .1, .02, .9]).astype(int)
    true[:2] = [[0] * 4, [1] * 4]
    pred = (rng.normal(size=true.shape) + true).round(decimals)
    pred[:, 3] = 1
    for ours, theirs in ((roc_auc, sk.roc_auc_score), (average_precision, sk.average_precision_score)):
        assert ours(kind(pred), kind(true)) == pytest.approx(theirs(true, pred))
        assert ours(pred[:, 0], true[:, 0]) == pytest.approx(theirs(true[:, 0], pred[:, 0]))
    assert roc_auc(-pred, true) == pytest.approx(1 - roc_auc(pred, true))
    for at in (0, .5, 1):
        p, t = pred[:, 0], true[:, 0]
        assert sensitivity(p, t, at) == pytest.approx(sk.recall_score(t, p >= at))
        assert specificity(p, t, at) == pytest.approx(sk.recall_score(1 - t, p < at))


def test_classes_against_scikit_learn():
    true, scores = rng.integers(0, 4, 200), rng.random((200, 4))
    said = scores.argmax(1)
    for pred in (said, scores, torch.tensor(scores), said.astype(float)):
        assert accuracy(pred, true) == pytest.approx(sk.accuracy_score(true, said))
        assert balanced_accuracy(pred, true) == pytest.approx(sk.balanced_accuracy_score(true, said))
    assert balanced_accuracy([0, 0, 1], [0, 0, 0]) == pytest.approx(2 / 3)      # a class that is not there has no share
    assert accuracy([True, False], [1, 1]) == .5
    assert mean_absolute_error(said, true) == pytest.approx(sk.mean_absolute_error(true, said))


@pytest.mark.parametrize("levels", [5, range(1, 6), ["a", "b", "c", "d", "e"]])
def test_kappa_takes_the_whole_scale(levels):
    "As scikit-learn with all labels, also where levels are missing among the rows."
    scale = np.array(list(range(levels)) if isinstance(levels, int) else list(levels))
    for seen in ([0, 1, 2, 3, 4], [0, 2, 4], [1, 2], [0, 4]):
        true, pred = scale[rng.choice(seen, 80)], scale[rng.choice(seen, 80)]
        want = sk.cohen_kappa_score(pred, true, weights="quadratic", labels=scale)
        assert quadratic_weighted_kappa(pred, true, levels) == pytest.approx(want)
    assert quadratic_weighted_kappa(scale, scale, levels) == 1
    assert kappa_score(levels)(scale, scale[::-1]) == pytest.approx(-1)


FAULTY = [
    (roc_auc, [.1, .2], [1, 1], "label 0 is positive in all 2 rows"),
    (roc_auc, np.ones((3, 2)), [[0, 0], [1, 0], [0, 0]], "label 1 is negative in all 3 rows"),
    (roc_auc, [.1, .2], [0, 2], "must be 0 or 1"),
    (roc_auc, [.1, np.nan], [0, 1], "not finite"),
    (roc_auc, [.1, .2, .3], [0, 1], "must be equal"),
    (average_precision, [.1, .2], [0, 0], "needs both classes"),
    (sensitivity, [.1, .2], [0, 0], "needs a positive row"),
    (specificity, [.1, .2], [1, 1], "needs a negative row"),
    (accuracy, [.2, .7], [0, 1], "threshold"),
    (accuracy, [0, 1, 1], [0, 1], "3 predictions for 2 rows"),
    (balanced_accuracy, [], [], "no rows"),
    (KAPPA, [0, 5], [0, 1], "not on the scale"),
    (KAPPA, [1.5, 2], [0, 1], "no classes"),
    (KAPPA, [2, 2], [2, 2], "every row has the same")]


@pytest.mark.parametrize("score, pred, true, message", FAULTY)
def test_classifier_scores_refuse_in_a_line(score, pred, true, message):
    with pytest.raises(BadInput, match=message) as e: score(pred, true)
    assert "\n" not in str(e.value)


def test_score_objects_check_themselves():
    for name, score in SCORES.items():
        assert score.name == name and score.title and score.label.isprintable()
    with pytest.raises(BadInput, match="underscores"): Score("mean AUC", roc_auc, False)
    with pytest.raises(BadInput, match="give a function"): Score("auc", .5, False)
    with pytest.raises(BadInput, match="score of a set of rows"): AUC.rows([.1, .2], [0, 1])
    assert np.isnan(AUC.best([])) and np.isnan(AUC.best([np.nan]))


# --- intervals

def test_bootstrap_units():
    "Slides decide where there are several, else blocks; one unit alone has no interval; names of units do not matter."
    v, slide = rng.random(90), np.repeat(["a", "b", "c"], 30)
    block = np.tile(np.repeat(range(5), 6), 3)
    for same in (pd.Series(slide).astype("category"), np.repeat([0, 1, 2], 30)):
        assert mean_interval(v, slide, block) == mean_interval(v, same, block)
    assert (count_units(90, slide, block), count_units(90, np.zeros(90), block), count_units(90)) == (3, 5, 90)
    assert np.isnan(mean_interval(v, np.zeros(90), np.zeros(90))).all()
    assert mean_interval(v, np.zeros(90), block) == mean_interval(v, block)
    low, high = mean_interval(np.stack([v, v + 1], 1), slide, block)
    assert low == pytest.approx([low[0], low[0] + 1]) and (low < high).all()


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_any_depth_of_units(depth):
    "Drawn rows and weighted sums give the same means; every unit of one member is a row."
    row, score = np.arange(120), SCORES["mean_absolute_error"]
    units = [row // 40, row // 10 % 4, row // 5 % 2][:depth]                    # patients, slides, blocks
    pred, true = rng.random(120), rng.random(120)
    set_score = Score("error", mean_absolute_error, per_row=False, larger_is_better=False)
    fast = bootstrap_scores(score, [pred], true, *units)
    np.testing.assert_allclose(bootstrap_scores(set_score, [pred], true, *units), fast)
    single = [*units, row]
    assert np.std(bootstrap_means(abs(pred - true), *single)) > 0
    if not depth: np.testing.assert_array_equal(bootstrap_means(abs(pred - true), *single)[:, None], fast)


def test_bootstrap_of_a_set_score():
    "An AUC over patients: paired, symmetric, and NaN where too many draws hold one class only."
    patient = np.repeat(range(30), 4)
    ill = (np.arange(30) < 12)[patient]
    a, b = (ill * k + rng.normal(size=30)[patient] + rng.normal(size=120) for k in (.5, 1.5))
    low, high = bootstrap_interval(AUC, b, ill, patient)
    assert low < AUC(b, ill) < high
    ab, ba = paired_difference(AUC, a, b, ill, patient), paired_difference(AUC, b, a, ill, patient)
    assert ab["difference"] == pytest.approx(AUC(b, ill) - AUC(a, ill)) == pytest.approx(-ba["difference"])
    assert ab["low"] == pytest.approx(-ba["high"]) and ab["above"] == pytest.approx(1 - ba["above"])
    tensors = [torch.tensor(v) for v in (a, b, ill)]
    assert paired_difference(AUC, *tensors, patient) == pytest.approx(ab)
    lone = patient == 3
    draws = bootstrap_scores(AUC, [b], lone, patient)
    assert .3 < np.isnan(draws).mean() < .45              # (29/30)^30 of the draws hold no positive
    assert np.isnan(bootstrap_interval(AUC, b, lone, patient)).all()
    assert np.isnan(paired_difference(AUC, a, b, lone, patient)["above"])
    with pytest.raises(UndefinedScore, match="both classes"): paired_difference(AUC, a, b, ill * 0, patient)


def test_kappa_over_patients():
    grade, patient = rng.integers(0, 5, 90), np.repeat(range(30), 3)
    near = np.clip(grade + rng.integers(-1, 2, 90), 0, 4)
    low, high = bootstrap_interval(KAPPA, near, grade, patient)
    assert low < KAPPA(near, grade) < high
    assert (low, high) == bootstrap_interval(KAPPA, near.astype(float), grade, [f"p{i}" for i in patient + 100])


BAD_DRAWS = [
    (lambda: mean_interval([1, np.nan]), "finite"),
    (lambda: mean_interval([1, 2], [0]), "1 entries in a column of units"),
    (lambda: bootstrap_interval(AUC, [.1, .2], [0, 1], ["a", None]), "row 1 belongs to no unit"),
    (lambda: Bootstrap(draws=0), "draws=0"),
    (lambda: Bootstrap(level=95), "level=95")]


@pytest.mark.parametrize("call, message", BAD_DRAWS)
def test_bootstrap_refuses_in_a_line(call, message):
    with pytest.raises(BadInput, match=message) as e: call()
    assert "\n" not in str(e.value)


def test_settings_of_a_bootstrap():
    v = rng.random(50)
    assert mean_interval(v, bootstrap=Bootstrap(seed=1)) != mean_interval(v)
    narrow, wide = (np.ptp(mean_interval(v, bootstrap=Bootstrap(level=level))) for level in (.5, .99))
    assert narrow < wide
    assert bootstrap_means(v, bootstrap=Bootstrap(draws=7)).shape == (7,)


def test_paired_difference_is_sharper_and_symmetric():
    true, slide = rng.random((200, 20)), np.repeat(range(4), 50)
    units = slide, np.arange(200)
    easy = rng.normal(0, .5, 4)[slide][:, None] + 1
    a, b = true + easy * rng.random((200, 20)), true + .8 * easy * rng.random((200, 20))
    ab, ba = (paired_difference(SPEARMAN, *pair, true, *units) for pair in ((a, b), (b, a)))
    assert ab["difference"] == pytest.approx(-ba["difference"]) and ab["low"] == pytest.approx(-ba["high"])
    assert ab["above"] == pytest.approx(1 - ba["above"])
    tensors = [torch.tensor(v) for v in (a, b, true)]
    assert paired_difference(SPEARMAN, *tensors, *units) == pytest.approx(ab)
    assert mean_difference(spearman_rows(a, true), spearman_rows(b, true), *units) == pytest.approx(ab)
    assert paired_difference(SPEARMAN, a, a, true, *units)["above"] == .5
    types = compare_types(a, b, true, *units, names=list("abcdefghijklmnopqrst"))
    assert types.difference.sum() == pytest.approx(ab["difference"]) and types.difference.is_monotonic_decreasing


# --- where a score comes from

def test_top_k_is_fair_to_ties():
    "No order of columns helps; a table without ties is counted plainly."
    pred, true = tables(200, 10, 3)
    mixed = rng.permutation(10)
    np.testing.assert_allclose(top_k_agreement(pred, true, 4), top_k_agreement(pred[:, mixed], true[:, mixed], 4))
    assert top_k_agreement(np.zeros((1, 10)), true[:1], 4) == pytest.approx(.4)   # no opinion finds what chance would
    plain = rng.random((200, 10))
    top = [[set(np.argsort(row)[-4:]) for row in table] for table in (plain, true)]
    want = [len(p & t) / 4 for p, t in zip(*top)]
    np.testing.assert_allclose(top_k_agreement(plain, true, 4), want)
    np.testing.assert_allclose(top_k_agreement(torch.tensor(plain), torch.tensor(true), 4), want)


def test_contributions_and_swaps_add_up():
    pred, true = tables(60, 11)
    pred[0], true[1] = 1, 2                                            # rows without order
    table = contributions(pred, true)
    assert table.score.sum() == pytest.approx(mean_spearman(pred, true))
    assert table.lost.sum() == pytest.approx(1 - mean_spearman(pred, true))
    assert (table.lost > -1e-15).all()
    a, b = (rankdata(v, axis=1) - 6 for v in (pred, true))
    size = np.maximum((b ** 2).sum(1), 1)
    pairs = swaps(pred, true)
    ordered = (b ** 2).sum(1) > 0
    want = np.where(ordered, 1 - (a * b).sum(1) / size, 0)             # 1 - rho |a| / |b|, ties included
    assert pairs.lost.sum() == pytest.approx(want.mean()) and len(pairs) == 55
    for r in pairs.itertuples():
        apart = b[:, r.high] - b[:, r.low]
        agree = np.sign(pred[:, r.high] - pred[:, r.low]) * np.sign(apart)
        assert r.lost == pytest.approx(np.mean(abs(apart) * (1 - agree) / 2 / size))


# --- ladders

def test_random_split_is_never_shown_as_honest():
    true, fold = rng.random((40, 5)), np.repeat([0, 1], 20)
    rungs = standard_rungs(true, fold) | split_rungs(true + .5 * rng.random((40, 5)), true)
    table = spot_ladder(rungs, true, fold)
    assert split_gap(table)["this model"] == pytest.approx(1 - table.set_index("name").per_spot["this model"])
    assert np.isnan(table.skill.iloc[-1]) and np.isfinite(table.skill.iloc[-2])
    text = format_ladder(table).splitlines()
    assert [line.split("  ")[0] for line in text if " *" in line] == ["random split: this model *"]
    assert text[-1].startswith("* trained on neighbours")
    faces = show_ladder(table).axes[0].collections[1].get_facecolors()
    assert (faces[-1][:3] == 1).all() and not (faces[0][:3] == 1).all()
    with pytest.raises(BadInput, match="one fold"): held_out_constants(true, np.zeros(40))


def test_ladder_over_any_score():
    "An AUC, an error, a kappa: the skill of the best constant is 0, that of a perfect answer 1."
    patient = np.repeat(range(20), 5)
    label, grade = rng.permutation(np.arange(20) % 2)[patient], rng.integers(0, 5, 100)
    error = SCORES["mean_absolute_error"]
    for score, true in ((AUC, label), (error, grade), (KAPPA, grade)):
        rungs = {f"constant: {v}": Rung(np.full(100, v), "constant") for v in (1, 2)}
        rungs |= {"truth": true, "back": true[::-1]}
        table = ladder(rungs, true, [patient], score, further=[SCORES["accuracy"]])
        assert list(table.columns) == ["name", score.name, "low", "high", "accuracy", "skill", "kind"]
        skill = table.set_index("name").skill
        assert skill[table.kind.eq("constant").to_numpy()].max() == 0 and skill["truth"] == pytest.approx(1)
        head, *lines = format_ladder(table).splitlines()
        assert score.title in head and "accuracy" in head and len(lines) == 4
        assert show_ladder(table).axes[0].get_xlabel() == (score.label or score.title)
    assert table.low[2] == table.high[2] == 1


def test_ladder_of_spots_keeps_its_columns():
    "What metrics.json holds, as it was; constants have no map; rungs of unseen slides take training constants."
    true, fold = rng.random((60, 4)), np.repeat([0, 1, 2], 20)
    table = spot_ladder(standard_rungs(true, fold, true) | {"this model": true}, true, fold, np.arange(60) // 5)
    assert list(table.columns) == ["name", "per_spot", "low", "high", "per_type", "skill", "kind"]
    constant = table.name.str.startswith("constant")
    assert table.per_type.isna().equals(constant) and table.kind.eq("constant").equals(constant)
    assert json.dumps(table.to_dict("records")) and json.dumps(table.attrs)
    back = pd.DataFrame(json.loads(json.dumps(table.to_dict("records"))))
    assert format_ladder(back) == format_ladder(table)
    first = format_ladder(table).splitlines()[0]
    assert re.split(r"\s{2,}", first.strip()) == ["per spot", "95 % interval", "type", "skill"]
    rungs = new_slide_rungs(true, true[:7], true[:7], seed=3)
    assert [r.kind for r in rungs.values()] == ["random", *["constant"] * 3, "oracle"]
    assert (rungs["constant: mean"].pred == true.mean(0)).all()
    np.testing.assert_array_equal(rungs["random"].pred, np.random.default_rng(3).random((7, 4)))


# --- run folders

TRUE = rng.random((60, 4))


def fake_run(folder, pred, fold=None, true=TRUE, targets=("C1", "C2", "C3", "C4"), **parameters):
    spots = pd.DataFrame(dict(slide=np.repeat(["S_1", "S_2", "S_3"], 20), ID=np.tile(range(20), 3)))
    if fold is None: fold = np.repeat([0, 1, 2], 20)
    spots = spots.assign(x=rng.integers(0, 99, 60), y=range(60), fold=fold)
    test = spots.head(5).assign(slide="S_4", split="Test")
    truth = spots.assign(split="Train", **dict(zip(targets, true.T)))
    write_table(folder/"spots.parquet", pd.concat([truth, test]))
    oof = pd.concat([spots, pd.DataFrame(pred, columns=list(targets))], axis=1)
    write_table(folder/"oof.parquet", oof.sample(frac=1, random_state=0))             # order does not matter
    places = dict(run_dir=str(folder), data_path=str(folder))
    write_json(folder/"run.json", dict(recipe="r", parameters=dict(places, seed=0, **parameters)))
    return folder


def blocks(spots): return spots.y.to_numpy() // 5


def write_rungs(folder, **rungs):
    table = pd.DataFrame(dict(name=rungs.keys(), per_spot=rungs.values()))
    table["kind"] = np.where(table.name.str.startswith("random"), "random split", "model")
    write_json(folder/"metrics.json", dict(oof=table.to_dict("records")))


def test_compare_runs(tmp_path):
    a, b = TRUE + rng.random((60, 4)), TRUE + .5 * rng.random((60, 4))
    folders = [fake_run(tmp_path/"a", a, epochs=1), fake_run(tmp_path/"b", b, epochs=2, loss="mse")]
    folders.append(fake_run(tmp_path/"c", b, np.tile([0, 1], 30), epochs=1))
    write_rungs(folders[1], **{"this model": .5, "+ smoothing": .6, "random split: this model": .75})
    (folders[2]/"run.json").unlink()
    table, fig = compare_runs(folders, blocks, bootstrap=Bootstrap(draws=200))
    assert table.run.tolist() == ["a", "b", "c"] and table.split.tolist() == ["slides", "slides", "spots"]
    assert table.per_spot.tolist() == pytest.approx([mean_spearman(p, TRUE) for p in (a, b, b)])
    assert table.difference[1] == pytest.approx(table.per_spot[1] - table.per_spot[0])
    assert table.diff_low[1] <= table.difference[1] <= table.diff_high[1]
    assert (table.final[1], table.gap[1]) == (.6, .25)
    assert np.isnan(table.final[0]) and np.isnan(table.skill[2])
    assert table.parameters.tolist() == [dict(epochs=1, loss=None), dict(epochs=2, loss="mse"), None]
    text = format_comparison(table)
    for words in ("c *", "no parameters recorded", "loss=mse", "validated on spots of slides"): assert words in text
    assert len(fig.axes) == 2 and json.dumps(differing_parameters([read_run(f) for f in folders]))


@pytest.mark.parametrize("score", [PER_TYPE, SCORES["mean_absolute_error"]])
def test_compare_runs_by_any_score(tmp_path, score):
    a, b = TRUE + rng.random((60, 4)), TRUE + .5 * rng.random((60, 4))
    folders = [fake_run(tmp_path/"a", a), fake_run(tmp_path/"b", b)]
    write_json(folders[0]/"metrics.json", dict(random_split=dict(random_split=.8, held_out=.5)))
    few = Bootstrap(draws=100)
    table, fig = compare_runs(folders, blocks, score, few)
    units = np.repeat([0, 1, 2], 20), np.arange(60) // 5
    want = paired_difference(score, a, b, TRUE, *units, bootstrap=few)
    assert table.difference[1] == pytest.approx(want["difference"])
    assert table.diff_low[1] == pytest.approx(want["low"])
    assert np.isnan(table.gap[0]) and score.title in format_comparison(table) and len(fig.axes) == 2
    assert compare_runs(folders, blocks, PER_SPOT, Bootstrap(draws=9))[0].gap[0] == pytest.approx(.3)


def test_same_name_and_order_of_targets(tmp_path):
    a = fake_run(tmp_path/"x"/"run", TRUE)
    back = TRUE[:, ::-1]
    b = fake_run(tmp_path/"y"/"run", back, true=back, targets=("C4", "C3", "C2", "C1"))
    table, _ = compare_runs([a, b], blocks, bootstrap=Bootstrap(draws=50))
    assert table.run.tolist() == [str(a), str(b)] and table.per_spot.tolist() == [1, 1]


def test_run_predictions_need_a_finished_run(tmp_path):
    folder = fake_run(tmp_path/"a", TRUE)
    with pytest.raises(BadInput, match="no submission.csv; give the folder of a finished run"): run_predictions(folder)


def drop_column(folder):
    write_table(folder/"oof.parquet", pd.read_parquet(folder/"oof.parquet").drop(columns="fold"))


def drop_row(folder):
    write_table(folder/"oof.parquet", pd.read_parquet(folder/"oof.parquet").iloc[1:])


def in_both(change):
    def go(folder):
        for name in ("oof.parquet", "spots.parquet"):
            write_table(folder/name, change(pd.read_parquet(folder/name)))
    return go


FAULTS = {
    "different slides": in_both(lambda t: t.replace(dict(slide={"S_3": "S_9"}))),
    "different spots": in_both(lambda t: t.query("not (slide == 'S_3' and ID == 19)")),
    "training spots": drop_row,
    "run its stage 03_train first": lambda folder: (folder/"oof.parquet").unlink(),
    "not readable": lambda folder: (folder/"oof.parquet").write_bytes(b"PAR1 and no more"),
    "do not belong together": drop_column}
OTHER_DATA = {
    "different targets .C4, X": dict(targets=("C1", "C2", "C3", "X")),
    "different true values": dict(true=TRUE + .01)}


@pytest.mark.parametrize("message", [*OTHER_DATA, *FAULTS, "two or more"])
def test_runs_refused(tmp_path, message):
    a, b = fake_run(tmp_path/"a", TRUE), fake_run(tmp_path/"b", TRUE, **OTHER_DATA.get(message, {}))
    if message in FAULTS: FAULTS[message](b)
    with pytest.raises(BadInput, match=message) as e: compare_runs([a] if message == "two or more" else [a, b], blocks)
    assert "\n" not in str(e.value)


def test_rungs_that_know_slides_change_no_other():
    "A further constant and an oracle join the ladder; scores, intervals and skill of the others keep every digit."
    rng = np.random.default_rng(0)
    true, slide = rng.random((60, 6)) + np.arange(6), np.repeat(["a", "b", "c"], [40, 14, 6])
    fold, block = pd.factorize(slide)[0], np.arange(60) // 5
    before = spot_ladder(standard_rungs(true, fold, true), true, slide, block)
    after = spot_ladder(standard_rungs(true, fold, true, slide=slide), true, slide, block)
    kept = after[after["name"].isin(before["name"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)
    assert sorted(set(after["name"]) - set(before["name"])) == sorted([EQUAL_SLIDES, OWN_SLIDE])
    assert after.kind[after["name"].eq(EQUAL_SLIDES)].item() == "further constant"


def test_a_choice_out_of_fold_does_not_see_what_is_scored():
    rng, fold = np.random.default_rng(1), np.repeat([0, 1, 2], 20)
    x, y = np.tile(np.arange(20), 3) % 5 * 10., np.tile(np.arange(20), 3) // 5 * 10.
    spots = pd.DataFrame(dict(slide=fold, x=x, y=y))
    true, pred, constant = rng.random((60, 8)), rng.random((60, 8)), rng.random(8)
    found = choose_blend(pred, pred, constant, true, spots, fold)
    for k in range(3):
        spoilt = np.where((fold == k)[:, None], rng.random((60, 8)), true)
        again = choose_blend(pred, pred, constant, spoilt, spots, fold)
        assert again.by_fold[k] == found.by_fold[k]
        np.testing.assert_array_equal(again.answer[fold == k], found.answer[fold == k])


@pytest.mark.parametrize("share", [.01, .3, .99])
def test_a_leaderboard_has_two_parts(share):
    "At least one unit is public and one private, whatever the share; the two parts make the whole."
    rng, units = np.random.default_rng(2), np.repeat(np.arange(5), 8)
    true = rng.random((40, 5))
    table = simulate_leaderboard(dict(a=rng.random((40, 5)), b=true), true, units, share, draws=50)
    assert np.isfinite(table.to_numpy()).all() and table.loc["b", ["public", "private"]].tolist() == [1, 1]
    assert table.attrs["kept"] == 1

"""Agreement of raters: against the packages that are known for it, on gaps, ties and studies of one person."""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import cohen_kappa_score

from histokit.core.text import BadInput
from histokit.learn.bootstrap import Bootstrap
from histokit.learn.scores import kappa_columns, kappa_value
from histokit.review.agreement import MODEL, ac2_columns, ac2_value, agreement, alpha_columns, alpha_value, confusion
from histokit.review.agreement import draft_pull, most_split, rater_agreement, rating_table
from histokit.review.measures import PRESETS, Measure
from histokit.review.scores import degeneracy, icc_columns, icc_value, intraclass_correlation, judge_measure
from histokit.review.scores import leave_one_out_mean, mean_kappa, on_scale

GRADE = Measure("grade")
FEW = Bootstrap(50)
TABLE = np.array([[4, 3, 3], [0, 1, 0], [0, 0, 0], [1, 1, 2], [0, 0, 0], [4, 4, 4], [4, 3, 4], [3, 3, 1], [1, 0, 0],
    [0, 0, 1], [0, 0, 2], [2, 3, 2], [3, 3, 2], [3, 2, 3], [2, 0, 0], [0, 0, 1], [4, 3, 4], [2, 3, 3], [0, 0, 1],
    [1, 1, 1], [3, 3, 1], [0, 0, 2], [3, 4, 4], [1, 2, 1]], float)


def gappy():
    table = TABLE.copy()
    table[::5, 0] = np.nan
    table[3, 1:] = np.nan
    return table


def rows(table, measure="grade", raters="abc", group=None):
    "A table as rows of image, group, measure, rater and value."
    wide = pd.DataFrame(table, columns=list(raters)).rename_axis("image").reset_index()
    long = wide.melt("image", var_name="rater", value_name="value").dropna()
    return long.assign(measure=measure, group=long.image // 3 if group is None else group)


def test_alpha_is_that_of_krippendorff():
    "krippendorff 0.9.0, ordinal, value_domain 0 to 4."
    for table, known in ((TABLE, .7588242499623097), (gappy(), .7386639300847457)):
        assert alpha_value(alpha_columns(table, 5).mean(0), len(table)) == pytest.approx(known, abs=1e-12)


def test_ac2_is_that_of_irrcac():
    "irrCAC, Gwet with quadratic weights, rounded there to five digits."
    for table, known in ((TABLE, .77322), (gappy(), .74722)):
        assert ac2_value(ac2_columns(table, 5).mean(0)) == pytest.approx(known, abs=6e-6)


def test_icc_is_that_of_pingouin():
    "pingouin 0.7.0, ICC(A,1)."
    assert icc_value(icc_columns(TABLE).mean(0), len(TABLE)) == pytest.approx(.776265, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=40))
def test_kappa_is_that_of_scikit_learn_with_the_full_range(pairs):
    a, b = np.array(pairs).T
    mine = float(kappa_value(kappa_columns(a, b).mean(0)))
    if len(set(a) | set(b)) == 1: assert np.isnan(mine)
    else:
        assert mine == pytest.approx(cohen_kappa_score(a, b, weights="quadratic", labels=range(5)), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=3, max_size=25), st.integers(0, 2 ** 20))
def test_coefficients_do_not_depend_on_the_order_of_images_or_raters(table, seed):
    table, rng = np.array(table, float), np.random.default_rng(seed)
    other = table[rng.permutation(len(table))][:, rng.permutation(3)]
    for columns, value in ((lambda t: alpha_columns(t, 5), lambda m: alpha_value(m, len(table))),
            (lambda t: ac2_columns(t, 5), ac2_value)):
        assert np.allclose(value(columns(table).mean(0)), value(columns(other).mean(0)), equal_nan=True)


def test_perfect_agreement_is_one_and_the_same_grade_for_all_is_undefined():
    same = np.repeat(TABLE[:, :1], 3, 1)
    found = rater_agreement(pd.DataFrame(same), 5, np.arange(24), FEW)
    assert [found[k]["value"] for k in ("kappa", "icc", "alpha", "ac2")] == pytest.approx([1] * 4)
    flat = rater_agreement(pd.DataFrame(np.full((6, 2), 2.)), 5, np.arange(6), FEW)
    assert [flat[k]["value"] for k in ("kappa", "icc", "alpha")] == [None] * 3 and flat["ac2"]["value"] == 1


def test_intervals_hold_the_value_and_are_drawn_over_samples():
    table = pd.DataFrame(np.repeat(TABLE[:8], 10, 0) % 5)
    by_crop = rater_agreement(table, 5, np.arange(80), FEW)["alpha"]
    by_sample = rater_agreement(table, 5, np.arange(80) // 10, FEW)["alpha"]
    assert by_crop["low"] <= by_crop["value"] <= by_crop["high"]
    assert by_sample["high"] - by_sample["low"] > by_crop["high"] - by_crop["low"]


def test_a_study_gives_what_json_holds():
    frame = pd.concat([rows(gappy()), rows(TABLE.mean(1, keepdims=True).round(), raters=[MODEL])])
    found = json.loads(json.dumps(agreement(frame, [GRADE], FEW), allow_nan=False))
    assert found["raters"] == ["a", "b", "c", "model"] and found["measures"]["grade"]["n"] == 23
    assert {(p["a"], p["b"]) for p in found["pairs"]} == {("a", "b"), ("a", "c"), ("a", MODEL), ("b", "c"),
        ("b", MODEL), ("c", MODEL)}
    people = np.array(found["confusion"]["grade"]["people"])
    assert (people == people.T).all() and people.sum() == 2 * (18 + 18 + 23)
    assert np.sum(found["confusion"]["grade"]["model"]) == 19 + 23 + 23


@pytest.mark.parametrize("frame", [rows(TABLE)[:0], rows(TABLE[:, :1], raters="a"), rows(TABLE[:1])],
    ids=["nobody", "one person", "one image"])
def test_a_study_that_has_hardly_begun_is_no_error(frame):
    found = agreement(frame, PRESETS["pancreas"] + (GRADE,), FEW)
    assert found["measures"]["grade"]["kappa"]["value"] is None and found["pairs"] == []
    json.dumps(found, allow_nan=False)


def test_two_scores_of_one_rater_are_refused():
    with pytest.raises(BadInput, match="two scores for one image"): rating_table(pd.concat([rows(TABLE)] * 2), GRADE)


def test_quarter_steps_make_their_own_scale():
    quarter = PRESETS["pancreas_quarter"][1]
    table, _ = rating_table(rows(np.array([[0, 3], [.25, .5]]), "atrophy", "ab"), quarter)
    assert table.to_numpy().tolist() == [[0, 12], [1, 2]]
    assert confusion(table.a, table.b, len(quarter.scores()))[0, 12] == 1


def test_the_image_that_splits_most_comes_first():
    found = most_split(rows(TABLE), [GRADE], 3)
    assert found[0]["spread"] == .5 and [f["spread"] for f in found] == sorted((f["spread"] for f in found))[::-1]
    assert len({f["image"] for f in found}) == 3


def test_the_pull_is_zero_where_the_draft_pulls_nobody():
    rng, n = np.random.default_rng(1), 400
    base = dict(image=np.arange(n), group=np.arange(n) // 8, measure="grade")
    truth, draft, seen = rng.integers(0, 5, n), rng.integers(0, 5, n), rng.random(n) < .5
    frame = pd.concat([pd.DataFrame(base | dict(rater="a", value=truth, draft_visible=seen)),
        pd.DataFrame(base | dict(rater=MODEL, value=draft, draft_visible=False))])
    pull = draft_pull(frame, [GRADE], Bootstrap(200))
    assert pull["pull"]["low"] < 0 < pull["pull"]["high"] and pull["n_seen"] + pull["n_blind"] == n


def test_values_between_grades_are_brought_to_the_scale():
    assert on_scale([-3, .4, 2.6, 7], GRADE).tolist() == [0, 0, 3, 4]
    assert judge_measure([.4, 3.8], [0, 4], GRADE, bootstrap=FEW)["kappa"]["value"] == 1


def test_the_baseline_never_sees_the_crop_that_it_scores():
    true = np.array([[0.], [4], [2], [2]])
    assert leave_one_out_mean(true, list("aabc")).ravel().tolist() == [4, 0, 2, 2]
    changed = true.copy()
    changed[0] = 3
    assert leave_one_out_mean(changed, list("aabc"))[0] == leave_one_out_mean(true, list("aabc"))[0]


def test_the_published_scores_are_one_score():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 5, 300)
    four = np.stack([one] * 4, 1)
    four[:2, 1] = 4 - four[:2, 1]
    assert degeneracy(four, PRESETS["pancreas"])["one_score"]
    assert not degeneracy(rng.integers(0, 5, (300, 4)), PRESETS["pancreas"])["one_score"]


def test_mean_kappa_counts_an_undefined_measure_as_chance():
    true = np.array([[0, 1], [4, 1], [2, 1], [0, 1]])
    assert mean_kappa(true, true, (GRADE, Measure("flat")), bootstrap=FEW)["value"] == .5


def test_icc_ignores_images_with_gaps():
    table = TABLE.copy()
    table[0, 0] = np.nan
    assert intraclass_correlation(table, bootstrap=FEW)["value"] == intraclass_correlation(TABLE[1:],
        bootstrap=FEW)["value"]

"What the metrics notebook cannot say about itself: odd shapes and types, both engines, faults of run folders."
import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, rankdata, spearmanr

from histokit.learn.ladder import format_ladder, ladder, show_ladder, split_gap, split_rungs
from histokit.learn.scores import MeanSpearman, _tensor_ranks, bootstrap_interval, bootstrap_means, mean_spearman, pearson_columns, pearson_rows_score, row_ranks, spearman_columns, spearman_rows
from histokit.spots.ladder import contributions, held_out_constants, standard_rungs, swaps, top_k_agreement
from histokit.spots.results import compare_predictions, compare_runs, compare_types, differing_parameters, format_comparison, read_run
from histokit.core.text import BadInput
from histokit.core.files import write_json, write_table

rng = np.random.default_rng(0)


def tables(n, t, values=6):
    return rng.integers(0, values, (n, t)).astype(float), rng.random((n, t))


@pytest.mark.parametrize("shape", [(1, 2), (7, 35), (3, 5000), (1001, 35), (40, 1)])
def test_ranks_of_both_engines(shape):
    "Ties, signed zeros, infinite spread and one column: as scipy ranks them."
    for x in (rng.integers(0, 4, shape) - 2., rng.standard_normal(shape) * 10. ** rng.integers(-300, 300, shape), np.zeros(shape) * rng.choice([-1, 1], shape)):
        for ranks in (row_ranks(x), row_ranks(torch.tensor(x)), _tensor_ranks(torch.tensor(x))): np.testing.assert_array_equal(ranks, rankdata(x, axis=1))
    assert row_ranks(np.asfortranarray(x)[::-1]).shape == shape


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.uint8, torch.float16, torch.bfloat16, torch.int32, pd.DataFrame])
def test_any_kind_of_table(kind):
    pred, true = tables(20, 9, 40)
    as_kind = (lambda v: torch.tensor(v).to(kind)) if isinstance(kind, torch.dtype) else pd.DataFrame if kind is pd.DataFrame else lambda v: v.astype(kind)
    out = spearman_rows(as_kind(pred), true)
    assert isinstance(out, torch.Tensor) == isinstance(kind, torch.dtype)
    np.testing.assert_allclose(out, [spearmanr(p, t).statistic for p, t in zip(pred, true)], atol=1e-12)


@pytest.mark.parametrize("n", [1, 467, 468, 469, 1500])
def test_pieces_do_not_show(n):
    "The processor scores rows in pieces; the result is that of every row alone."
    pred, true = tables(n, 35)
    for score in (spearman_rows, pearson_rows_score):
        whole = score(pred, true)
        np.testing.assert_array_equal(whole, np.concatenate([score(pred[i:i + 1], true[i:i + 1]) for i in range(n)]))
        np.testing.assert_allclose(score(torch.tensor(pred), torch.tensor(true)), whole, atol=1e-14)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_stays_on_the_gpu():
    pred, true = tables(3000, 35)
    on = [torch.tensor(v, device="cuda") for v in (pred, true)]
    for score in (spearman_rows, spearman_columns, pearson_columns, pearson_rows_score, top_k_agreement):
        assert score(*on).is_cuda
        np.testing.assert_allclose(score(*on).cpu(), score(pred, true), atol=1e-12)
    assert MeanSpearman().update(*on).total.is_cuda and contributions(*on).equals(contributions(pred, true))
    with pytest.raises(BadInput, match="one device"): spearman_rows(on[0], torch.tensor(true))


def test_wide_rows_keep_precision():
    pred, true = tables(3, 20_000, 50)
    np.testing.assert_allclose(spearman_rows(torch.tensor(pred), torch.tensor(true)), [spearmanr(p, t).statistic for p, t in zip(pred, true)], atol=1e-10)


def test_pearson_is_steady():
    "Large offsets, tiny scales, and constants that only rounding makes uneven."
    a, b = rng.random((4, 30)), rng.random((4, 30))
    want = [pearsonr(x, y).statistic for x, y in zip(a, b)]
    for scale, offset, eps in ((1, 0, 1e-13), (1e-200, 0, 1e-12), (1e150, 0, 1e-12), (1, 1e6, 1e-8)):
        np.testing.assert_allclose(pearson_rows_score(a * scale + offset, b), want, atol=eps)
    assert pearson_columns(np.full((9, 2), .1), rng.random((9, 2))).tolist() == [0, 0]


def test_constant_rows_are_zero_and_gradients_are_dropped():
    x = torch.ones(2, 5, requires_grad=True)
    assert spearman_rows(x, torch.rand(2, 5)).tolist() == [0, 0] and not spearman_rows(x, x).requires_grad
    assert spearman_columns([[1, 2]], [[1, 2]]).tolist() == [0, 0]


ONE = np.ones((1, 2))
BAD = [(np.ones((2, 3)), np.ones((3, 2)), "must be equal"), (np.ones(3), np.ones(3), "tables"), (np.ones((2, 0)), np.ones((2, 0)), "tables"),
    (ONE * np.inf, ONE, "not finite"), (torch.tensor(ONE * np.nan), ONE, "not finite"), (torch.ones(1, 2), torch.ones(1, 2, device="meta"), "one device")]


@pytest.mark.parametrize("pred, true, message", BAD)
def test_refusals(pred, true, message):
    for score in (spearman_rows, spearman_columns, pearson_columns, top_k_agreement):
        with pytest.raises(BadInput, match=message): score(pred, true)


def test_no_rows():
    assert spearman_rows(np.ones((0, 3)), np.ones((0, 3))).shape == (0,)
    with pytest.raises(BadInput, match="no rows"): mean_spearman(np.ones((0, 3)), np.ones((0, 3)))
    with pytest.raises(BadInput, match="update"): MeanSpearman().compute()


@pytest.mark.parametrize("cuts", [(1, 2, 3), (50,), (99,), ()])
def test_batches_of_any_size(cuts):
    pred, true = tables(100, 12)
    parts = list(zip(np.split(pred, cuts), np.split(true, cuts)))
    fed, added = MeanSpearman(), sum((MeanSpearman().update(*p) for p in parts), MeanSpearman())
    for p, t in parts: fed.update(torch.tensor(p), torch.tensor(t))
    assert fed.compute() == pytest.approx(mean_spearman(pred, true), abs=1e-12) == added.compute()
    assert (fed.count, added.count) == (100, 100)


def test_top_k_is_fair_to_ties():
    "No order of columns helps; a table without ties is counted plainly."
    pred, true = tables(200, 10, 3)
    mixed = rng.permutation(10)
    np.testing.assert_allclose(top_k_agreement(pred, true, 4), top_k_agreement(pred[:, mixed], true[:, mixed], 4))
    assert top_k_agreement(np.zeros((1, 10)), true[:1], 4) == pytest.approx(.4)           # no opinion finds what chance would
    plain = rng.random((200, 10))
    want = [len(set(np.argsort(p)[-4:]) & set(np.argsort(t)[-4:])) / 4 for p, t in zip(plain, true)]
    np.testing.assert_allclose(top_k_agreement(plain, true, 4), want)
    np.testing.assert_allclose(top_k_agreement(torch.tensor(plain), torch.tensor(true), 4), want)


def test_contributions_and_swaps_add_up():
    pred, true = tables(60, 11)
    pred[0], true[1] = 1, 2                                            # rows without order
    table = contributions(pred, true)
    assert table.score.sum() == pytest.approx(mean_spearman(pred, true)) and table.lost.sum() == pytest.approx(1 - mean_spearman(pred, true))
    assert (table.lost > -1e-15).all()
    a, b = (rankdata(v, axis=1) - 6 for v in (pred, true))
    size = (b ** 2).sum(1)
    pairs = swaps(pred, true)
    want = np.where(size > 0, 1 - (a * b).sum(1) / np.maximum(size, 1), 0)          # 1 - rho |a| / |b|, ties included; no pair in a constant truth
    assert pairs.lost.sum() == pytest.approx(want.mean()) and len(pairs) == 55
    for r in pairs.itertuples():
        apart, sign = b[:, r.high] - b[:, r.low], np.sign(pred[:, r.high] - pred[:, r.low])
        assert r.lost == pytest.approx(np.mean(abs(apart) * (1 - sign * np.sign(apart)) / 2 / np.maximum(size, 1)))


def test_bootstrap_units():
    "Slides decide where there are several, else blocks; one unit alone has no interval; names of groups do not matter."
    v, group, block = rng.random(90), np.repeat(["a", "b", "c"], 30), np.tile(np.repeat(range(5), 6), 3)
    for same in (pd.Series(group).astype("category"), np.repeat([0, 1, 2], 30)):
        assert bootstrap_interval(v, group, block) == bootstrap_interval(v, same, block)
    assert bootstrap_means(v, group, block)[1] == 3 and bootstrap_means(v, None, block)[1] == 5 and bootstrap_means(v)[1] == 90
    assert np.isnan(bootstrap_interval(v, np.zeros(90), np.zeros(90))).all()
    low, high = bootstrap_interval(np.stack([v, v + 1], 1), group, block)
    assert low == pytest.approx([low[0], low[0] + 1]) and (low < high).all()
    with pytest.raises(BadInput, match="finite"): bootstrap_interval([1, np.nan])


def test_paired_difference_is_sharper_and_symmetric():
    true = rng.random((200, 20)); slide = np.repeat(range(4), 50)
    easy = rng.normal(0, .5, 4)[slide][:, None] + 1
    a, b = true + easy * rng.random((200, 20)), true + .8 * easy * rng.random((200, 20))
    ab, ba = compare_predictions(a, b, true, slide), compare_predictions(b, a, true, slide)
    assert ab["difference"] == pytest.approx(-ba["difference"]) and ab["low"] == pytest.approx(-ba["high"]) and ab["above"] == pytest.approx(1 - ba["above"])
    assert compare_predictions(torch.tensor(a), torch.tensor(b), torch.tensor(true), slide) == pytest.approx(ab)
    assert compare_predictions(a, a, true, slide)["above"] == .5
    types = compare_types(a, b, true, list("abcdefghijklmnopqrst"), slide)
    assert types.difference.sum() == pytest.approx(ab["difference"]) and types.difference.is_monotonic_decreasing


def test_random_split_is_never_shown_as_honest():
    true = rng.random((40, 5)); fold = np.repeat([0, 1], 20)
    table = ladder(standard_rungs(true, fold) | split_rungs(true + .5 * rng.random((40, 5)), true), true, fold)
    assert split_gap(table)["this model"] == pytest.approx(1 - table.set_index("name").per_spot["this model"])
    assert np.isnan(table.skill.iloc[-1]) and np.isfinite(table.skill.iloc[-2])
    text = format_ladder(table).splitlines()
    assert [line.split("  ")[0] for line in text if " *" in line] == ["random split: this model *"] and text[-1].startswith("* trained on neighbours")
    faces = show_ladder(table).axes[0].collections[1].get_facecolors()
    assert (faces[-1][:3] == 1).all() and not (faces[0][:3] == 1).all()
    with pytest.raises(BadInput, match="one fold"): held_out_constants(true, np.zeros(40))


# --- run folders

TRUE = rng.random((60, 4))


def fake_run(folder, pred, fold=None, true=TRUE, targets=("C1", "C2", "C3", "C4"), **parameters):
    spots = pd.DataFrame(dict(slide=np.repeat(["S_1", "S_2", "S_3"], 20), ID=np.tile(range(20), 3), x=rng.integers(0, 99, 60), y=range(60)))
    spots["fold"] = np.repeat([0, 1, 2], 20) if fold is None else fold
    test = spots.head(5).assign(slide="S_4", split="Test")
    write_table(folder/"spots.parquet", pd.concat([spots.assign(split="Train", **dict(zip(targets, true.T))), test]))
    oof = pd.concat([spots, pd.DataFrame(pred, columns=list(targets))], axis=1)
    write_table(folder/"oof.parquet", oof.sample(frac=1, random_state=0))             # order does not matter
    write_json(folder/"run.json", dict(recipe="r", parameters=dict(run_dir=str(folder), data_path=str(folder), seed=0, **parameters)))
    return folder


def blocks(spots): return spots.y.to_numpy() // 5


def test_compare_runs(tmp_path):
    a, b = TRUE + rng.random((60, 4)), TRUE + .5 * rng.random((60, 4))
    folders = [fake_run(tmp_path/"a", a, epochs=1), fake_run(tmp_path/"b", b, epochs=2, loss="mse"), fake_run(tmp_path/"c", b, np.tile([0, 1], 30), epochs=1)]
    rungs = {"this model": .5, "+ smoothing": .6, "random split: this model": .75}
    write_json(folders[1]/"metrics.json", dict(oof=[dict(name=n, per_spot=v) for n, v in rungs.items()]))
    (folders[2]/"run.json").unlink()
    table, fig = compare_runs(folders, blocks, n=200)
    assert table.run.tolist() == ["a", "b", "c"] and table.split.tolist() == ["slides", "slides", "spots"]
    assert table.per_spot.tolist() == pytest.approx([mean_spearman(p, TRUE) for p in (a, b, b)])
    assert table.difference[1] == pytest.approx(table.per_spot[1] - table.per_spot[0]) and table.diff_low[1] <= table.difference[1] <= table.diff_high[1]
    assert (table.final[1], table.gap[1]) == (.6, .25) and np.isnan(table.final[0]) and np.isnan(table.skill[2])
    assert table.parameters.tolist() == [dict(epochs=1, loss=None), dict(epochs=2, loss="mse"), None]
    text = format_comparison(table)
    assert "c *" in text and "no parameters recorded" in text and "loss=mse" in text and "validated on spots of slides" in text
    assert len(fig.axes) == 2 and json.dumps(differing_parameters([read_run(f) for f in folders]))


def test_same_name_and_order_of_targets(tmp_path):
    a = fake_run(tmp_path/"x"/"run", TRUE); b = fake_run(tmp_path/"y"/"run", TRUE[:, ::-1], true=TRUE[:, ::-1], targets=("C4", "C3", "C2", "C1"))
    table, _ = compare_runs([a, b], blocks, n=50)
    assert table.run.tolist() == [str(a), str(b)] and table.per_spot.tolist() == [1, 1]


FAULTS = {"slide": "different slides", "spot": "different spots", "rows": "training spots", "oof": "run its stage 03_train first", "broken": "not readable",
    "column": "do not belong together", "alone": "two or more"}
OTHER_DATA = [(dict(targets=("C1", "C2", "C3", "X")), "different targets .C4, X"), (dict(true=TRUE + .01), "different true values")]


@pytest.mark.parametrize("change, message", [*OTHER_DATA, *FAULTS.items()])
def test_runs_refused(tmp_path, change, message):
    a, b = fake_run(tmp_path/"a", TRUE), fake_run(tmp_path/"b", TRUE, **(change if isinstance(change, dict) else {}))
    both = [b/"oof.parquet", b/"spots.parquet"]
    if change == "slide":
        for f in both: write_table(f, pd.read_parquet(f).replace(dict(slide={"S_3": "S_9"})))
    if change == "spot":
        for f in both: write_table(f, pd.read_parquet(f).query("not (slide == 'S_3' and ID == 19)"))
    if change == "rows": write_table(both[0], pd.read_parquet(both[0]).iloc[1:])
    if change == "oof": both[0].unlink()
    if change == "broken": both[0].write_bytes(b"PAR1 and no more")
    if change == "column": write_table(both[0], pd.read_parquet(both[0]).drop(columns="fold"))
    with pytest.raises(BadInput, match=message) as e: compare_runs([a] if change == "alone" else [a, b], blocks, n=20)
    assert "\n" not in str(e.value)

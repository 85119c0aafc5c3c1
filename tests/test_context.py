"What the pages on context and on slide priors cannot say about themselves: odd lattices, lone spots, saved heads."
import numpy as np
import pandas as pd
import pytest
import torch

from histokit.core.text import BadInput
from histokit.learn.networks import check_param_groups, param_groups
from histokit.learn.scores import mean_spearman
from histokit.spots.context import (AROUND, ContextDataset, ContextHead, context_answer, fit_context, load_context,
    train_context, turn_offsets)
from histokit.spots.check_run import check_split_honesty
from histokit.spots.lattice import neighbour_table
from histokit.spots.network import save_model
from histokit.spots.slide_prior import SlideBags, SlidePrior, choose_prior_weight, fit_prior, slide_means, with_prior
from histokit.spots.splits import assign_folds, check_split, fold_rows, inner_split, resolve_split, spatial_blocks


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def lattice(rows=10, columns=12, square=False):
    "Positions 37 px apart."
    r, c = np.divmod(np.arange(rows * columns), columns)
    shift, height = (0, 1) if square else (r % 2 / 2, np.sqrt(3) / 2)
    return np.column_stack([c + shift, r * height]) * 37.


def some(n, width=8, k=6, seed=0):
    "Features, neighbours, offsets and mask of spots, of which the first is alone."
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=g) < .7
    mask[0] = False
    return (torch.randn(n, width, generator=g), torch.randn(n, k, width, generator=g),
        torch.randn(n, k, 2, generator=g), mask)


def test_neighbours_of_every_slide_are_its_own():
    "Slides that lie on top of each other, of unequal pitch, shuffled: found as if each were alone."
    xy, slide = np.concatenate([lattice(), lattice() * 2.5]), np.repeat(["a", "b"], 120)
    order = np.random.default_rng(0).permutation(240)
    xy, slide = xy[order], slide[order]
    table = neighbour_table(xy, slide)
    assert (slide[table.index] == slide[:, None]).all()
    assert (table.mask.sum(1) == 6).sum() == 2 * 8 * 10
    assert np.allclose(np.linalg.norm(table.offset[table.mask], axis=1), 1, atol=1e-5)
    alone = neighbour_table(lattice(), np.zeros(120))
    assert np.array_equal(np.sort(table.mask.sum(1)), np.sort(np.tile(alone.mask.sum(1), 2)))
    pitch = np.where(slide == "a", 37., 92.5)[:, None]
    assert np.allclose(xy + table.offset[:, 0] * pitch, xy[table.index[:, 0]], atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_spots(n):
    "Spots in a row have a neighbour on each side; an empty place holds the spot itself."
    table = neighbour_table(lattice()[:n], ["s"] * n)
    assert table.mask.sum(1).tolist() == [(i > 0) + (i < n - 1) for i in range(n)]
    itself = np.repeat(np.arange(n), 6).reshape(n, 6)
    assert (table.index[~table.mask] == itself[~table.mask]).all()
    assert not table.offset[~table.mask].any()


def test_odd_places():
    assert (neighbour_table(lattice(square=True), np.zeros(120), 8).mask.sum(1) == 8).sum() == 8 * 10
    twice = neighbour_table(np.concatenate([lattice(), lattice()[:1]]), np.zeros(121))      # two spots at one place
    itself = np.repeat(np.arange(121), 6).reshape(121, 6)
    assert (twice.index[twice.mask] != itself[twice.mask]).all()
    assert np.isfinite(twice.offset).all()
    far = neighbour_table([[0, 0], [1, 0], [500, 0]], ["s"] * 3, 2, 0)
    assert far.mask.all()                                                                   # 0 asks for no distance


@pytest.mark.parametrize("xy, slide", [
    ([[0., 0.]], ["a", "b"]),
    ([[np.nan, 0.]], ["a"]),
    ([[0., 0., 0.]], ["a"])])
def test_places_that_are_none(xy, slide):
    with pytest.raises(BadInput): neighbour_table(xy, slide)


def plain_and_context(around, x):
    "A head without neighbours and one with them, the rest of their weights the same."
    torch.manual_seed(1)
    head, plain = (ContextHead(x.mean(0), x.std(0), 3, kind, dropout=0.) for kind in (around, "none"))
    plain.head.load_state_dict(head.head.state_dict())
    return plain, head


@pytest.mark.parametrize("around", ["mean", "attention"])
def test_starts_as_the_plain_head_and_trains_whole(around):
    "The same answer to the bit; then every parameter has a slope, and a lone spot stays finite."
    x, near, offset, mask = some(6)
    plain, head = plain_and_context(around, x)
    assert torch.equal(head(x, near, offset, mask), plain(x))
    torch.nn.init.normal_(head.around.out.weight, std=.1)
    out = head(x, near, offset, mask)
    out.square().sum().backward()
    grads = [p.grad for p in head.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    assert out.isfinite().all()
    assert not torch.allclose(out[1:], plain(x)[1:])
    check_param_groups(head, param_groups(head))


@pytest.mark.parametrize("around", ["mean", "attention"])
def test_order_and_masked_neighbours_do_not_matter(around):
    x, near, offset, mask = inputs = some(6)
    head = plain_and_context(around, x)[1]
    torch.nn.init.normal_(head.around.out.weight, std=.1)
    out = head(*inputs)
    order, empty = torch.randperm(6), ~mask[..., None]
    assert torch.allclose(head(x, near[:, order], offset[:, order], mask[:, order]), out, atol=1e-5)
    filled = head(x, near.masked_fill(empty, 1e3), offset.masked_fill(empty, 9.), mask)
    assert torch.allclose(filled, out, atol=1e-5)
    one_by_one = torch.cat([head(*(v[i:i + 1] for v in inputs)) for i in range(6)])
    assert torch.allclose(one_by_one, out, atol=1e-5)


@pytest.mark.parametrize("around", list(AROUND))
@pytest.mark.parametrize("fusion", ["none", "product", "concat"])
def test_save_and_load(tmp_path, around, fusion):
    x, *others = (*some(5), torch.rand(5, 2))
    kw = dict(head="mlp", fusion=fusion, hidden="8", inner=16)
    head = ContextHead(x.mean(0), x.std(0), 3, around, **kw).eval()
    for p in head.parameters(): torch.nn.init.normal_(p, std=.2)
    again = load_context(save_model(head, tmp_path))
    assert torch.equal(again(x, *others), head(x, *others))
    assert again.config == head.config


@pytest.mark.parametrize("kw, message", [
    (dict(around="neighbors"), "unknown around"), (dict(fusion="add"), "unknown fusion"),
    (dict(head="deep"), "unknown head"), (dict(inner=30), "multiple of heads")])
def test_bad_settings(kw, message):
    with pytest.raises(BadInput, match=message): ContextHead(torch.zeros(8), torch.ones(8), 3, **kw)


def test_another_kind_of_model_in_the_folder(tmp_path):
    (tmp_path/"config.json").write_text('{"model": {"backbone": "resnet18"}}')
    with pytest.raises(BadInput, match="holds no head"): load_context(tmp_path)


@pytest.mark.parametrize("shape, kw, message", [((119, 4), {}, "same spots"), ((2, 120, 4), {}, "say in views"),
    ((120, 4), dict(target=np.zeros((9, 2))), "differ in their number")])
def test_data_that_do_not_fit(shape, kw, message):
    table = neighbour_table(lattice(), np.zeros(120))
    with pytest.raises(BadInput, match=message): ContextDataset(np.zeros(shape), table, **kw)


def test_eight_views_make_eight_arrangements():
    "Turning keeps distances; two mirrorings are none."
    offset = np.random.default_rng(0).normal(size=(3, 6, 2))
    seen = np.stack([turn_offsets(offset, np.full(3, v)) for v in range(8)])
    assert np.allclose(np.linalg.norm(seen, axis=-1), np.linalg.norm(offset, axis=-1))
    assert len(np.unique(seen.round(6), axis=0)) == 8
    assert np.allclose(turn_offsets(turn_offsets(offset, [4] * 3), [4] * 3), offset)
    assert np.array_equal(turn_offsets(offset, [0, 3, 4])[0], offset[0])


def test_views_turn_the_neighbourhood():
    "In each view a spot's neighbours are seen, and lie, as in that view of the picture."
    table = neighbour_table(lattice(), np.zeros(120))
    features = np.random.default_rng(1).normal(size=(2, 120, 4)).astype(np.float32)
    nothing = np.zeros((120, 2))
    data = ContextDataset(features, table, nothing, nothing, range(50), views=(0, 6)).epoch(5)
    inputs, target = data.batch(range(50))
    assert set(data.view) == {0, 1} and target.shape == (50, 2)
    for i, v in enumerate(data.view):
        assert np.array_equal(inputs["features"][i], features[v, i])
        assert np.array_equal(inputs["neighbours"][i], features[v, table.index[i]])
        assert np.allclose(inputs["offsets"][i], turn_offsets(table.offset[i][None], [(0, 6)[v]])[0])
    assert torch.equal(data[7][0]["neighbours"], inputs["neighbours"][7])


def neighbours_task():
    "Three slides whose targets are the means of the neighbours' features."
    rng = np.random.default_rng(0)
    xy, slide = np.concatenate([lattice(12, 12)] * 3), np.repeat(list("abc"), 144)
    table, features = neighbour_table(xy, slide), rng.normal(size=(432, 6)).astype(np.float32)
    total = (features[table.index, :4] * table.mask[..., None]).sum(1)
    return ContextDataset(features, table, total / table.mask.sum(1, keepdims=True)), slide


def test_learns_what_only_neighbours_know():
    data, slide = neighbours_task()
    old, new = np.flatnonzero(slide != "c"), np.flatnonzero(slide == "c")
    score, true = {}, data.target[new].numpy()
    for around in AROUND:
        model = train_context(data.at(old), 40, 1e-2, dropout=0., around=around, device="cpu")
        score[around] = mean_spearman(context_answer(data.at(new), model), true)
    assert score["none"] < .3 and score["mean"] > .7 and score["attention"] > .6


def test_the_kind_of_head_is_chosen_on_left_out_slides():
    data, slide = neighbours_task()
    old, new = np.flatnonzero(slide != "c"), np.flatnonzero(slide == "c")
    settings = dict(epochs=10, lr=1e-2, dropout=0., device="cpu")
    fit = fit_context(data.at(old), slide[old], mean_spearman, ("none", "mean"), **settings)
    assert fit.chosen["around"] == "mean" and fit.inner.shape == (288, 4)
    assert mean_spearman(fit.predict(data.at(new)), data.target[new].numpy()) > .5


def test_answer_is_the_mean_over_views_whatever_the_batch():
    table = neighbour_table(lattice(), np.zeros(120))
    features = np.random.default_rng(1).normal(size=(4, 120, 5)).astype(np.float32)
    head = ContextHead(np.zeros(5), np.ones(5), 3).eval()
    torch.nn.init.normal_(head.around.out.weight)
    data = ContextDataset(features, table)
    whole = context_answer(data, head)
    assert np.allclose(whole, context_answer(data, head, 7), atol=1e-5)
    flips = [ContextDataset(features[v], table, views=[code]) for v, code in enumerate((0, 4, 6, 2))]
    assert np.allclose(whole, np.mean([context_answer(d, head) for d in flips], 0), atol=1e-5)


@pytest.fixture(scope="module")
def slides():
    "Ten slides whose trait shifts features and targets."
    rng = np.random.default_rng(0)
    trait, slide = rng.normal(size=(10, 2)), np.repeat([f"s{i}" for i in range(10)], 40)
    of_spots = np.repeat(trait, 40, 0)
    x = rng.normal(size=(400, 12)) + 2 * of_spots @ rng.normal(size=(2, 12))
    y = of_spots @ rng.normal(size=(2, 8)) + .5 * rng.normal(size=(400, 8))
    return x.astype(np.float32), y, slide


ATTENTION = dict(epochs=8, lr=1e-2, dropout=0., bag=32, device="cpu")


@pytest.mark.parametrize("how, kw", [("ridge", {}), ("attention", ATTENTION)])
def test_prior_learns_slides(slides, how, kw):
    x, y, slide = slides
    fit, own = fit_prior(x, y, slide, mean_spearman, how, **kw), slide_means(y, slide)[1]
    others = (own.sum(0) - own) / (len(own) - 1)
    assert mean_spearman(fit.inner, own) > mean_spearman(others, own) + .2
    assert fit.predict([x[slide == "s1"], x[slide == "s2"][:5]]).shape == (2, 8)


def test_a_prior_of_an_unknown_kind(slides):
    with pytest.raises(BadInput, match="unknown how"): fit_prior(*slides, mean_spearman, "boost")


def test_prior_of_a_slide_has_not_seen_it(slides):
    "What is guessed of a left-out slide does not change with its targets."
    x, y, slide = slides
    other, mine = y.copy(), slide == "s3"
    other[mine] = other[mine][:, ::-1]
    a, b = (fit_prior(x, v, slide, mean_spearman, penalties=(10.,)).inner for v in (y, other))
    assert np.allclose(a[3], b[3]) and not np.allclose(a[4], b[4])


def test_pooling(slides):
    "The order of patches does not matter, and the weights add up."
    x, _, _ = slides
    model, patches = SlidePrior(x.mean(0), x.std(0), 8).eval(), torch.from_numpy(x[:50])[None]
    assert torch.allclose(model(patches), model(patches[:, torch.randperm(50)]), atol=1e-5)
    assert torch.allclose(model.weights(patches).sum(1), torch.ones(1))


def test_bags_follow_from_the_seed_alone(slides):
    bags = SlideBags(*slides, 16, draws=3)
    assert len(bags) == 30
    first = [next(iter(bags.batches(10, True, seed))) for seed in (5, 5, 6)]
    (a, za), (b, zb), (c, _) = first
    assert a["features"].shape == (10, 16, 12)
    assert torch.equal(a["features"], b["features"]) and torch.equal(za, zb)
    assert not torch.equal(a["features"], c["features"])


def test_a_bag_is_of_its_slide(slides):
    x, y, slide = slides
    inputs, target = SlideBags(x, y, slide, 16, draws=3)[14]
    own = torch.from_numpy(x[slide == "s4"])
    assert all((own == row).all(1).any() for row in inputs["features"])
    assert torch.allclose(target, torch.tensor(y[slide == "s4"].mean(0)).float())


def test_with_prior(slides):
    "Means move to the prior by the weight, differences between spots stay, whatever the order of the rows."
    _, y, slide = slides
    shuffled = np.random.default_rng(0).permutation(len(slide))
    y, slide = y[shuffled], slide[shuffled]
    own = slide_means(y, slide)[1]
    pred = y - own[np.unique(slide, return_inverse=True)[1]]
    assert np.array_equal(with_prior(pred, own, slide, 0.), pred)
    assert np.allclose(with_prior(pred, own, slide, 1.), y)
    half, mine = with_prior(pred, own, slide, .5), slide == "s1"
    assert np.allclose(half[mine] - half[mine][0], pred[mine] - pred[mine][0])
    with pytest.raises(BadInput, match="give one for each"): with_prior(pred, own[:2], slide, .5)


def test_weight_of_the_prior(slides):
    _, y, slide = slides
    own = slide_means(y, slide)[1]
    pred = y - own[np.unique(slide, return_inverse=True)[1]]
    assert choose_prior_weight(pred, own, slide, y, mean_spearman)[0] == 1
    assert choose_prior_weight(y, -own, slide, y, mean_spearman)[0] == 0


def test_means_of_what_was_measured(slides):
    _, y, slide = slides
    holes = y.copy()
    holes[slide == "s2", 3] = np.nan
    assert np.isnan(slide_means(holes, slide)[1]).sum() == 1


def of_slides(*sizes):
    "Training spots of slides at random places, some of them on one line."
    rng, parts = np.random.default_rng(len(sizes)), []
    for i, n in enumerate(sizes):
        xy = rng.uniform(0, 2000, (n, 2)) * ([1, 0] if i == 1 else [1, 1])
        parts.append(pd.DataFrame(dict(slide=f"S_{i}", patient=f"S_{i}", split="Train", x=xy[:, 0], y=xy[:, 1])))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("sizes", [(150,), (150, 90), (60, 50, 200)])
@pytest.mark.parametrize("folds", [2, 3, 4, 7])
def test_blocks_share_no_pixel(sizes, folds):
    "Every spot is held out once; what trains, what chooses and what is scored lie a patch apart."
    spots, side = of_slides(*sizes), 60
    spots["fold"] = assign_folds(spots, "blocks", folds)
    assert (spots.groupby("slide").fold.nunique() == folds).all()
    for k in range(folds):
        train, held = fold_rows(spots, k, side)
        check_split(spots.iloc[train], spots.iloc[held], side)
        three = inner_split(spots, k, side)
        for i, j in ((0, 1), (0, 2), (1, 2)): check_split(spots.iloc[three[i]], spots.iloc[three[j]], side)
        assert set(three[0]) | set(three[1]) <= set(train) and len(three[0]) and len(three[1])
    assert np.bincount(spots.fold).sum() == len(spots)


def test_the_checks_know_blocks():
    "With the buffer that training kept free, a split by blocks is a warning; without one it is a leak."
    spots = of_slides(150)
    fold = assign_folds(spots, "blocks")
    leak, = check_split_honesty(spots, fold, patch_px=80)
    kept, = check_split_honesty(spots, fold, patch_px=80, buffer=80)
    assert (leak.level, kept.level) == ("error", "warning") and "leak" in leak.what and "this slide" in kept.mend


@pytest.mark.parametrize("call, says", [
    (lambda: assign_folds(of_slides(5)), "has 5 spots for 4 blocks; use fewer folds"),
    (lambda: assign_folds(of_slides(50), "slide"), "use split=blocks"),
    (lambda: assign_folds(of_slides(50, 40).assign(patient="P"), "patient"), "use split=slide, or split=blocks"),
    (lambda: assign_folds(of_slides(50), "blocks", 1), "use 2 or more"),
    (lambda: inner_split(of_slides(50).assign(fold=spatial_blocks(lattice()[:50], 4)), 0, 9e9), "no spot to train")])
def test_blocks_that_cannot_be(call, says):
    with pytest.raises(BadInput, match=says): call()


def test_auto_divides_an_only_slide_and_no_other():
    assert [resolve_split(of_slides(*n)) for n in ((40,), (40, 40))] == ["blocks", "slide"]
    assert resolve_split(of_slides(40, 40, 40).assign(patient=list("aab") * 40)) == "patient"

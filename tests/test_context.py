"What the context notebook cannot say about itself: odd lattices, lone spots, views, saved heads, slides with nothing to tell."
import numpy as np
import pytest
import torch

from histokit.spots.context import AROUND, ContextDataset, ContextHead, context_answer, fit_context, load_context, train_context, turned
from histokit.spots.slide_prior import SlideBags, SlidePrior, choose_prior_weight, fit_prior, slide_means, with_prior
from histokit.spots.lattice import neighbour_table
from histokit.core.text import BadInput
from histokit.learn.scores import mean_spearman
from histokit.learn.networks import check_param_groups, param_groups
from histokit.spots.network import save_model


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def lattice(rows=10, columns=12, square=False):
    r, c = np.divmod(np.arange(rows * columns), columns)
    return np.column_stack([c + (0 if square else r % 2 / 2), r * (1 if square else np.sqrt(3) / 2)]) * 37.


def some(n, width=8, k=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=g) < .7; mask[0] = False
    return torch.randn(n, width, generator=g), torch.randn(n, k, width, generator=g), torch.randn(n, k, 2, generator=g), mask


def test_neighbours_of_every_slide_are_its_own():
    "Slides that lie on top of each other, of unequal pitch, shuffled: found as if each were alone."
    rng = np.random.default_rng(0); xy = np.concatenate([lattice(), lattice() * 2.5]); slide = np.repeat(["a", "b"], 120)
    order = rng.permutation(240); table = neighbour_table(xy[order], slide[order])
    assert (slide[order][table.index] == slide[order][:, None]).all()
    assert (table.mask.sum(1) == 6).sum() == 2 * 8 * 10 and np.allclose(np.linalg.norm(table.offset[table.mask], axis=1), 1, atol=1e-5)
    alone = neighbour_table(lattice(), np.zeros(120))
    assert np.array_equal(np.sort(table.mask.sum(1)), np.sort(np.tile(alone.mask.sum(1), 2)))
    back = xy[order] + table.offset[:, 0] * np.where(slide[order] == "a", 37., 92.5)[:, None]
    assert np.allclose(back, xy[order][table.index[:, 0]], atol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_spots(n):
    table = neighbour_table(lattice()[:n], ["s"] * n)
    assert table.mask.sum(1).tolist() == [min(i > 0, 1) + min(i < n - 1, 1) for i in range(n)]
    assert (table.index[~table.mask] == np.repeat(np.arange(n), 6).reshape(n, 6)[~table.mask]).all() and not table.offset[~table.mask].any()


def test_odd_places():
    assert (neighbour_table(lattice(square=True), np.zeros(120), 8).mask.sum(1) == 8).sum() == 8 * 10
    twice = neighbour_table(np.concatenate([lattice(), lattice()[:1]]), np.zeros(121))                 # two spots at one place
    assert (twice.index[twice.mask] != np.repeat(np.arange(121), 6).reshape(121, 6)[twice.mask]).all() and np.isfinite(twice.offset).all()
    far = neighbour_table([[0, 0], [1, 0], [500, 0]], ["s"] * 3, 2, 0)
    assert far.mask.all()                                                                              # 0 asks for no distance
    for xy, slide in (([[0., 0.]], ["a", "b"]), ([[np.nan, 0.]], ["a"]), ([[0., 0., 0.]], ["a"])):
        with pytest.raises(BadInput): neighbour_table(xy, slide)


@pytest.mark.parametrize("around", ["mean", "attention"])
def test_looking_around(around):
    "Starts as the plain head to the bit, has a slope everywhere, does not care for the order of neighbours nor for what is masked, and a lone spot stays finite."
    inputs = some(6); x, near, off, mask = inputs
    torch.manual_seed(1); head = ContextHead(x.mean(0), x.std(0), 3, around, dropout=0.)
    plain = ContextHead(x.mean(0), x.std(0), 3, "none", dropout=0.); plain.head.load_state_dict(head.head.state_dict())
    assert torch.equal(head(*inputs), plain(x))
    torch.nn.init.normal_(head.around.out.weight, std=.1)
    said = head(*inputs); said.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters()) and said.isfinite().all()
    assert not torch.allclose(said[1:], plain(x)[1:])
    order = torch.randperm(6)
    assert torch.allclose(head(x, near[:, order], off[:, order], mask[:, order]), said, atol=1e-5)
    assert torch.allclose(head(x, near.masked_fill(~mask[..., None], 1e3), off.masked_fill(~mask[..., None], 9.), mask), said, atol=1e-5)
    assert torch.allclose(torch.cat([head(*(v[i:i + 1] for v in inputs)) for i in range(6)]), said, atol=1e-5)
    check_param_groups(head, param_groups(head))


@pytest.mark.parametrize("around", list(AROUND))
@pytest.mark.parametrize("fusion", ["none", "product", "concat"])
def test_save_and_load(tmp_path, around, fusion):
    inputs = (*some(5), torch.rand(5, 2))
    head = ContextHead(inputs[0].mean(0), inputs[0].std(0), 3, around, "mlp", fusion, "8", inner=16).eval()
    for p in head.parameters(): torch.nn.init.normal_(p, std=.2)
    again = load_context(save_model(head, tmp_path))
    assert torch.equal(again(*inputs), head(*inputs)) and again.config == head.config


def test_bad_settings(tmp_path):
    x = torch.randn(4, 8)
    for kw, says in ((dict(around="neighbors"), "unknown around"), (dict(fusion="add"), "unknown fusion"), (dict(head="deep"), "unknown head"), (dict(inner=30), "multiple of heads")):
        with pytest.raises(BadInput, match=says): ContextHead(x.mean(0), x.std(0), 3, **kw)
    (tmp_path/"config.json").write_text('{"model": {"backbone": "resnet18"}}')
    with pytest.raises(BadInput, match="holds no head"): load_context(tmp_path)
    table = neighbour_table(lattice(), np.zeros(120))
    for features, kw, says in ((np.zeros((119, 4)), {}, "same spots"), (np.zeros((2, 120, 4)), {}, "say in views"), (np.zeros((120, 4)), dict(target=np.zeros((9, 2))), "differ in their number")):
        with pytest.raises(BadInput, match=says): ContextDataset(features, table, **kw)


def test_views_turn_the_neighbourhood():
    "A head on a view of the picture sees each neighbour where that view shows it; eight views make eight arrangements, and two mirrorings none."
    offset = np.random.default_rng(0).normal(size=(3, 6, 2))
    seen = np.stack([turned(offset, np.full(3, v)) for v in range(8)])
    assert np.allclose(np.linalg.norm(seen, axis=-1), np.linalg.norm(offset, axis=-1)) and len(np.unique(seen.round(6), axis=0)) == 8
    assert np.allclose(turned(turned(offset, [4] * 3), [4] * 3), offset) and np.array_equal(turned(offset, [0, 3, 4])[0], offset[0])
    table = neighbour_table(lattice(), np.zeros(120)); features = np.random.default_rng(1).normal(size=(2, 120, 4)).astype(np.float32)
    data = ContextDataset(features, table, np.zeros((120, 2)), np.zeros((120, 2)), rows=range(50), views=(0, 6)).epoch(5)
    inputs, target = data.batch(range(50))
    assert set(data.view) == {0, 1} and target.shape == (50, 2)
    for i, v in enumerate(data.view):
        assert np.array_equal(inputs["features"][i], features[v, i]) and np.array_equal(inputs["neighbours"][i], features[v, table.index[i]])
        assert np.allclose(inputs["offsets"][i], turned(table.offset[i][None], [(0, 6)[v]])[0])
    assert torch.equal(data[7][0]["neighbours"], inputs["neighbours"][7])


def test_learns_what_only_neighbours_know():
    rng = np.random.default_rng(0); xy, slide = np.concatenate([lattice(12, 12)] * 3), np.repeat(list("abc"), 144)
    table, features = neighbour_table(xy, slide), rng.normal(size=(432, 6)).astype(np.float32)
    y = (features[table.index, :4] * table.mask[..., None]).sum(1) / table.mask.sum(1, keepdims=True)
    old, new = np.flatnonzero(slide != "c"), np.flatnonzero(slide == "c")
    score = {}
    for around in AROUND:
        model = train_context(ContextDataset(features, table, y, rows=old), 40, 1e-2, dropout=0., around=around, device="cpu")
        score[around] = mean_spearman(context_answer(ContextDataset(features, table, rows=new), model), y[new])
    assert score["none"] < .3 and score["mean"] > .7 and score["attention"] > .6
    fit = fit_context(ContextDataset(features, table, y, rows=old), slide[old], mean_spearman, ("none", "mean"), 10, 1e-2, dropout=0., device="cpu")
    assert fit.chosen["around"] == "mean" and fit.inner.shape == (288, 4)
    assert mean_spearman(fit.predict(ContextDataset(features, table, rows=new)), y[new]) > .5


def test_answer_is_the_mean_over_views_whatever_the_batch():
    table = neighbour_table(lattice(), np.zeros(120)); features = np.random.default_rng(1).normal(size=(4, 120, 5)).astype(np.float32)
    head = ContextHead(np.zeros(5), np.ones(5), 3).eval(); torch.nn.init.normal_(head.around.out.weight)
    data = ContextDataset(features, table)
    whole = context_answer(data, head)
    assert np.allclose(whole, context_answer(data, head, 7), atol=1e-5)
    singles = [context_answer(ContextDataset(features[v], table, views=[c]), head) for v, c in enumerate((0, 4, 6, 2))]
    assert np.allclose(whole, np.mean(singles, 0), atol=1e-5)


@pytest.fixture(scope="module")
def slides():
    "Ten slides whose trait shifts features and targets."
    rng = np.random.default_rng(0); S, n = 10, 40; trait = rng.normal(size=(S, 2)); slide = np.repeat([f"s{i}" for i in range(S)], n)
    x = (rng.normal(size=(S * n, 12)) + 2 * np.repeat(trait, n, 0) @ rng.normal(size=(2, 12))).astype(np.float32)
    y = np.repeat(trait @ rng.normal(size=(2, 8)), n, 0) + .5 * rng.normal(size=(S * n, 8))
    return x, y, slide


@pytest.mark.parametrize("how, kw", [("ridge", {}), ("attention", dict(epochs=8, lr=1e-2, dropout=0., bag=32, device="cpu"))])
def test_prior_learns_slides(slides, how, kw):
    x, y, slide = slides
    fit = fit_prior(x, y, slide, mean_spearman, how, **kw)
    names, own = slide_means(y, slide); others = (own.sum(0) - own) / (len(own) - 1)
    assert mean_spearman(fit.inner, own) > mean_spearman(others, own) + .2
    assert fit.predict([x[slide == "s1"], x[slide == "s2"][:5]]).shape == (2, 8)
    with pytest.raises(BadInput, match="unknown how"): fit_prior(x, y, slide, mean_spearman, "boost")


def test_prior_of_a_slide_has_not_seen_it(slides):
    "What is said of a left-out slide does not change with its targets."
    x, y, slide = slides; other = y.copy(); other[slide == "s3"] = other[slide == "s3"][:, ::-1]
    a, b = (fit_prior(x, v, slide, mean_spearman, penalties=(10.,)).inner for v in (y, other))
    assert np.allclose(a[3], b[3]) and not np.allclose(a[4], b[4])


def test_pooling(slides):
    "The order of patches does not matter, the weights add up, and bags follow from the seed alone."
    x, y, slide = slides; model = SlidePrior(x.mean(0), x.std(0), 8).eval(); t = torch.from_numpy(x[:50])[None]
    assert torch.allclose(model(t), model(t[:, torch.randperm(50)]), atol=1e-5) and torch.allclose(model.weights(t).sum(1), torch.ones(1))
    bags = SlideBags(x, y, slide, 16, draws=3)
    assert len(bags) == 30
    (a, ya), (b, yb) = (next(iter(bags.batches(10, True, 5))) for _ in range(2))
    assert a["features"].shape == (10, 16, 12) and torch.equal(a["features"], b["features"]) and torch.equal(ya, yb)
    assert not torch.equal(a["features"], next(iter(bags.batches(10, True, 6)))[0]["features"])
    own = torch.from_numpy(x[slide == "s4"])
    assert all((own == row).all(1).any() for row in bags[14][0]["features"]) and torch.allclose(bags[14][1], torch.tensor(y[slide == "s4"].mean(0)).float())


def test_with_prior(slides):
    _, y, slide = slides; shuffled = np.random.default_rng(0).permutation(len(slide)); y, slide = y[shuffled], slide[shuffled]
    pred = y - slide_means(y, slide)[1][np.unique(slide, return_inverse=True)[1]]; own = slide_means(y, slide)[1]
    assert np.array_equal(with_prior(pred, own, slide, 0.), pred) and np.allclose(with_prior(pred, own, slide, 1.), y)
    assert choose_prior_weight(pred, own, slide, y, mean_spearman)[0] == 1 and choose_prior_weight(y, -own, slide, y, mean_spearman)[0] == 0
    half = with_prior(pred, own, slide, .5)
    assert np.allclose(half[slide == "s1"] - half[slide == "s1"][0], pred[slide == "s1"] - pred[slide == "s1"][0])
    holes = y.copy(); holes[slide == "s2", 3] = np.nan
    assert np.isnan(slide_means(holes, slide)[1]).sum() == 1
    with pytest.raises(BadInput, match="give one for each"): with_prior(pred, own[:2], slide, .5)

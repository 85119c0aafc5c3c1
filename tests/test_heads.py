"What the pages on heads cannot say about themselves: leaks, blocks, oracles, components that run out, pickled fits."
import importlib.util
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from histokit.core.text import BadInput
from histokit.frozen.heads import (PENALTIES, boost_path, fit_boost, fit_kernel, fit_pls, fit_ridge, pls_path,
    principal_components, set_linear)
from histokit.frozen.network_head import FeatureDataset, HeadModel, fit_head, head_answer, train_head
from histokit.learn.networks import make_head

boost = pytest.mark.skipif(importlib.util.find_spec("lightgbm") is None, reason="LightGBM is not installed")


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def case(n=60, d=8, t=3):
    "Features, targets that follow them in part along a bend, and three groups."
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)).astype("f4")
    line = x @ rng.normal(size=(d, t)) + 4
    return x, x[:, :t] ** 2 + line + .1 * rng.normal(size=(n, t)), np.arange(n) % 3


def accuracy(pred, target): return -((pred - target) ** 2).mean()


HEADS = dict(
    ridge=(fit_ridge, dict(penalties=(10.,))),
    pls=(fit_pls, dict(components=(2,))),
    kernel=(fit_kernel, dict(widths=(1.,), penalties=(.3,))),
    head=(fit_head, dict(epochs=(2,), device="cpu")),
    boost=(fit_boost, dict(rounds=(5,), threads=1)))
NAMES = [pytest.param(n, marks=boost) if n == "boost" else n for n in HEADS]


@pytest.mark.parametrize("name", NAMES)
def test_left_out_rows_have_no_part(name):
    "A group's own targets do not move its left-out predictions; another group's do."
    (fit, kw), (x, z, g) = HEADS[name], case()
    changed = np.where(g[:, None] == 1, z ** 2, z)
    a, b = (fit(x, v, g, accuracy, **kw).inner for v in (z, changed))
    assert np.array_equal(a[g == 1], b[g == 1]) and not np.allclose(a[g == 0], b[g == 0])


@pytest.mark.parametrize("name", NAMES)
def test_fit_is_better_than_the_mean_and_survives_pickling(name):
    (fit, kw), (x, z, g) = HEADS[name], case()
    found = fit(x, z, g, accuracy, **kw)
    pred = found.predict(x)
    assert pred.shape == z.shape and len(found.scores) == 1
    assert accuracy(pred, z) > accuracy(np.tile(z.mean(0), (60, 1)), z)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found.predict))(x), pred)


@pytest.mark.parametrize("name", NAMES)
def test_one_group_cannot_choose(name):
    (fit, kw), (x, z, g) = HEADS[name], case()
    with pytest.raises(BadInput, match="one group"): fit(x, z, g * 0, accuracy, **kw)


def test_settings_are_chosen_by_all_left_out_rows():
    "Each penalty alone gives the same left-out predictions; the best of them is what was chosen."
    x, z, g = case()
    fit = fit_ridge(x, z, g, accuracy)
    alone = [fit_ridge(x, z, g, accuracy, penalties=(p,)) for p in PENALTIES]
    best = int(np.argmax([accuracy(f.inner, z) for f in alone]))
    assert fit["penalty"] == PENALTIES[best]
    assert np.allclose(fit.inner, alone[best].inner) and np.allclose(fit["weight"], alone[best]["weight"])


def test_a_score_that_is_none():
    x, z, g = case()
    with pytest.raises(BadInput, match="score is nan"): fit_ridge(x, z, g, lambda p, t: float("nan"))


@pytest.mark.parametrize("name", ["ridge", "pls", "kernel"])
def test_blocks(name):
    "Neither units nor the order of blocks matter; a block of its own differs from columns appended."
    (fit, kw), (x, z, g) = HEADS[name], case()
    wide = np.random.default_rng(2).normal(size=(60, 40)).astype("f4")
    one = fit([x, wide], z, g, accuracy, **kw)
    for blocks in ([x, 1000 * wide], [wide, x]):
        other = fit(blocks, z, g, accuracy, **kw)
        np.testing.assert_allclose(other.inner, one.inner, rtol=1e-3, atol=1e-3)
    appended = fit(np.concatenate([x, wide], 1), z, g, accuracy, **kw)
    assert accuracy(one.inner, z) > accuracy(appended.inner, z)
    some, every = one.predict([x[:5], wide[:5]]), one.predict([x, wide])
    np.testing.assert_allclose(some, every[:5], rtol=1e-5)


@pytest.mark.parametrize("shape", [(60, 8), (8, 60)])
def test_components_kept_are_the_largest(shape):
    x = np.random.default_rng(0).normal(size=shape)
    _, _, u, s, v = principal_components(x)
    _, _, few, least, directions = principal_components(x, 3)
    assert np.array_equal(few, u[:, :3]) and np.array_equal(directions, v[:, :3])
    assert np.array_equal(least, s[:3])
    assert (np.diff(s) <= 0).all()
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-6)


def test_pls_of_one_target_is_krylov():
    "With one target, a components minimise the squared error over the space of X'y, (X'X) X'y, … (Helland 1988)."
    x, z, _ = case()
    z, spread = z[:, :1], x.std(0) + 1e-6
    xs = ((x - x.mean(0)) / spread).astype(float)
    zc = z - z.mean()
    for a, (w, b) in zip((1, 2, 4), pls_path(x, z, (1, 2, 4))):
        space = [xs.T @ zc]
        for _ in range(a - 1): space.append(xs.T @ (xs @ space[-1]))
        scores = xs @ np.linalg.qr(np.concatenate(space, 1))[0]
        oracle = scores @ np.linalg.lstsq(scores, zc, rcond=None)[0] + z.mean()
        np.testing.assert_allclose(x @ w.T + b, oracle, atol=1e-4)


def test_pls_runs_out_of_components():
    "More components than the features have: all of them, and no blow-up; constant features and targets are harmless."
    x, z, _ = case()
    one = np.ones((60, 1), "f4")
    doubled = np.concatenate([x[:, :2], x[:, :2], one], 1)
    z[:, 1] = 4
    (w2, _), (w9, b9) = pls_path(doubled, z, (2, 9))
    assert np.allclose(w2, w9) and np.isfinite(w9).all()
    pred = doubled @ w9.T + b9
    assert np.allclose(pred[:, 1], 4)
    plain = np.concatenate([x[:, :2], one], 1)
    np.testing.assert_allclose(pred, plain @ np.linalg.lstsq(plain, z, rcond=None)[0], atol=1e-4)


def test_components_start_at_one():
    x, z, g = case()
    with pytest.raises(BadInput, match="start at 1"): fit_pls(x, z, g, accuracy, components=(0, 1))


@boost
def test_boost_rounds_are_prefixes():
    "The answer after ten rounds is that of an ensemble grown for ten."
    x, z, _ = case()
    first, alone = (boost_path(x, z, rounds, threads=1)[0] for rounds in ((10, 30), (10,)))
    np.testing.assert_allclose(first(x), alone(x))


def test_network_takes_views_and_any_loss():
    x, z, g = case()
    def loss(pred, target): return (pred - target).abs().mean()
    views, network = [x, x + .01], dict(head="mlp", hidden="8", device="cpu")
    fit = fit_head(views, z, g, accuracy, epochs=(1, 3), lr=(1e-2, 1e-9), loss=loss, **network)
    tried = [tuple(s.values())[:2] for s in fit.scores]
    assert tried == [(1, 1e-2), (3, 1e-2), (1, 1e-9), (3, 1e-9)]
    np.testing.assert_allclose(fit.predict(views), np.mean([fit.predict(v) for v in views], 0), rtol=1e-4)


def test_training_follows_from_the_seed():
    x, z, _ = case()
    def trained(seed):
        torch.manual_seed(0)
        model = HeadModel(x.mean(0), x.std(0), 3)
        return head_answer(x, train_head(model, FeatureDataset([x, x + 1], z), epochs=2, seed=seed, device="cpu"))
    assert np.array_equal(trained(1), trained(1)) and not np.array_equal(trained(1), trained(2))


def test_a_lone_last_row_is_left_out_of_training():
    x, z, _ = case(n=65)
    data = FeatureDataset([x, x + 1, x + 2], z)
    assert [len(t) for _, t in data.batches(32, True)] == [32, 32]
    assert [len(t) for _, t in data.batches(32)] == [32, 32, 1]


def test_items_and_batches_agree():
    "Coordinates are among the inputs; the views of an epoch follow from its seed."
    x, z, _ = case(n=65)
    data = FeatureDataset([x, x + 1, x + 2], z, coords=np.zeros((65, 2)))
    inputs, target = data[7]
    assert sorted(inputs) == ["coords", "features"] and np.allclose(target, z[7])
    assert np.allclose(inputs["features"], data.batch([7])[0]["features"][0])
    assert (data.epoch(1).view == data.epoch(1).view).all()
    assert not (data.epoch(1).view == data.epoch(2).view).all()


@pytest.mark.parametrize("head, weight, message", [
    ("linear", np.zeros((3, 5)), "takes 96 features"), ("mlp", np.zeros((3, 96)), "2 linear layers")])
def test_set_linear_refuses_other_heads(head, weight, message):
    model = torch.nn.Sequential(OrderedDict(head=make_head(head, 96, 3, "4")))
    with pytest.raises(BadInput, match=message): set_linear(model, weight, np.zeros(3))

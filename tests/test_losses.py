"What the losses notebook cannot say about itself: masks of any shape against the kept columns, schedules, bad text."
import numpy as np
import pytest
import torch

from histokit.core.text import BadInput
from histokit.learn.losses import LOSSES, Loss, blend, mse, pick_engine, row_correlation, soft_ranks, soft_spearman
from histokit.learn.scores import row_ranks

ENGINES = ["torch", "torchsort"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def need(engine):
    if engine == "torchsort": pytest.importorskip("torchsort")


def pair(n=7, t=9): return torch.randn(n, t, dtype=torch.float64), torch.randn(n, t, dtype=torch.float64)


def slope(loss, pred, *rest):
    pred = pred.clone().requires_grad_(); value = loss(pred, *rest); value.backward()
    return value.detach(), pred.grad


TEXTS = ["mse", "huber(delta=0.3)", "pearson_rows", "pairwise_rank(strength=2)", "soft_spearman(engine=torch)", "soft_spearman(engine=torchsort,strength=0.3)",
    "0.85*soft_spearman(engine=torch)+0.15*mse", "mse -> pearson_rows"]


@pytest.mark.parametrize("text", TEXTS)
def test_gradient_with_and_without_mask(text):
    if "torchsort" in text: need("torchsort")
    pred, target = pair(3, 6); mask = torch.rand(3, 6) < .7; mask[:, :2] = True
    for m in (None, mask): assert torch.autograd.gradcheck(lambda p, m=m: Loss(text).at(.3)(p, target, m), pred.requires_grad_())


@pytest.mark.parametrize("text", TEXTS)
def test_masked_row_by_row(text):
    "With another set of types measured in each spot, a row's share is what it would be on its own measured columns; huge values behind the mask change nothing."
    if "torchsort" in text: need("torchsort")
    pred, target = pair(); mask = torch.rand(7, 9) < .6; mask[:, :2] = True; mask[3] = False
    value, grad = slope(Loss(text, masked=True), pred, target.masked_fill(~mask, torch.nan))
    hidden = pred.masked_fill(~mask, 1e6)
    again, grad2 = slope(Loss(text), hidden, target, mask)
    assert torch.allclose(value, again) and torch.allclose(grad, grad2) and not grad[~mask].any()
    alone = [(Loss(text)(p[m][None], t[m][None]), m.sum(), t[m]) for p, t, m in zip(pred, target, mask) if m.any()]
    share = dict(mse=lambda m, t: m, huber=lambda m, t: m, pairwise_rank=lambda m, t: m * (m - 1) / 2).get(text.split("(")[0].split(" ")[0], lambda m, t: 1)
    if "+" in text or "->" in text: return
    weights = torch.tensor([float(share(m, t)) for _, m, t in alone])
    assert torch.allclose(value, sum(w * v for w, (v, *_) in zip(weights, alone)) / weights.sum())


@pytest.mark.parametrize("text", TEXTS)
def test_everything_masked_is_nothing(text):
    if "torchsort" in text: need("torchsort")
    pred, target = pair()
    value, grad = slope(Loss(text, masked=True), pred, target * torch.nan)
    assert value == 0 and not grad.any()
    one = torch.full_like(target, torch.nan); one[:, 0] = 1.          # a single measured type has no order
    if "mse" not in text and "huber" not in text: assert slope(Loss(text, masked=True), pred, one)[0] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_soft_ranks_of_what_was_measured(engine):
    need(engine)
    x = torch.randn(5, 8, dtype=torch.float64) * 10; mask = torch.rand(5, 8) < .6; mask[:, 0] = True
    for row, m, soft, hard in zip(x, mask, soft_ranks(x, .5, engine, mask), row_ranks(x, mask)):
        assert torch.allclose(soft[m], soft_ranks(row[m][None], .5, engine)[0], atol=1e-9) and torch.equal(hard[m], row_ranks(row[m][None])[0])


def test_nan_is_never_silent():
    pred, target = pair(); target[1, 2] = torch.nan
    for text in LOSSES:
        with pytest.raises(BadInput, match="1 of 63 targets are NaN.*masked=True"): Loss(text)(pred, target)
        with pytest.raises(BadInput, match="1 of 63"): Loss(text)(pred, target, torch.ones(7, 9, dtype=torch.bool))
    assert torch.isinf(Loss("mse", masked=True)(pred, target.nan_to_num(torch.inf)))       # infinity is a mistake, not a gap
    with pytest.raises(BadInput, match="mask like them"): mse(pred, target, torch.ones(7, 1, dtype=torch.bool))


@pytest.mark.parametrize("engine", ENGINES)
def test_rank_loss_is_by_row(engine):
    need(engine)
    pred, target = torch.randn(9, 11, dtype=torch.float64, requires_grad=True), torch.randn(9, 11, dtype=torch.float64)
    loop = sum(soft_spearman(p[None], t[None], .3, engine) for p, t in zip(pred, target)) / 9
    whole = soft_spearman(pred, target, .3, engine)
    assert torch.allclose(whole, loop) and torch.allclose(*(torch.autograd.grad(v, pred)[0] for v in (whole, loop)))
    shifted = soft_spearman(pred + torch.arange(9)[:, None] * 7., target * torch.arange(1, 10)[:, None], .3, engine)
    assert torch.allclose(whole, shifted)
    assert row_correlation(soft_ranks(pred.detach(), 50., engine), pred.detach()).min() > .99


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_finite_everywhere(name):
    "Constant predictions, tied targets, one row, half precision: a finite value and finite, moderate slopes."
    for dtype in (torch.float32, torch.float16):
        for pred in (torch.zeros(3, 6), torch.ones(1, 6), torch.randn(3, 6) * 50):
            pred = pred.to(dtype).requires_grad_()
            target = torch.tensor([[0., 0, 1, 2, 3, 3]] * len(pred))
            LOSSES[name](pred, target).backward()
            assert pred.grad.isfinite().all() and pred.grad.abs().max() < 1e4
    with pytest.raises(BadInput, match="one shape"): LOSSES[name](torch.zeros(3, 6), torch.zeros(3))


def test_loss_text():
    loss = Loss("2*huber(delta=0.5) + 1e-2*pairwise_rank(strength=2)+soft_spearman", engine="torch")
    p, t = torch.randn(4, 6), torch.randn(4, 6)
    want = 2 * LOSSES["huber"](p, t, .5) + .01 * LOSSES["pairwise_rank"](p, t, 2) + soft_spearman(p, t, engine="torch")
    assert torch.allclose(loss(p, t), want) and loss.engine_ == "torch" and set(loss.parts_) == {"huber", "pairwise_rank", "soft_spearman"}
    for bad in ("", "mse+", "0.5 mse", "msee", "mse(a=1)", "soft_spearman(engine=gpu)", "-1*mse", "->", "mse ->", "-> mse", "mse > huber", "mse -> -> huber", "mse@0.3"):
        with pytest.raises(BadInput) as e: Loss(bad)(p, t)
        assert "\n" not in str(e.value)
    assert pick_engine("auto", "mps") == "torch"


def test_schedule():
    p, t = pair()
    a, b, c = Loss("mse"), Loss("0.5*soft_spearman(engine=torch)+2*mse"), Loss("huber")
    moving = Loss(f"{a.text} -> {b.text} -> {c.text}")
    for progress, want in ((0, a(p, t)), (.25, (a(p, t) + b(p, t)) / 2), (.5, b(p, t)), (.9, .2 * b(p, t) + .8 * c(p, t)), (1, c(p, t))): assert torch.allclose(moving.at(progress)(p, t), want)
    moving(p, t); assert set(moving.parts_) == {"huber"}
    assert sum(name == "mse" for _, name, _ in blend(moving.stages, .3)) == 1            # in both sums, computed once
    assert all(Loss("mse").at(x)(p, t) == a(p, t) for x in (0, .37, 1)) and Loss("mse").progress == 0
    for bad in (-.1, 1.1, float("nan")):
        with pytest.raises(BadInput, match="progress"): moving.at(bad)


@pytest.mark.parametrize("loss", [Loss("mse"), Loss("0.85*soft_spearman(strength=2) -> mse"), Loss("huber", engine="torch", masked=True)])
def test_says_what_it_is(loss):
    again = eval(repr(loss))
    assert (again.text, again.engine, again.masked, again.stages) == (loss.text, loss.engine, loss.masked, loss.stages) and repr(again) == repr(loss)


@pytest.mark.parametrize("text", ["mse", "huber", "pearson_rows", "pairwise_rank", "soft_spearman(engine=torch)", "mse -> soft_spearman(engine=torch)"])
def test_learns_a_known_ranking(text):
    "Free predictions find the order of what was measured, and of nothing else."
    wanted = row_ranks(torch.randn(6, 10)) / 5; mask = torch.rand(6, 10) < .8
    free, loss = torch.randn(6, 10, requires_grad=True), Loss(text, masked=True); start = free.detach().clone()
    opt = torch.optim.Adam([free], lr=.05)
    for step in range(200): opt.zero_grad(); loss.at(step / 199)(free, wanted.masked_fill(~mask, torch.nan)).backward(); opt.step()
    ranks = [row_ranks(x.detach(), mask).numpy() for x in (free, wanted)]
    assert np.mean([np.corrcoef(a[m], b[m])[0, 1] for a, b, m in zip(*ranks, mask.numpy())]) > .98
    assert torch.equal(free.detach()[~mask], start[~mask])

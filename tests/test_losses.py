"What the losses notebook cannot say about itself: masks of any shape, weights, pieces, schedules, bad text."
import pytest
import torch
import torch.nn.functional as F

from histokit.core.text import BadInput
from histokit.learn.losses import (
    LOSSES, Loss, bce, class_weights, cross_entropy, huber, mse, pairwise_rank, pick_engine, positive_weights,
    row_correlation, soft_ranks, soft_spearman)
from histokit.learn.scores import row_ranks

ENGINES = ["torch", "torchsort"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def need(engine):
    if engine == "torchsort": pytest.importorskip("torchsort")


def pair(n=7, t=9): return torch.randn(2, n, t, dtype=torch.float64).unbind()


def slope(loss, pred, *rest, **kw):
    "Value and gradient."
    pred = pred.clone().requires_grad_()
    value = loss(pred, *rest, **kw)
    value.backward()
    return value.detach(), pred.grad


TEXTS = ["mse", "huber(delta=0.3)", "pearson_rows", "pairwise_rank(strength=2)",
    "soft_spearman(engine=torch)", "soft_spearman(engine=torchsort,strength=0.3)",
    "0.85*soft_spearman(engine=torch)+0.15*mse", "mse -> pearson_rows"]


@pytest.mark.parametrize("text", TEXTS)
def test_gradient_with_and_without_mask(text):
    if "torchsort" in text: need("torchsort")
    pred, target = pair(3, 6)
    mask = torch.rand(3, 6) < .7
    mask[:, :2] = True
    loss = Loss(text).at(.3)
    for m in (None, mask): assert torch.autograd.gradcheck(lambda p, m=m: loss(p, target, m), pred.requires_grad_())


SHARES = dict(mse=lambda m: m, huber=lambda m: m, pairwise_rank=lambda m: m * (m - 1) / 2)   # of m measured columns

@pytest.mark.parametrize("text", TEXTS)
def test_masked_row_by_row(text):
    "A row's share is what it would be on its own measured columns; huge values behind the mask change nothing."
    if "torchsort" in text: need("torchsort")
    pred, target = pair()
    mask = torch.rand(7, 9) < .6
    mask[:, :2], mask[3] = True, False
    value, grad = slope(Loss(text, masked=True), pred, target.masked_fill(~mask, torch.nan))
    again, grad_again = slope(Loss(text), pred.masked_fill(~mask, 1e6), target, mask)
    assert torch.allclose(value, again) and torch.allclose(grad, grad_again) and not grad[~mask].any()
    if "+" in text or "->" in text: return
    rows = [i for i in range(7) if mask[i].any()]
    def measured(table, i): return table[i:i + 1, mask[i]]
    alone = torch.stack([Loss(text)(measured(pred, i), measured(target, i)) for i in rows])
    share = SHARES.get(text.split("(")[0], lambda m: 1)
    weights = torch.tensor([float(share(mask[i].sum())) for i in rows])
    assert torch.allclose(value, (weights * alone).sum() / weights.sum())


@pytest.mark.parametrize("text", TEXTS)
def test_everything_masked_is_nothing(text):
    if "torchsort" in text: need("torchsort")
    pred, target = pair()
    value, grad = slope(Loss(text, masked=True), pred, target * torch.nan)
    assert value == 0 and not grad.any()
    one = torch.full_like(target, torch.nan)
    one[:, 0] = 1.                                                   # a single measured type has no order
    if "mse" not in text and "huber" not in text: assert slope(Loss(text, masked=True), pred, one)[0] == 0


CLASSED = ["cross_entropy", "cross_entropy(class_weight=[1,2,5,1,1,1,1,1,3])", "cross_entropy(smoothing=0.2)",
    "focal", "focal(gamma=1.5,class_weight=[1,2,5,1,1,1,1,1,3],smoothing=0.1)"]
FOUND = ["bce", "bce(class_weight=[1,2,5,1,1,1,1,1,3])", "bce(positive_weight=[1,2,5,1,1,1,1,1,3])",
    "bce(smoothing=0.1,gamma=2)"]

def case(text, gaps=False):
    "A loss with predictions and targets for it, and perhaps gaps in them."
    pred, target = pair()
    if text in CLASSED: target = target.argmax(1)
    if "bce" in text: target = (target > 0).double()
    absent = torch.rand(target.shape) < .3
    if gaps: target[absent] = torch.nan if target.is_floating_point() else -1
    return Loss(text, masked=gaps).at(.5), pred, target


@pytest.mark.parametrize("text", [*TEXTS, *CLASSED, *FOUND])
@pytest.mark.parametrize("gaps", [False, True])
def test_a_weight_is_a_row_taken_so_often(text, gaps):
    "Also of weights that are no whole numbers, up to a factor; and no weight is a weight of one."
    if "torchsort" in text: need("torchsort")
    loss, pred, target = case(text, gaps)
    weight = torch.tensor([2., 0, 1, 1, 3, 1, 1])
    often = torch.repeat_interleave(torch.arange(7), weight.long())
    assert torch.allclose(loss(pred, target, weight=weight), loss(pred[often], target[often]))
    assert torch.allclose(loss(pred, target, weight=weight / 9), loss(pred, target, weight=weight))
    assert torch.allclose(loss(pred, target, weight=torch.ones(7)), loss(pred, target))
    value, grad = slope(loss, pred, target, weight=weight)
    assert not grad[1].any() and grad.isfinite().all()
    nothing, grad = slope(loss, pred, target, weight=torch.zeros(7))
    assert nothing == 0 and not grad.any()


@pytest.mark.parametrize("text", [*TEXTS, *CLASSED, *FOUND])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_pieces_add_up_to_the_batch(text, gaps, weighted):
    "Value and gradient, in pieces of one, four and two rows, whichever term of the sum a row counts in."
    if "torchsort" in text: need("torchsort")
    loss, pred, target = case(text, gaps)
    weight = torch.tensor([2., 0, 1, .5, 3, 1, 1]) if weighted else None
    value, grad = slope(loss, pred, target, weight=weight)
    total, values, grads = loss.total_weight(target, weight), [], []
    for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
        some = None if weight is None else weight[rows]
        part, part_grad = slope(loss, pred[rows], target[rows], weight=some, total_weight=total)
        values.append(part)
        grads.append(part_grad)
    assert torch.allclose(sum(values), value, atol=1e-6) and torch.allclose(torch.cat(grads), grad, atol=1e-6)
    if loss.even() and not weighted:
        by_rows = sum(loss(pred[i:i + 1], target[i:i + 1]) for i in range(7)) / 7
        assert torch.allclose(by_rows, value, atol=1e-6), "rows of an even loss count the same"


def test_which_losses_are_even():
    for text in ("mse", "bce(class_weight=[1,2])", "cross_entropy", "mse -> pairwise_rank"):
        assert Loss(text).even() and not Loss(text, masked=True).even()
    for text in ("cross_entropy(class_weight=[1,2])", "pairwise_rank", "mse+pairwise_rank"):
        assert not Loss(text).even()
    assert not Loss("mse -> pairwise_rank").at(.5).even()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int16])
def test_cross_entropy_is_torchs(dtype):
    "With class weights, smoothing, gaps and soft targets, for class numbers of any width."
    logits, classes = torch.randn(9, 4, dtype=torch.float64), torch.randint(4, (9,)).to(dtype)
    for rare in (None, torch.tensor([1., 2, 5, .5]).double()):
        for smoothing in (0., .2):
            torchs = F.cross_entropy(logits, classes.long(), rare, label_smoothing=smoothing)
            assert torch.allclose(cross_entropy(logits, classes, rare, smoothing), torchs)
    soft = torch.rand(9, 4).softmax(1)
    assert torch.allclose(cross_entropy(logits, soft), F.cross_entropy(logits, soft.double()))
    some = classes.long()
    some[::2] = -1
    torchs = F.cross_entropy(logits, some, ignore_index=-1)
    assert torch.allclose(Loss("cross_entropy", masked=True)(logits, some), torchs)


BAD_CLASSES = [
    (torch.arange(9), {}, "classes 0 to 8 for a model of 4; count them from 0"),
    (torch.zeros(9), {}, "whole numbers"),
    (torch.zeros(9, 3), {}, "one shape"),
    (torch.zeros(8).long(), {}, "cross_entropy takes"),
    (torch.zeros(9).long(), dict(class_weight=[1, 2]), "for 4 classes; give one number"),
    (torch.zeros(9).long(), dict(class_weight="1,a,3,4"), "is not a list of numbers")]

@pytest.mark.parametrize("target, kw, says", BAD_CLASSES)
def test_bad_classes_are_one_line(target, kw, says):
    with pytest.raises(BadInput, match=says) as e: cross_entropy(torch.randn(9, 4), target, **kw)
    assert "\n" not in str(e.value)


def test_weights_from_frequencies():
    "Every class, or both sides of a finding, count the same in sum."
    classes = torch.tensor([0] * 6 + [1] * 3 + [2])
    weight = torch.tensor(class_weights(classes))
    assert torch.allclose(weight * classes.bincount(), torch.tensor(10 / 3))
    found = torch.tensor([[1., 0], [0, 1], [0, 1], [0, 1]])
    each = torch.tensor(positive_weights(found))
    assert torch.allclose((found * each).sum(0), (1 - found).sum(0))
    logits = torch.randn(4, 2)
    torchs = F.binary_cross_entropy_with_logits(logits, found, pos_weight=each)
    assert torch.allclose(bce(logits, found, positive_weight=each), torchs)
    for given, f in (([0, 2], class_weights), ([[1, 0], [0, 0]], positive_weights)):
        with pytest.raises(BadInput, match="it can have no weight"): f(torch.tensor(given))


@pytest.mark.parametrize("engine", ENGINES)
def test_soft_ranks_of_what_was_measured(engine):
    need(engine)
    x, mask = torch.randn(5, 8, dtype=torch.float64) * 10, torch.rand(5, 8) < .6
    mask[:, 0] = True
    for row, m, soft, hard in zip(x, mask, soft_ranks(x, .5, engine, mask), row_ranks(x, mask)):
        assert torch.allclose(soft[m], soft_ranks(row[m][None], .5, engine)[0], atol=1e-9)
        assert torch.equal(hard[m], row_ranks(row[m][None])[0])


def test_nan_is_never_silent():
    pred, target = pair()
    target[1, 2] = torch.nan
    for text in LOSSES:
        for mask in ([], [torch.ones(7, 9, dtype=torch.bool)]):
            with pytest.raises(BadInput, match="1 of 63 targets are NaN.*masked=True"): Loss(text)(pred, target, *mask)
    endless = Loss("mse", masked=True)(pred, target.nan_to_num(torch.inf))
    assert torch.isinf(endless), "infinity is a mistake, not a gap"
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


BAD_TEXTS = ["", "mse+", "0.5 mse", "msee", "mse(a=1)", "soft_spearman(engine=gpu)", "-1*mse", "->", "mse ->",
    "-> mse", "mse > huber", "mse -> -> huber", "mse@0.3", "bce(class_weight=[1,2)",
    "cross_entropy(class_weights=[1,2])"]

@pytest.mark.parametrize("text", BAD_TEXTS)
def test_bad_text_is_one_line(text):
    with pytest.raises(BadInput) as e: Loss(text)(torch.randn(4, 6), torch.randn(4, 6))
    assert "\n" not in str(e.value)


def test_loss_text():
    loss = Loss("2*huber(delta=0.5) + 1e-2*pairwise_rank(strength=2)+soft_spearman", engine="torch")
    p, t = torch.randn(4, 6), torch.randn(4, 6)
    want = 2 * huber(p, t, .5) + .01 * pairwise_rank(p, t, 2) + soft_spearman(p, t, engine="torch")
    assert torch.allclose(loss(p, t), want) and loss.engine_ == "torch"
    assert set(loss.parts_) == {"huber", "pairwise_rank", "soft_spearman"}
    assert pick_engine("auto", "mps") == "torch"


def test_schedule():
    p, t = pair()
    a, b, c = Loss("mse"), Loss("0.5*soft_spearman(engine=torch)+2*mse"), Loss("huber")
    moving = Loss(f"{a.text} -> {b.text} -> {c.text}")
    first, second, third = a(p, t), b(p, t), c(p, t)
    wanted = {0: first, .25: (first + second) / 2, .5: second, .9: .2 * second + .8 * third, 1: third}
    for progress, want in wanted.items(): assert torch.allclose(moving.at(progress)(p, t), want)
    assert set(moving.parts_) == {"huber"}
    assert sum(name == "mse" for _, name, _ in moving.at(.3).terms()) == 1            # in both sums, computed once
    assert all(Loss("mse").at(x)(p, t) == first for x in (0, .37, 1)) and Loss("mse").progress == 0
    for bad in (-.1, 1.1, float("nan")):
        with pytest.raises(BadInput, match="progress"): moving.at(bad)


WRITTEN = [Loss("mse"), Loss("0.85*soft_spearman(strength=2) -> mse"), Loss("huber", engine="torch", masked=True)]

@pytest.mark.parametrize("loss", WRITTEN)
def test_says_what_it_is(loss):
    again = eval(repr(loss))
    for name in ("text", "engine", "masked", "stages"): assert getattr(again, name) == getattr(loss, name)
    assert repr(again) == repr(loss)


TEACHERS = ["mse", "huber", "pearson_rows", "pairwise_rank", "soft_spearman(engine=torch)"]

@pytest.mark.parametrize("text", [*TEACHERS, "mse -> soft_spearman(engine=torch)"])
def test_learns_a_known_ranking(text):
    "Free predictions find the order of what was measured, and of nothing else."
    wanted, mask = row_ranks(torch.randn(6, 10)) / 5, torch.rand(6, 10) < .8
    free, loss = torch.randn(6, 10, requires_grad=True), Loss(text, masked=True)
    start, adam = free.detach().clone(), torch.optim.Adam([free], lr=.05)
    for step in range(200):
        adam.zero_grad()
        loss.at(step / 199)(free, wanted.masked_fill(~mask, torch.nan)).backward()
        adam.step()
    found, true = (row_ranks(x.detach(), mask) for x in (free, wanted))
    assert row_correlation(found, true, mask).mean() > .98
    assert torch.equal(free.detach()[~mask], start[~mask])

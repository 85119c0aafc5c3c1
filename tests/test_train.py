"The trainer's promises that no notebook can keep: killed, shared by processes, short of memory, with broken numbers."
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from histokit.core.compute import seed_everything
from histokit.core.text import BadInput
from histokit.learn.batches import BatchDataset, predict, seed_step
from histokit.learn.devices import launch, open_accelerator, pick_precision
from histokit.learn.losses import Loss
from histokit.learn.trainer import MicroBatches, Trainer, TrainSettings

ROOT = Path(__file__).resolve().parent.parent


class Rows(torch.utils.data.Dataset):
    "A noisy linear truth; items are disturbed by the global generators, as careless augmentation does it."
    def __init__(self, n=97, seed=0, noise=0.):
        g = torch.Generator().manual_seed(seed)
        self.x, self.noise = torch.randn(n, 8, generator=g), noise
        truth = torch.randn(8, 3, generator=torch.Generator().manual_seed(9))
        self.target = self.x @ truth + .1 * torch.randn(n, 3, generator=g)

    def __len__(self): return len(self.x)

    def __getitem__(self, i):
        draw = self.noise * (torch.rand(8) + np.random.random())  # noqa: NPY002
        return dict(image=self.x[i] + draw), self.target[i]


class Classes(Rows):
    "The largest of three values: whole numbers, of which class 0 is rare; rows differ in weight."
    def __init__(self, n=97, seed=0, noise=0., weighted=True):
        super().__init__(n, seed, noise)
        self.target = (self.target - torch.tensor([2., 0, 0])).argmax(1)
        if weighted: self.row_weight = np.random.default_rng(seed).uniform(0, 3, n).round()
        self.draw_weight = 1. + np.arange(n) % 4


class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), *(layers or [nn.Tanh()]), nn.Linear(16, 3))

    def forward(self, image): return self.net(image)


class Cramped(Net):
    "Has no memory for more rows than `most` when it learns; counts what it was given."
    most = 5
    def forward(self, image):
        if self.training: self.seen = [*getattr(self, "seen", []), len(image)]
        full = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self.training and len(image) > self.most: raise full
        return super().forward(image)


def closeness(pred, true): return -float(((pred - true) ** 2).mean())


def accuracy(pred, true): return float((pred.argmax(1) == true).mean())


def trainer(folder="", *, model=Net, layers=(), loss=nn.functional.mse_loss, metric=closeness, **kw):
    seed_everything(0)
    base = TrainSettings(epochs=3, batch_size=16, lr_head=.01, weight_decay=0.)
    return Trainer(model(*layers), loss, metric, folder, base, **(dict(device="cpu") | kw))


def weights(t): return torch.cat([p.detach().flatten() for p in t.model.state_dict().values()])


def digest(t): return hashlib.sha256(weights(t).numpy().tobytes()).hexdigest()


def fitted(train, val=None, **kw):
    "A trainer that has trained."
    t = trainer(**kw)
    t.fit(train, val)
    return t


def assert_close(a, b, atol=2e-6): torch.testing.assert_close(weights(a), weights(b), atol=atol, rtol=0)


LONG = dict(epochs=9, batch_size=8, save_every=4, ema=.99, warmup=2., layers=(nn.Dropout(.2), nn.Tanh()))

class Slow(Rows):
    "Each row takes its time, so that most of a run is spent inside epochs."
    def __getitem__(self, i):
        time.sleep(.001)
        return super().__getitem__(i)


def log_to(folder):
    def log(line):
        with open(Path(folder)/"log.txt", "a") as f: print(line, file=f)
    return log


def long_run(folder):
    "A run whose every step draws at random, with a checkpoint each few steps; `begun` appears as its first step does."
    torch.set_num_threads(1)
    t = trainer(folder, **LONG, log=log_to(folder))
    (Path(folder)/"begun").touch()
    history = t.fit(Slow(noise=.1), Rows(30, 1))
    end = dict(sha=digest(t), loss=history.loss.tolist(), metric=history.metric.tolist())
    (Path(folder)/"end.json").write_text(json.dumps(end))


def test_killed_at_random_times_it_ends_with_the_same_bits(tmp_path):
    "SIGKILL, again and again, at moments of its training that nobody chose; then let run."
    spawn = multiprocessing.get_context("forkserver")
    spawn.set_forkserver_preload(["histokit.learn.trainer", "accelerate"])
    def start(folder):
        folder.mkdir(exist_ok=True)
        (folder/"begun").unlink(missing_ok=True)
        child = spawn.Process(target=long_run, args=(str(folder),))
        child.start()
        while child.is_alive() and not (folder/"begun").exists(): time.sleep(.002)
        return child, time.time()
    child, began = start(tmp_path/"whole")
    child.join()
    whole, rng = time.time() - began, np.random.default_rng(time.time_ns())
    end, kills, within = json.loads((tmp_path/"whole"/"end.json").read_text()), 0, False
    for seed in range(6):                    # two runs, and more only where no kill has fallen inside an epoch yet
        if seed >= 2 and kills >= 4 and within: break
        folder = tmp_path/str(seed)
        for _ in range(4):
            child, _ = start(folder)
            child.join(rng.uniform(.02, .3) * whole)
            kills += child.is_alive()
            child.kill()
            child.join()
        start(folder)[0].join()
        assert json.loads((folder/"end.json").read_text()) == end
        assert not list(folder.glob(".*tmp*"))
        within |= ", batch " in (folder/"log.txt").read_text()
    assert kills >= 4 and within, "too few kills inside an epoch to mean anything"


class Dies(Exception): "Stands for a kill at a moment that the test chooses."


DRAWS = [dict(sampler="balanced"), dict(sampler="weighted"), dict(warmup=.5, scheduler="cosine"),
    dict(workers=1), dict(workers=2, accumulate=2)]

@pytest.mark.parametrize("kw", DRAWS)
def test_what_a_run_draws_is_the_same_when_it_goes_on(tmp_path, kw):
    "Killed after 11 pieces, in the middle of an epoch, with draws in workers, samplers and rates on the way."
    kw, steps = dict(loss=Loss("cross_entropy"), layers=(nn.Dropout(.2),)) | kw, iter(range(99))
    whole = fitted(Classes(noise=.1), **kw)
    class Deadly(Net):
        def forward(self, image):
            if self.training and next(steps) == 11: raise Dies
            return super().forward(image)
    again = kw | dict(folder=tmp_path, save_every=1)
    Deadly.__name__ = "Net"
    with pytest.raises(Dies): trainer(model=Deadly, **again).fit(Classes(noise=.1))
    lines = []
    t = trainer(log=lines.append, **again)
    t.fit(Classes(noise=.1))
    assert "going on after epoch" in lines[0] and ", batch " in lines[0] and digest(t) == digest(whole)


def test_draws_do_not_depend_on_the_number_of_workers():
    one, two = (fitted(Rows(noise=.1), workers=n, epochs=2) for n in (1, 2))
    assert digest(one) == digest(two)


CASES = dict(plain=dict(), uneven=dict(batch_size=19, accumulate=3, clip=.5), ema=dict(ema=.9),
    tiny=dict(batch_size=3, epochs=1), rest=dict(patience=1, epochs=6, lr_head=.3))
WEIGHED = {
    "class weights": dict(loss=Loss("cross_entropy(class_weight=[5,1,1])")),
    "classes, few rows": dict(loss=Loss("cross_entropy(class_weight=[5,1,1])"), batch_size=5, accumulate=2),
    "balanced": dict(loss=Loss("cross_entropy"), sampler="balanced"),
    "a lone row": dict(loss=Loss("cross_entropy"), batch_size=1, epochs=1)}

def learnt(t)->dict:
    "What a trainer has come to, as JSON."
    return dict(weights=weights(t).tolist(), best=t.best, epochs=len(t.history))


def compare(folder):
    "What one process of several has learnt, written to a file for each."
    lines, out, val = [], {}, Rows(33, 1)
    for name, kw in CASES.items():
        t = trainer(Path(folder)/name, log=lines.append, **kw)
        h = t.fit(Rows(), val)
        out[name] = learnt(t) | dict(at_once=int(h.at_once[0]))
    shared, alone = predict(t.model, val, 8, accelerator=t.accelerator), predict(t.model, val, 8)
    for name, kw in WEIGHED.items():
        metrics = {"accuracy": accuracy, "-zero": lambda p, y: 0.}
        t = fitted(Classes(), Classes(33, 1), metric=metrics, **kw)
        out[name] = learnt(t)
    out["gaps"] = learnt(fitted(with_gaps(), loss=GAPS))
    out["short of memory"] = learnt(fitted(Rows(), model=Cramped))
    index, processes = t.accelerator.process_index, t.accelerator.num_processes
    def broken(p, y): return (p - y).square().mean() / (index < processes - 1)
    with pytest.raises(BadInput) as e: trainer(loss=broken).fit(Rows())
    same = all(np.array_equal(a, b) for a, b in zip(shared, alone))
    facts = dict(out=out, lines=len(lines), same=same, broken=str(e.value), processes=processes)
    (Path(folder)/f"{index}.json").write_text(json.dumps(facts))


GAPS = Loss("0.5*pairwise_rank+pearson_rows+mse", masked=True)

def with_gaps():
    "Rows of which some targets were not measured."
    rows = Rows()
    rows.target[torch.rand(97, 3, generator=torch.Generator().manual_seed(0)) < .3] = torch.nan
    return rows


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "What one process learns, and each of two, by `accelerate launch` of one notebook."
    import nbformat
    folder = tmp_path_factory.mktemp("processes")
    code = f"""import sys, os
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]
from test_train import compare
compare(folder)
print('process', os.environ['RANK'])"""
    cell = nbformat.v4.new_code_cell
    cells = [cell("folder = ''", metadata=dict(tags=["parameters"])), cell(code)]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder/"nb.ipynb")
    for n in ("one", "two"): (folder/n).mkdir()
    launch(folder/"nb.ipynb", folder/"out.ipynb", dict(folder=str(folder/"two")), processes=2, device="cpu")
    compare(folder/"one")
    return folder, *(json.loads((folder/f).read_text()) for f in ("one/0.json", "two/0.json", "two/1.json"))


@pytest.mark.parametrize("name", [*CASES, *WEIGHED, "gaps", "short of memory"])
def test_two_processes_train_the_model_of_one(processes, name):
    "Also where rows and classes weigh differently, and where a process has no row of a batch."
    _, alone, first, second = processes
    assert first["out"][name] == second["out"][name], "the processes have the same weights, bit for bit"
    a, b = alone["out"][name], first["out"][name]
    np.testing.assert_allclose(b["weights"], a["weights"], atol=2e-6, rtol=1e-6)
    assert a["epochs"] == b["epochs"] and b["best"] == pytest.approx(a["best"], abs=1e-6, rel=2e-7)


def test_two_processes_speak_with_one_voice(processes):
    folder, alone, first, second = processes
    assert "process 0" in (folder/"out.ipynb").read_text() and (alone["processes"], first["processes"]) == (1, 2)
    assert [p["out"]["plain"]["at_once"] for p in (alone, first)] == [16, 8]
    assert first["same"] and second["same"], "predictions are in the dataset's order, and are those of one process"
    history = (folder/"two"/"plain"/"history.csv").read_text().splitlines()
    assert first["lines"] and not second["lines"] and len(history) == 4, "only the first process speaks and writes"
    assert "batch 1 of epoch 1: every output is finite" in first["broken"]
    assert first["broken"] == second["broken"], "no process waits for one that stopped"


@pytest.mark.parametrize("stderr, kind, says", [
    ("…\nBadInput: no such slide; see data_path\n[1]: exitcode 1", BadInput, "^no such slide; see data_path$"),
    ("…\nSegmentation fault", RuntimeError, "(?s)failed in 2 processes.*Segmentation fault")])
def test_a_notebook_that_fails_in_several_processes_says_why(monkeypatch, stderr, kind, says):
    "Bad input stays one line, anything else is a failure with its end."
    monkeypatch.setattr(subprocess, "run", lambda *a, **kw: subprocess.CompletedProcess(a, 1, "", stderr))
    with pytest.raises(kind, match=says): launch("nb.ipynb", "out.ipynb", {}, device="cpu")


def test_accumulated_pieces_make_the_same_steps():
    "Also in a last step whose rows are not a multiple of anything."
    whole = fitted(Rows(), Rows(33, 1), batch_size=30)
    for size, accumulate in ((10, 3), (6, 5)):
        assert_close(fitted(Rows(), Rows(33, 1), batch_size=size, accumulate=accumulate), whole)
    other = fitted(Rows(), Rows(33, 1), batch_size=10)
    assert (weights(other) - weights(whole)).abs().max() > 1e-3


LOSSES = dict(
    classes=(Classes, Loss("cross_entropy(class_weight=[5,1,2])")),
    smooth=(Classes, Loss("cross_entropy(smoothing=0.1)")),
    gaps=(with_gaps, GAPS),
    pairs=(Rows, Loss("pairwise_rank")))

@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_different_weight_make_the_same_steps_however_they_are_cut(name):
    "Accumulated, or halved where memory does not suffice; the mean of the pieces' means would be another model."
    make, loss = LOSSES[name]
    whole = {size: fitted(make(), batch_size=size, loss=loss) for size in (30, 35)}
    for size, accumulate in ((10, 3), (7, 5)):
        cut = fitted(make(), batch_size=size, accumulate=accumulate, loss=loss)
        assert_close(cut, whole[size * accumulate], atol=2e-5)
    assert_close(fitted(make(), batch_size=30, model=Cramped, loss=loss), whole[30], atol=2e-5)
    if name != "gaps": return
    naive = Loss(loss.text, masked=True)
    by_rows = fitted(make(), batch_size=10, accumulate=3, loss=lambda p, t: naive(p, t))
    assert (weights(by_rows) - weights(whole[30])).abs().max() > 1e-3


def first_gradient(train, loss, **kw):
    "The gradient of the first batch."
    found = []
    class Stops(Exception): pass
    def stop(*a, **k): raise Stops
    t = trainer(loss=loss, metric=accuracy, clip=0, **kw)
    t.optimizer.step = stop
    with pytest.raises(Stops): t.fit(train)
    found = [p.grad.flatten() for p in t.model.parameters()]
    return torch.cat(found), t


CUTS = [dict(batch_size=97), dict(batch_size=13, accumulate=8), dict(batch_size=97, model=Cramped)]

@pytest.mark.parametrize("kw", CUTS)
def test_the_gradient_is_that_of_the_whole_batch(kw):
    "Against torch's own weighted cross-entropy on all rows at once, each as often as its weight says."
    data = Classes()
    found, t = first_gradient(data, Loss("cross_entropy(class_weight=[5,1,2])"), **kw)
    seed_everything(0)
    model, often = Net(), torch.as_tensor(np.repeat(np.arange(97), data.row_weight.astype(int)))
    loss = nn.functional.cross_entropy(model(data.x[often]), data.target[often], torch.tensor([5., 1, 2]))
    loss.backward()
    torch.testing.assert_close(found, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=1e-6, rtol=1e-5)


def test_weights_of_rows_need_a_loss_that_takes_them():
    with pytest.raises(BadInput, match="row_weight, which this loss does not take"):
        fitted(Classes(), loss=nn.functional.cross_entropy)


SPOILT_WEIGHTS = [(np.ones(3), r"shape \(3,\) for 97 rows"), (np.zeros(97), "not all of them 0"),
    (np.full(97, np.nan), "finite numbers"), (np.arange(97.) - 1, "no weights")]

def test_weights_that_are_none():
    for spoilt, says in SPOILT_WEIGHTS:
        data = Classes()
        data.row_weight = spoilt
        with pytest.raises(BadInput, match=says): fitted(data, loss=Loss("cross_entropy"))


KINDS = [
    (lambda x: x.argmax(1), "cross_entropy"),
    (lambda x: x.argmax(1).to(torch.uint8), "cross_entropy"),
    (lambda x: x.softmax(1), "cross_entropy"),
    (lambda x: (x > 0).long(), "bce"),
    (lambda x: x > 0, "bce"),
    (lambda x: (x > 0).double(), "bce"),
    (lambda x: x.double(), "mse"),
    (lambda x: x.half(), "mse")]

@pytest.mark.parametrize("target, text", KINDS)
def test_targets_of_any_kind(target, text):
    "Class numbers, findings as numbers or truth values, floats of any width."
    rows, val, loss = Rows(), Rows(33, 1), Loss(text)
    for data in (rows, val): data.target = target(data.target)
    def metric(pred, true): return -float(loss(torch.from_numpy(pred), torch.from_numpy(true)))
    t = trainer(loss=loss, metric=metric, epochs=8)
    history = t.fit(rows, val)
    assert history.loss.iloc[-1] < .8 * history.loss[0]
    assert predict(t.model, val)[1].dtype == val.target.numpy().dtype


def test_samplers_draw_by_seed_and_epoch():
    "Class 0 comes as often as the others, or rows as their weights say; each epoch draws anew, each seed otherwise."
    class Noted(Classes):
        def __getitem__(self, i):
            self.drawn.append(i)
            return super().__getitem__(i)
    def rows(**kw):
        data = Noted(400, weighted=False)
        data.drawn = []
        fitted(data, loss=Loss("cross_entropy"), metric=accuracy, batch_size=50, **kw)
        return np.array(data.drawn).reshape(-1, 400), data
    balanced, data = rows(sampler="balanced", epochs=5)
    share = np.bincount(data.target[balanced].ravel()) / balanced.size
    np.testing.assert_allclose(share, 1 / 3, atol=.05)
    again, other = (rows(sampler="balanced", epochs=5, seed=seed)[0] for seed in (0, 1))
    assert np.array_equal(balanced, again) and not np.array_equal(balanced, other), "the seed decides"
    assert not np.array_equal(balanced[0], balanced[1]), "each epoch draws anew"
    weighted, _ = rows(sampler="weighted", epochs=5)
    shares = np.bincount(weighted.ravel() % 4) / weighted.size
    np.testing.assert_allclose(shares, np.array([1, 2, 3, 4]) / 10, atol=.03)
    shuffled, _ = rows(epochs=2)
    assert all(sorted(epoch) == list(range(400)) for epoch in shuffled)
    with pytest.raises(BadInput, match="needs classes"): fitted(Rows(), sampler="balanced")
    with pytest.raises(BadInput, match="draw_weight"): fitted(Rows(), sampler="weighted")


def auc(pred, true):
    "The chance that a random row of class 2 scores above one of the rest (Mann and Whitney 1947)."
    rank, positive = pd.Series(pred[:, 2]).rank(), true == 2
    n = positive.sum()
    return (rank[positive].sum() - n * (n + 1) / 2) / (n * (len(true) - n))


def test_several_metrics_and_the_first_decides():
    "An area under the curve and an error, both in the history; a metric of which lower is better."
    train, val = Classes(weighted=False), Classes(60, 1)
    def error(pred, true): return 1 - accuracy(pred, true)
    best = {}
    for metrics in ({"auc": auc, "-error": error}, {"-error": error, "auc": auc}):
        first = next(iter(metrics)).strip("-")
        t = trainer(loss=Loss("cross_entropy"), metric=metrics, epochs=6, lr_head=.03, patience=5)
        history = t.fit(train, val)
        best[first] = t.best
        keep = history[first].idxmax() if first == "auc" else history[first].idxmin()
        pred, true = predict(t.model, val)
        decides = metrics[next(iter(metrics))]
        assert t.best == history[first][keep] == pytest.approx(decides(pred, true))
        named = [m.strip("-") for m in metrics]
        assert list(history.columns) == ["epoch", "loss", "lr", *named, "seconds", "waited", "at_once"]
    assert best["auc"] > .8 and best["error"] < .3
    worse = iter([.5, .2, .3, .4, .5, .6])
    t = trainer(metric={"-error": lambda p, y: next(worse)}, epochs=6, patience=2)
    assert t.fit(Rows(), Rows(9, 1)).error.tolist() == [.5, .2, .3, .4] and t.best == .2


def test_the_plateau_knows_which_way_is_better():
    "The rates are halved where an error stops falling, not where it falls."
    errors, rates = iter([.5, .4, .4, .4, .4, .4]), {}
    rates["rests"] = fitted(Rows(), Rows(9, 1), metric={"-error": lambda p, y: next(errors)}, epochs=6).history
    falling = iter([.5, .4, .3, .2, .1, .05])
    rates["falls"] = fitted(Rows(), Rows(9, 1), metric={"-error": lambda p, y: next(falling)}, epochs=6).history
    assert [r["lr"] for r in rates["falls"]] == [.01] * 6 and rates["rests"][-1]["lr"] < .01


WARMUPS = {0: 0, 1: 7, 2: 14, 2.5: 18, .25: 7, .1: 3}               # of 28 steps in four epochs

@pytest.mark.parametrize("warmup, steps", WARMUPS.items())
def test_rates_rise_over_the_warmup_and_then_follow_the_scheduler(warmup, steps):
    "Seven steps an epoch, four epochs; the rate of each step as the optimizer has it."
    used, t = [], trainer(warmup=warmup, epochs=4, batch_size=14, scheduler="cosine")
    t.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[-1]["lr"]))
    history = t.fit(Rows())
    whole = int(warmup if warmup >= 1 else 4 * warmup)
    done = np.maximum(np.arange(4) - whole, 0) / (4 - whole)
    cosine = .01 * (1 + np.cos(np.pi * done)) / 2
    share = np.minimum(np.arange(1, 29) / max(steps, 1), 1)
    np.testing.assert_allclose(used, np.repeat(cosine, 7) * share, rtol=1e-12)
    np.testing.assert_allclose(history.lr, used[6::7])


def test_out_of_memory_is_logged_and_mended(tmp_path):
    lines, whole = [], fitted(Rows())
    short = trainer(tmp_path, model=Cramped, log=lines.append)
    history = short.fit(Rows())
    assert_close(short, whole)
    said = "epoch 1, batch 1: out of memory with {} rows at once: going on with {}, accumulated to the same batch of 16"
    assert [line for line in lines if "memory" in line] == [said.format(16, 8), said.format(8, 4)]
    assert history.at_once.tolist() == [4, 4, 4] and max(short.model.seen[5:]) == 4
    again = trainer(tmp_path, model=Cramped)
    again.fit(Rows())
    assert again.micro.at_once == 4, "what fits is remembered by the checkpoint"


def test_no_lone_row_for_batch_norm_and_an_end_to_halving():
    short = fitted(Rows(98), model=Cramped, layers=(nn.BatchNorm1d(16), nn.Tanh()))
    assert min(short.model.seen) >= 2 and short.micro.at_once == 4
    class Hopeless(Cramped): most = 0
    with pytest.raises(BadInput, match="with 1 rows at once, and fewer cannot be"): fitted(Rows(), model=Hopeless)
    joined = MicroBatches(8, 2, least=2, fixed=True)
    joined.share([np.arange(16)])
    with pytest.raises(BadInput, match="lower batch_size and raise accumulate"): joined.halve(0)


def test_other_errors_are_not_taken_for_memory():
    class Wrong(Net):
        def forward(self, image): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"): fitted(Rows(), model=Wrong)


class Nothing(nn.Module):
    def forward(self, x): return x * 0


class Root(nn.Module):
    def forward(self, x): return x.sqrt()


def spoil(what, value):
    "Rows of which one value is broken."
    rows = Rows()
    getattr(rows, what)[40] = value
    return rows


BROKEN = [
    (dict(), lambda: spoil("x", torch.nan), "the input 'image' itself is not finite .*; mend the data"),
    (dict(), lambda: spoil("target", torch.inf), "the target itself is not finite .*; mend the data"),
    (dict(lr_head=1e30, clip=0), Rows, "batch 2 of epoch 1: .*lower lr_head and lr_backbone, or set clip=1"),
    (dict(layers=(Root(),)), Rows, r"the first output that is not finite is that of net.1 \(Root\); lower"),
    (dict(layers=(Nothing(), Root())), Rows, r"is not finite in batch 1 of epoch 1: .* from net.2 \(Root\) backwards"),
    (dict(loss=lambda p, t: (p - t).abs().mean() / 0), Rows, "the loss of the last one is not; look into the loss")]

@pytest.mark.parametrize("make, rows, says", BROKEN)
def test_nan_stops_with_batch_layer_and_mend(make, rows, says):
    with pytest.raises(BadInput, match=says) as e: fitted(rows(), **make)
    assert "\n" not in str(e.value)


def test_nan_leaves_the_last_good_checkpoint(tmp_path):
    calls = iter(range(99))
    def breaks(p, t): return nn.functional.mse_loss(p, t) * (torch.nan if next(calls) >= 10 else 1)
    with pytest.raises(BadInput, match="in batch 5 of epoch 2"): fitted(Rows(), folder=tmp_path, loss=breaks)
    state = torch.load(tmp_path/"last.pt", weights_only=True)
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["model"].values())
    assert json.loads(state["settings"])["batch_size"] == 16


def nan(pred, true): return float("nan")


METRICS = [(nan, "the metric is nan after epoch 1"), (dict(auc=nan), "the metric auc is nan after epoch 1"),
    ({}, "there is no metric"), (dict(lr=closeness), "call it val_lr")]

@pytest.mark.parametrize("metric, says", METRICS)
def test_a_metric_of_nan_is_no_epoch(metric, says):
    with pytest.raises(BadInput, match=says): fitted(Rows(), Rows(9, 1), metric=metric)


SPOILT = [lambda b: b[:500], lambda b: b"", lambda b: b[:2000] + bytes(len(b) - 2000), lambda b: b"no checkpoint"]

@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_spoilt_checkpoint_is_reported_and_not_used(tmp_path, spoilt):
    whole = fitted(Rows(), Rows(9, 1))
    fitted(Rows(), Rows(9, 1), folder=tmp_path)
    file, lines = tmp_path/"last.pt", []
    file.write_bytes(spoilt(file.read_bytes()))
    again = fitted(Rows(), Rows(9, 1), folder=tmp_path, log=lines.append)
    assert "cannot be read" in lines[0] and "starting afresh" in lines[0] and digest(again) == digest(whole)


OTHERS = [dict(lr_head=.02), dict(sampler="balanced"), dict(warmup=1.), dict(seed=1)]
OTHERS += [dict(loss=Loss("cross_entropy(smoothing=0.1)"))]

@pytest.mark.parametrize("other", OTHERS)
def test_another_run_does_not_go_on_from_this_one(tmp_path, other):
    "Nor do rows of other weight; what only changes the speed does."
    lines, base = [], dict(folder=tmp_path, loss=Loss("cross_entropy"))
    fitted(Classes(), **base)
    heavier = Classes()
    heavier.row_weight = heavier.row_weight + 1
    for data, kw, afresh in ((Classes(), dict(workers=1, save_every=3), 0), (heavier, {}, 1)):
        fitted(data, log=lines.append, **base, **kw)
        assert sum("starting afresh" in line for line in lines) == afresh
    fitted(heavier, log=lines.append, **base | other)
    assert sum("starting afresh" in line for line in lines) == 2


def test_the_mean_of_the_weights_is_the_one_that_is_kept():
    "Against the mean by hand, with timm's warm-up of the decay."
    before, last = [], []
    def first_layer(): return t.model.net[0].weight.detach().clone()
    def loss(p, y):
        before.append(first_layer())
        return nn.functional.mse_loss(p, y)
    def metric(p, y):
        last.append(first_layer())
        return len(last)
    t = trainer(loss=loss, metric=metric, ema=.8, epochs=2)
    t.fit(Rows(), Rows(9, 1))
    mean = before[0]
    for step, w in enumerate([*before[1:], last[-1]], 1):
        decay = min(1 - (1 + step - 1) ** (-2 / 3), .8)
        mean = decay * mean + (1 - decay) * w
    torch.testing.assert_close(first_layer(), mean)
    assert not torch.equal(mean, last[-1])


def test_without_validation_the_last_epoch_is_kept():
    class Worse:
        def at(self, progress): self.times = 1 + 100 * progress
        def __call__(self, pred, true): return self.times * (pred - true).square().mean()
    t = trainer(loss=Worse())
    history = t.fit(Rows())
    assert history.loss.argmin() == 0 and t.best == history.metric.iloc[-1]


@pytest.mark.parametrize("broken", [2, 99])
def test_an_overflow_of_float16_is_skipped_unless_it_lasts(monkeypatch, broken):
    "The scaler of a GPU on the processor: a step that overflows changes nothing; twenty-one in a row are an error."
    def half_on_cpu(device, amp):
        accelerator, device = open_accelerator(device, amp)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.)
        return accelerator, device
    monkeypatch.setattr("histokit.learn.trainer.open_accelerator", half_on_cpu)
    calls, before = iter(range(99)), []
    def loss(p, y):
        before.append(t.model.net[0].weight.detach().clone())
        return nn.functional.mse_loss(p, y) * (torch.inf if 3 <= next(calls) < 3 + broken else 1)
    t = trainer(loss=loss, epochs=6)
    if broken > 20:
        with pytest.raises(BadInput, match="in batch 6 of epoch 4: .*, or amp=no"): t.fit(Rows())
        return
    history = t.fit(Rows())
    assert [torch.equal(before[3], before[k]) for k in (4, 5, 6)] == [True, True, False]
    assert t.accelerator.scaler.get_scale() == 64 and np.isfinite(history.loss).all() and t.step == 34


def test_seeds_and_switches(monkeypatch):
    def draws(*numbers):
        seed_step(*numbers)
        return torch.rand(2).tolist(), np.random.random()  # noqa: NPY002
    assert draws(1, 2, 3) == draws(1, 2, 3) != draws(1, 2, 4)
    assert digest(fitted(Rows(), seed=1)) != digest(fitted(Rows(), seed=2))
    plain, calls = fitted(Rows()), []
    monkeypatch.setattr(torch, "compile", lambda m: lambda **kw: calls.append(1) or m(**kw))
    try:
        compiled = fitted(Rows(), compile=True, channels_last=True, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(False)
    assert digest(plain) == digest(compiled) and len(calls) == 18


def test_channels_last_reaches_the_pictures():
    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
        def forward(self, image):
            self.seen = image.is_contiguous(memory_format=torch.channels_last)
            return self.conv(image).mean((2, 3))
    class Pictures(torch.utils.data.TensorDataset):
        def __getitem__(self, i): return dict(image=self.tensors[0][i]), self.tensors[1][i]
    rows = Pictures(torch.randn(8, 3, 6, 6), torch.randn(8, 4))
    for wanted in (True, False):
        t = fitted(rows, model=Sees, channels_last=wanted, epochs=1)
        assert t.model.seen == wanted and t.model.conv.weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_whole_batches_and_single_items_train_alike():
    class Whole(BatchDataset):
        def __init__(self): self.rows, self.target = Rows(), Rows().target
        def __len__(self): return len(self.rows)
        def batch(self, rows): return dict(image=self.rows.x[rows]), self.target[rows]
    whole, items, with_workers = fitted(Whole()), fitted(Rows()), fitted(Whole(), workers=1)
    assert digest(whole) == digest(items) == digest(with_workers)


def test_precision_follows_the_gpu(monkeypatch):
    for native, wanted in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: native)
        found = [pick_precision(a, "cuda:0") for a in ("auto", True, False, "no", "fp16")]
        assert found == [wanted, wanted, "no", "no", "fp16"]
    with pytest.raises(BadInput, match="use amp=auto or amp=fp16"): pick_precision("bf16", "cuda")


BAD_SETTINGS = [
    (dict(epochs=0), "epochs=0"), (dict(accumulate=0), "accumulate=0"), (dict(ema=1.), "a decay below 1"),
    (dict(amp="half"), "unknown amp"), (dict(scheduler="cos"), "did you mean 'cosine'"),
    (dict(sampler="ballanced"), "did you mean 'balanced'"), (dict(warmup=3.), "fewer than the 3 epochs"),
    (dict(warmup=-1), "warmup=-1"), (dict(lr_head=-.1), "lr_head=-0.1"), (dict(clip=float("nan")), "clip=nan"),
    (dict(epoch=3), "unknown setting 'epoch'.*did you mean 'epochs'")]

@pytest.mark.parametrize("kw, says", BAD_SETTINGS)
def test_bad_settings_are_one_line(kw, says):
    with pytest.raises(BadInput, match=says) as e: trainer(**kw)
    assert "\n" not in str(e.value)


def test_an_empty_training_set():
    with pytest.raises(BadInput, match="the training set is empty"): fitted(Rows(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("amp", ["auto", "fp16", "no"])
def test_on_a_gpu_it_learns_in_every_precision(amp, tmp_path):
    t = trainer(tmp_path, device="cuda", amp=amp, channels_last=True, ema=.9, epochs=12, save_every=3)
    history = t.fit(Rows(200), Rows(33, 1))
    assert history.loss.iloc[-1] < .5 * history.loss.iloc[0] and t.device.startswith("cuda")
    if amp == "fp16": assert t.accelerator.scaler.get_scale() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("loss", ["cross_entropy(class_weight=[5,1,2])", "cross_entropy(smoothing=0.1)"])
def test_on_a_gpu_rows_weigh_as_on_the_processor(loss):
    kw = dict(loss=Loss(loss), amp="no", batch_size=10, accumulate=3)
    here, there = (fitted(Classes(), device=d, **kw) for d in ("cpu", "cuda"))
    torch.testing.assert_close(weights(there).cpu(), weights(here), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_real_memory_runs_out(tmp_path):
    class Wide(Net):
        def forward(self, image):
            large = image.repeat(1, 2**18).sigmoid() ** 2
            return super().forward(image) + large.mean(1, keepdim=True)
    free, _ = torch.cuda.mem_get_info()
    rows, lines = 2 * int(free / (8 * 2**18 * 4 * 3)) + 2, []
    t = trainer(model=Wide, device="cuda", amp="no", batch_size=rows, epochs=1, log=lines.append)
    t.fit(Rows(rows))
    assert "out of memory" in lines[0] and t.micro.at_once < rows


def with_folds(run, say=print, **changed):
    "A cross-validation by gradient descent, as small as can be."
    from histokit.spots.crossval import run_training
    from histokit.spots.demo import smoke_demo
    from histokit.spots.settings import TrainingSettings
    settings = TrainingSettings(epochs=2, input_px=32, target="rank", device="cpu", **changed)
    network = dict(backbone="test_resnet.r160_in1k", weights="none", head="linear")
    return run_training(run, smoke_demo(), settings, network, say)[1]


def test_a_finished_fold_is_small_and_not_trained_again(tmp_path):
    "Stopped in its second fold: the first is taken as it is, the second goes on from its checkpoint, and none stays."
    from histokit.core.runs import RunFolder
    torch.set_num_threads(1)
    whole = with_folds(RunFolder(tmp_path/"whole").make(), lambda line: None, compare_random=False)
    run, lines = RunFolder(tmp_path/"stopped").make(), []
    def stop(line):
        if line.startswith("fold 1  epoch 2"): raise Dies
    with pytest.raises(Dies): with_folds(run, stop, compare_random=False)
    assert not (run/"folds/0/last.pt").exists() and (run/"folds/1/last.pt").exists()
    found = with_folds(run, lines.append, compare_random=False)
    assert lines[0] == "fold 0  finished before, after epoch 2" and lines[1] == "fold 1  going on after epoch 1"
    assert not any(line.startswith("fold 0  epoch") for line in lines) and not list(run.path.rglob("last.pt"))
    np.testing.assert_array_equal(found.oof, whole.oof)
    assert found.flattery is None and not (run/"random_split").exists()


def test_the_random_split_leaves_its_history_alone(tmp_path):
    from histokit.core.runs import RunFolder
    torch.set_num_threads(1)
    found = with_folds(RunFolder(tmp_path).make(), lambda line: None, sampler="balanced", warmup=.5)
    assert set(found.flattery) == {"random_split", "held_out", "spots"}
    assert [p.name for p in (tmp_path/"random_split").iterdir()] == ["history.csv"]


def test_what_can_be_set_at_import_is_set():
    "Before torch the way threads wait, and memory at any time; where torch came first, one line, once."
    code = "import sys, types, os\n{}\nimport histokit.learn\nfrom histokit.core.compute import waits_badly\n"
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules, len(waits_badly()) > 0, waits_badly() == '')"
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY" and not k.startswith("MALLOC_")}
    def said(first, **more):
        asked = [sys.executable, "-c", code.format(first)]
        return subprocess.run(asked, env=env | more, capture_output=True, text=True).stdout.split()
    assert said("") == ["PASSIVE", "False", "False", "True"]
    assert said("sys.modules['torch'] = types.ModuleType('torch')") == ["PASSIVE", "True", "True", "True"]
    assert said("sys.modules['torch'] = types.ModuleType('torch')", OMP_WAIT_POLICY="ACTIVE")[0] == "ACTIVE"

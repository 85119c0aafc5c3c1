"""The trainer's promises that no notebook can keep: killed by the operating system, shared by several processes, short of memory, broken numbers."""
import hashlib
import json
import multiprocessing
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from histokit.core.text import BadInput
from histokit.core.compute import seed_everything
from histokit.learn.trainer import Cutter, Trainer, has_batch_norm, seed_step
from histokit.learn.devices import launch, open_accelerator, pick_precision
from histokit.learn.batches import predict

ROOT = Path(__file__).resolve().parent.parent


class Rows(torch.utils.data.Dataset):
    "A noisy linear truth; each item is disturbed by numpy's and torch's global generators, as careless augmentation does it."
    def __init__(self, n=97, seed=0, noise=0.):
        g = torch.Generator().manual_seed(seed)
        self.x, self.noise = torch.randn(n, 8, generator=g), noise
        self.target = self.x @ torch.randn(8, 3, generator=torch.Generator().manual_seed(9)) + .1 * torch.randn(n, 3, generator=g)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return dict(image=self.x[i] + self.noise * (torch.rand(8) + np.random.random())), self.target[i]  # noqa: NPY002


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
        if self.training and len(image) > self.most: raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(image)


def closeness(pred, true): return -float(((pred - true) ** 2).mean())


def trainer(folder="", model=Net, layers=(), loss=nn.functional.mse_loss, **kw):
    seed_everything(0)
    return Trainer(model(*layers), loss, closeness, folder, **(dict(epochs=3, batch_size=16, lr_head=.01, weight_decay=0., device="cpu") | kw))


def weights(t): return torch.cat([p.detach().flatten() for p in t.model.state_dict().values()])
def digest(t): return hashlib.sha256(weights(t).numpy().tobytes()).hexdigest()


LONG = dict(epochs=9, batch_size=8, save_every=4, ema=.99, layers=(nn.Dropout(.2), nn.Tanh()))

class Slow(Rows):
    "Each row takes its time, so that most of a run is spent inside epochs."
    def __getitem__(self, i): time.sleep(.001); return super().__getitem__(i)


def long_run(folder):
    "A run whose every step draws at random, with a checkpoint each few steps; `begun` appears as its first step does."
    torch.set_num_threads(1)
    t = trainer(folder, **LONG, log=lambda line: print(line, file=open(Path(folder)/"log.txt", "a")))
    (Path(folder)/"begun").touch()
    history = t.fit(Slow(noise=.1), Rows(30, 1))
    (Path(folder)/"end.json").write_text(json.dumps(dict(sha=digest(t), loss=history.loss.tolist(), metric=history.metric.tolist())))


def test_killed_at_random_times_it_ends_with_the_same_bits(tmp_path):
    "SIGKILL, again and again, at moments of its training that nobody chose; then let run."
    spawn = multiprocessing.get_context("forkserver"); spawn.set_forkserver_preload(["histokit.learn.trainer", "accelerate"])
    def start(folder):
        folder.mkdir(exist_ok=True); (folder/"begun").unlink(missing_ok=True)
        child = spawn.Process(target=long_run, args=(str(folder),)); child.start()
        while child.is_alive() and not (folder/"begun").exists(): time.sleep(.002)
        return child, time.time()
    child, began = start(tmp_path/"whole"); child.join(); whole = time.time() - began
    end, rng, kills, within = json.loads((tmp_path/"whole"/"end.json").read_text()), np.random.default_rng(time.time_ns()), 0, False
    for seed in range(6):                                                  # two runs, and more only where no kill has fallen inside an epoch yet
        if seed >= 2 and kills >= 4 and within: break
        folder = tmp_path/str(seed)
        for _ in range(4):
            child, _ = start(folder); child.join(rng.uniform(.02, .3) * whole)
            kills += child.is_alive(); child.kill(); child.join()
        start(folder)[0].join()
        assert json.loads((folder/"end.json").read_text()) == end
        assert not list(folder.glob(".*tmp*"))
        within |= ", batch " in (folder/"log.txt").read_text()
    assert kills >= 4 and within, "too few kills inside an epoch to mean anything"


CASES = dict(plain=dict(), uneven=dict(batch_size=19, accumulate=3, clip=.5), ema=dict(ema=.9), tiny=dict(batch_size=3, epochs=1), rest=dict(patience=1, epochs=6, lr_head=.3))

def compare(folder):
    "What one process of several has learnt, written to a file for each."
    said, out, val = [], {}, Rows(33, 1)
    for name, kw in CASES.items():
        t = trainer(Path(folder)/name, log=said.append, **kw); h = t.fit(Rows(), val)
        out[name] = dict(weights=weights(t).tolist(), best=t.best, epochs=len(h), at_once=int(h.at_once[0]))
    shared, alone = predict(t.model, val, 8, accelerator=t.accelerator), predict(t.model, val, 8)
    short = trainer(model=Cramped); short.fit(Rows()); out["short of memory"] = dict(weights=weights(short).tolist())
    index, processes = t.accelerator.process_index, t.accelerator.num_processes
    with pytest.raises(BadInput) as e: trainer(loss=lambda p, y: (p - y).square().mean() / (index < processes - 1)).fit(Rows())
    same = all(np.array_equal(a, b) for a, b in zip(shared, alone))
    (Path(folder)/f"{index}.json").write_text(json.dumps(dict(out=out, said=len(said), same=same, broken=str(e.value), processes=processes)))


def test_two_processes_train_the_model_of_one(tmp_path):
    "One notebook in two processes, by `accelerate launch`; the last process's NaN stops both."
    import nbformat
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]\nfrom test_train import compare\ncompare(folder)\nimport os; print('process', os.environ['RANK'])"
    cells = [nbformat.v4.new_code_cell("folder = ''", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))), tmp_path/"nb.ipynb")
    for n in ("one", "two"): (tmp_path/n).mkdir()
    launch(tmp_path/"nb.ipynb", tmp_path/"out.ipynb", dict(folder=str(tmp_path/"two")), processes=2, device="cpu")
    compare(tmp_path/"one")
    alone, first, second = (json.loads((tmp_path/f).read_text()) for f in ("one/0.json", "two/0.json", "two/1.json"))
    assert "process 0" in (tmp_path/"out.ipynb").read_text() and (alone["processes"], first["processes"]) == (1, 2)
    assert first["out"] == second["out"], "siblings have the same weights, bit for bit"
    for name, a in alone["out"].items():
        b = first["out"][name]
        np.testing.assert_allclose(b["weights"], a["weights"], atol=2e-6, err_msg=name)
        if "epochs" in a: assert a["epochs"] == b["epochs"] and b["best"] == pytest.approx(a["best"], abs=1e-6)
    assert (alone["out"]["plain"]["at_once"], first["out"]["plain"]["at_once"]) == (16, 8)
    assert first["same"] and second["same"], "predictions are gathered in the dataset's order, and are those of one process"
    assert first["said"] and not second["said"] and len((tmp_path/"two"/"plain"/"history.csv").read_text().splitlines()) == 4, "only the first process speaks and writes"
    assert "batch 1 of epoch 1: every output is finite" in first["broken"] and first["broken"] == second["broken"], "no sibling waits for one that stopped"


def test_a_notebook_that_fails_in_several_processes_says_why(monkeypatch):
    "Bad input stays one line, anything else is a failure with its end."
    for stderr, kind, says in (("…\nBadInput: no such slide; see data_path\n[1]: exitcode 1", BadInput, "^no such slide; see data_path$"), ("…\nSegmentation fault", RuntimeError, "(?s)failed in 2 processes.*Segmentation fault")):
        monkeypatch.setattr(subprocess, "run", lambda *a, said=stderr, **kw: subprocess.CompletedProcess(a, 1, "", said))
        with pytest.raises(kind, match=says): launch("nb.ipynb", "out.ipynb", {}, device="cpu")


def test_accumulated_pieces_make_the_same_steps():
    "Also in a last step whose rows are not a multiple of anything."
    whole = trainer(batch_size=30); whole.fit(Rows(), Rows(33, 1))
    for kw in (dict(batch_size=10, accumulate=3), dict(batch_size=6, accumulate=5)):
        parts = trainer(**kw); parts.fit(Rows(), Rows(33, 1))
        torch.testing.assert_close(weights(parts), weights(whole), atol=2e-6, rtol=0)
    other = trainer(batch_size=10); other.fit(Rows(), Rows(33, 1))
    assert (weights(other) - weights(whole)).abs().max() > 1e-3


def test_out_of_memory_is_said_and_mended(tmp_path):
    said, whole, short = [], trainer(), trainer(tmp_path, model=Cramped, log=lambda line: said.append(line))
    whole.fit(Rows()); history = short.fit(Rows())
    torch.testing.assert_close(weights(short), weights(whole), atol=2e-6, rtol=0)
    assert [line for line in said if "memory" in line] == [f"epoch 1, batch 1: out of memory with {a} rows at once: going on with {b}, accumulated to the same batch of 16" for a, b in ((16, 8), (8, 4))]
    assert history.at_once.tolist() == [4, 4, 4] and max(short.model.seen[5:]) == 4
    again = trainer(tmp_path, model=Cramped); again.fit(Rows())
    assert again.cutter.at_once == 4, "what fits is remembered by the checkpoint"


def test_no_lone_row_for_batch_norm_and_an_end_to_halving():
    short = trainer(model=Cramped, layers=(nn.BatchNorm1d(16), nn.Tanh())); short.fit(Rows(98))
    assert has_batch_norm(short.model) and min(short.model.seen) >= 2 and short.cutter.at_once == 4
    class Hopeless(Cramped): most = 0
    with pytest.raises(BadInput, match="with 1 rows at once, and fewer cannot be"): trainer(model=Hopeless).fit(Rows())
    with pytest.raises(BadInput, match="lower batch_size and raise accumulate"):
        joined = Cutter(8, 2, least=2, fixed=True); joined.share([np.arange(16)]); joined.halve(0)


def test_other_errors_are_not_taken_for_memory():
    class Wrong(Net):
        def forward(self, image): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="cannot be multiplied"): trainer(model=Wrong).fit(Rows())


class Nothing(nn.Module):
    def forward(self, x): return x * 0


class Root(nn.Module):
    def forward(self, x): return x.sqrt()


def spoil(rows, what, row, value): getattr(rows, what)[row] = value; return rows

@pytest.mark.parametrize("make, rows, says", [
    (dict(), lambda: spoil(Rows(), "x", 40, torch.nan), "the input 'image' itself is not finite .*; mend the data"),
    (dict(), lambda: spoil(Rows(), "target", 40, torch.inf), "the target itself is not finite .*; mend the data"),
    (dict(lr_head=1e30, clip=0), Rows, "batch 2 of epoch 1: .*lower lr_head and lr_backbone, or set clip=1"),
    (dict(layers=(Root(),)), Rows, r"the first output that is not finite is that of net.1 \(Root\); lower"),
    (dict(layers=(Nothing(), Root())), Rows, r"the gradient is not finite in batch 1 of epoch 1: .* from net.2 \(Root\) backwards"),
    (dict(loss=lambda p, t: (p - t).abs().mean() / 0), Rows, "every output is finite .*, the loss of the last one is not; look into the loss"),
])
def test_nan_stops_with_batch_layer_and_mend(make, rows, says):
    with pytest.raises(BadInput, match=says) as e: trainer(**make).fit(rows())
    assert "\n" not in str(e.value)


def test_nan_leaves_the_last_good_checkpoint(tmp_path):
    calls = iter(range(99))
    with pytest.raises(BadInput, match="in batch 5 of epoch 2"):
        trainer(tmp_path, loss=lambda p, t: nn.functional.mse_loss(p, t) * (torch.nan if next(calls) >= 10 else 1)).fit(Rows())
    state = torch.load(tmp_path/"last.pt", weights_only=True)
    assert state["epoch"] == 1 and all(torch.isfinite(v).all() for v in state["model"].values())
    assert json.loads(state["settings"])["batch_size"] == 16


def test_a_metric_of_nan_is_no_epoch():
    t = trainer(); t.metric = lambda p, y: float("nan")
    with pytest.raises(BadInput, match="the metric is nan after epoch 1"): t.fit(Rows(), Rows(9, 1))


@pytest.mark.parametrize("damage", [lambda b: b[:500], lambda b: b"", lambda b: b[:len(b) // 2] + bytes(len(b) - len(b) // 2), lambda b: b"not a checkpoint at all"])
def test_a_damaged_checkpoint_is_said_and_not_used(tmp_path, damage):
    whole = trainer(); whole.fit(Rows(), Rows(9, 1)); trainer(tmp_path, epochs=3).fit(Rows(), Rows(9, 1))
    file, said = tmp_path/"last.pt", []
    file.write_bytes(damage(file.read_bytes()))
    again = trainer(tmp_path, log=said.append); again.fit(Rows(), Rows(9, 1))
    assert "cannot be read" in said[0] and "starting afresh" in said[0] and digest(again) == digest(whole)


def test_the_mean_of_the_weights_is_the_one_that_is_kept():
    "Against the mean by hand, with timm's warm-up of the decay."
    before = []
    def loss(p, y): before.append(t.model.net[0].weight.detach().clone()); return nn.functional.mse_loss(p, y)
    t = trainer(loss=loss, ema=.8, epochs=2); last = []
    t.metric = lambda p, y: last.append(t.model.net[0].weight.detach().clone()) or len(last)
    t.fit(Rows(), Rows(9, 1))
    mean = before[0]
    for step, w in enumerate([*before[1:], last[-1]], 1):
        decay = min(1 - (1 + step - 1) ** (-2 / 3), .8); mean = decay * mean + (1 - decay) * w
    torch.testing.assert_close(t.model.net[0].weight.detach(), mean)
    assert not torch.equal(mean, last[-1])


def test_without_validation_the_last_epoch_is_kept():
    class Worse:
        def at(self, progress): self.times = 1 + 100 * progress
        def __call__(self, pred, true): return self.times * (pred - true).square().mean()
    t = trainer(loss=Worse()); history = t.fit(Rows())
    assert history.loss.argmin() == 0 and t.best == history.metric.iloc[-1]


@pytest.mark.parametrize("broken", [2, 99])
def test_an_overflow_of_float16_is_skipped_unless_it_lasts(monkeypatch, broken):
    "The scaler of a GPU on the processor: a step that overflows changes nothing; twenty-one in a row are an error."
    def half_on_cpu(device, amp):
        accelerator, device = open_accelerator(device, amp)
        accelerator.state._mixed_precision, accelerator.native_amp, accelerator.scaler = "fp16", True, torch.amp.GradScaler("cpu", init_scale=256.)
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
    assert torch.equal(before[3], before[4]) and torch.equal(before[3], before[5]) and not torch.equal(before[5], before[6])
    assert t.accelerator.scaler.get_scale() == 64 and np.isfinite(history.loss).all() and t.step == 34


def test_seeds_and_switches(monkeypatch):
    seed_step(1, 2, 3); a = (torch.rand(2).tolist(), np.random.random())  # noqa: NPY002
    seed_step(1, 2, 3); b = (torch.rand(2).tolist(), np.random.random())  # noqa: NPY002
    seed_step(1, 2, 4); assert a == b and torch.rand(2).tolist() != a[0]
    one, two = trainer(seed=1), trainer(seed=2)
    one.fit(Rows()); two.fit(Rows()); assert digest(one) != digest(two)
    plain, compiled, calls = trainer(), trainer(compile=True, channels_last=True, deterministic=True), []
    monkeypatch.setattr(torch, "compile", lambda m: lambda **kw: calls.append(1) or m(**kw))
    try: plain.fit(Rows()); compiled.fit(Rows()); assert torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(False)
    assert digest(plain) == digest(compiled) and len(calls) == 18


def test_channels_last_reaches_the_pictures():
    class Sees(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 4, 3)
        def forward(self, image): self.seen = image.is_contiguous(memory_format=torch.channels_last); return self.conv(image).mean((2, 3))
    data = torch.utils.data.TensorDataset
    class Pictures(data):
        def __getitem__(self, i): return dict(image=self.tensors[0][i]), self.tensors[1][i]
    rows = Pictures(torch.randn(8, 3, 6, 6), torch.randn(8, 4))
    for wanted in (True, False):
        t = trainer(model=Sees, channels_last=wanted, epochs=1); t.fit(rows)
        assert t.model.seen == wanted and t.model.conv.weight.is_contiguous(memory_format=torch.channels_last) == wanted


def test_precision_follows_the_gpu(monkeypatch):
    for native, wanted in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, native=native: native)
        assert [pick_precision(a, "cuda:0") for a in ("auto", True, False, "no", "fp16")] == [wanted, wanted, "no", "no", "fp16"]
    with pytest.raises(BadInput, match="use amp=auto or amp=fp16"): pick_precision("bf16", "cuda")


@pytest.mark.parametrize("kw, says", [(dict(epochs=0), "epochs=0"), (dict(accumulate=0), "accumulate=0"), (dict(ema=1.), "a decay below 1"), (dict(amp="half"), "unknown amp"), (dict(scheduler="cos"), "did you mean 'cosine'")])
def test_bad_settings_are_one_line(kw, says):
    with pytest.raises(BadInput, match=says): trainer(**kw).fit(Rows())


def test_an_empty_training_set():
    with pytest.raises(BadInput, match="the training set is empty"): trainer().fit(Rows(0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("amp", ["auto", "fp16", "no"])
def test_on_a_gpu_it_learns_in_every_precision(amp, tmp_path):
    rows = Rows(200); t = trainer(tmp_path, device="cuda", amp=amp, channels_last=True, ema=.9, epochs=12, save_every=3)
    history = t.fit(rows, Rows(33, 1))
    assert history.loss.iloc[-1] < .5 * history.loss.iloc[0] and t.device.startswith("cuda")
    if amp == "fp16": assert t.accelerator.scaler.get_scale() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_real_memory_runs_out(tmp_path):
    class Wide(Net):
        def forward(self, image): return super().forward(image) + (image.repeat(1, 2**18).sigmoid() ** 2).mean(1, keepdim=True)
    free, _ = torch.cuda.mem_get_info(); rows = 2 * int(free / (8 * 2**18 * 4 * 3)) + 2
    said = []; t = trainer(model=Wide, device="cuda", amp="no", batch_size=rows, epochs=1, log=said.append); t.fit(Rows(rows))
    assert "out of memory" in said[0] and t.cutter.at_once < rows

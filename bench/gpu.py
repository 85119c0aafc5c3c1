"""Everything about histokit that only a GPU can tell, in one table: speed, memory, and whether results stay the same.

    python bench/gpu.py [--json OUT] [--tiny] [--parts NAME ...]

Runs from a checkout. Nothing is installed: what is missing is named, and the rest goes on. It takes a few minutes on a
card. `--tiny` does the same on the CPU with tiny nets and pictures. Rows are written to OUT after each part. The exit
status is 1 where a part failed, or where nothing could be measured.
"""
import argparse
import functools
import gc
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NEEDED = dict(torch="torch", torchvision="torchvision", timm="timm", accelerate="accelerate", safetensors="safetensors",
    numpy="numpy", scipy="scipy", pandas="pandas", pyarrow="pyarrow", h5py="h5py", PIL="pillow", tqdm="tqdm",
    yaml="pyyaml", psutil="psutil", numba="numba")
PRECISIONS = ("fp16", "bf16")
TARGETS, EPOCHS = 35, 2
CLOSE = .05          # of the way that weights went in training


class Skipped(Exception): "Why something was not measured."


@dataclass
class Row:
    "A line of the table."
    what: str
    value: float | None = None
    unit: str = ""
    seconds: float = 0.      # that it took
    note: str = ""           # what else there is to know; why it was skipped or failed
    status: str = "measured" # measured, skipped or failed


@dataclass(frozen=True)
class Sizes:
    "How large everything is."
    nets: tuple = ("convnext_small", "resnet18")   # that are trained
    small: str = "convnext_tiny"                   # the net of the checks: it has no batch-norm
    px: int = 400
    check_px: int = 160
    batch: int = 32
    slide: int = 2048        # pixels on a side of those that patches are cut from
    side: int = 4096         # of the slide that is repainted
    copied: int = 2**28      # bytes whose copy is timed
    steps: tuple = (4, 150)  # of an epoch: those that warm up, and at most
    epoch_s: float = 4.      # about how long a measured epoch takes
    time_s: float = .3       # for how long a call is repeated


TINY = Sizes(nets=("test_convnext", "test_resnet"), small="test_convnext", px=32, check_px=32, batch=4, slide=256,
    side=256, copied=2**16, steps=(2, 2), epoch_s=.2, time_s=.02)


class Bench:
    "The device, the sizes, and what several parts need."
    def __init__(self, tiny=False):
        import torch
        self.torch, self.tiny, self.sizes = torch, tiny, TINY if tiny else Sizes()
        self.on_card = not tiny
        self.device = "cuda" if self.on_card else "cpu"
        if self.on_card and not torch.cuda.is_available(): raise Skipped("no CUDA device here; --tiny runs on the CPU")
        self.new_folder()

    def new_folder(self):
        "An empty folder for what processes write, gone when this one ends."
        self._temporary = tempfile.TemporaryDirectory(prefix="histokit-gpu-")
        self.folder = Path(self._temporary.name)

    def wait(self):
        "Until the card has done all that it was asked to."
        if self.on_card: self.torch.cuda.synchronize()

    def clean(self):
        "Memory as it was, the peak at 0."
        gc.collect()
        if not self.on_card: return
        self.torch.cuda.empty_cache()
        self.torch.cuda.set_per_process_memory_fraction(1.)
        self.torch.cuda.reset_peak_memory_stats()

    def peak_gib(self):
        "The most memory that tensors took since `clean`; on the CPU that of the process since it began."
        if self.on_card: return self.torch.cuda.max_memory_allocated() / 2**30
        import psutil
        return psutil.Process().memory_info().rss / 2**30

    def seconds(self, call):
        "How long a call takes: warmed up, repeated for a while, everything waited for."
        for _ in range(3): call()
        self.wait()
        start, n = time.perf_counter(), 0
        while n == 0 or time.perf_counter() - start < self.sizes.time_s:
            for _ in range(5): call()
            self.wait()
            n += 5
        return (time.perf_counter() - start) / n

    def copy_seconds(self, n_bytes):
        "How long the device takes to copy so many bytes in its own memory."
        old = self.torch.zeros(n_bytes, dtype=self.torch.uint8, device=self.device)
        new = self.torch.empty_like(old)
        return self.seconds(lambda: new.copy_(old))

    @functools.cached_property
    def slides(self):
        "Two slides, as names and pixels."
        import numpy as np
        from histokit.tissue.toy import other_toy_slide, toy_slide
        side = self.sizes.slide
        part, repeats = min(side, 512), -(-side // 512)
        pictures = toy_slide(part).image, other_toy_slide(part).image
        return {f"S_{i + 1}": np.tile(p, (repeats, repeats, 1))[:side, :side].copy() for i, p in enumerate(pictures)}

    def spots(self, n):
        "A table of n spots anywhere on the slides."
        import numpy as np
        import pandas as pd
        rng = np.random.default_rng(1)
        names = np.array(list(self.slides))[rng.integers(len(self.slides), size=n)]
        x, y = rng.uniform(0, self.sizes.slide - 1, (2, n))
        return pd.DataFrame(dict(slide=names, x=x, y=y))

    def sampler(self, px, device="cpu", **kw):
        from histokit.spots.patches import PatchSampler
        return PatchSampler(self.slides, (px,), device=device, **kw)

    def patches(self, n, px, device="cpu"):
        "The patch dataset: n augmented patches with targets."
        from histokit.spots.patches import Augmentation, HESpotDataset
        target = self.torch.randn(n, TARGETS, generator=self.torch.Generator().manual_seed(2))
        return HESpotDataset(self.spots(n), self.sampler(px, device), target=target.numpy(), augment=Augmentation())

    def model(self, net, **kw):
        "A net with random weights, the same each time."
        from histokit.core.compute import seed_everything
        from histokit.spots.network import create_model
        seed_everything(0)
        return create_model(TARGETS, net, "none", **kw)

    def plain_model(self):
        "The net of the checks: nothing in it depends on how a batch is cut, or on chance."
        return self.model(self.sizes.small, head="linear", dropout=0.)

    def trainer(self, model, folder="", **settings):
        from histokit.learn.trainer import Trainer
        mse = self.torch.nn.functional.mse_loss
        settings = dict(epochs=EPOCHS, batch_size=self.sizes.batch, device=self.device) | settings
        return Trainer(model, mse, None, folder, **settings)


def weights_of(model):
    "All weights in one vector on the CPU, float64."
    import torch
    return torch.cat([v.detach().cpu().double().flatten() for v in model.state_dict().values()])


def distance(end, other, start):
    "How far two trainings ended from each other, as a share of the way they went."
    return float((end - other).norm() / (end - start).norm())


def check(value, most, what):
    "Fail where a difference is too large."
    if not value <= most: raise AssertionError(f"{what}: {value:.3g}, more than {most:g}")
    return value


# training

def check_precision(b, precision):
    "What the precision is called on this device; `Skipped` where it cannot be had."
    if not b.on_card: return f"{precision} (bf16 on the CPU)"
    if precision == "bf16" and not b.torch.cuda.is_bf16_supported(including_emulation=False):
        raise Skipped(f"{b.torch.cuda.get_device_name()} does not compute in bfloat16")
    return precision


def autocast_on_cpu(b, model):
    "The model computing in bfloat16 where there is no card; the trainer uses half precision on a GPU only."
    forward = model.forward
    def run(*args, **kw):
        with b.torch.autocast("cpu", b.torch.bfloat16): return forward(*args, **kw)
    model.forward = run


def train_net(b, net, precision, on_card=False, **settings):
    "Images a second, the share of time that the device waits for data, and memory, of a net trained on patches."
    s, called = b.sizes, check_precision(b, precision)
    what = ", ".join([net, f"{s.px} px", f"batch {s.batch}", called, *settings, *["patches cut on the card"] * on_card])
    model = b.model(net)
    if not b.on_card: autocast_on_cpu(b, model)
    def last_epoch(steps):
        data = b.patches(steps * s.batch, s.px, b.device if on_card else "cpu")
        return b.trainer(model, amp=precision, **settings).fit(data).iloc[-1]
    few, many = s.steps
    step = last_epoch(few).seconds / few                                    # warms up, too
    b.clean()
    steps = int(min(max(s.epoch_s / step, few), many))
    last = last_epoch(steps)
    if not math.isfinite(last.loss): raise AssertionError(f"{what}: the loss is {last.loss}")
    yield Row(f"{what}: training", steps * s.batch / last.seconds, "images/s", note=f"{steps} steps of an epoch")
    yield Row(f"{what}: waiting for data", 100 * last.waited / last.seconds, "%")
    yield Row(f"{what}: peak memory", b.peak_gib(), "GiB")
    yield Row(f"{what}: rows at once", int(last.at_once), "rows")


# slides on the card

def copy_memory(b):
    "What the memory of the device can do."
    took = b.copy_seconds(b.sizes.copied)
    yield Row("copy in the device's own memory, read and written", 2 * b.sizes.copied / took / 1e9, "GB/s")


def cut_patches(b):
    "The torch engine of the patch sampler, with the slides where the device is."
    from histokit.spots.patches import Augmentation
    from histokit.spots.sampling import sample_torch
    n, px = 4 * b.sizes.batch, b.sizes.px
    spots, sampler, slow = b.spots(n), b.sampler(px, b.device), b.sampler(px, engine="numpy")
    names, xy = spots.slide.tolist(), spots[["x", "y"]].to_numpy()
    copy = b.copy_seconds(n * 3 * px * px)
    for kind, how in {"plain": {}, "augmented": Augmentation().draw(n)}.items():
        def cut(how=how): return sample_torch(sampler.device_atlas(), sampler.atlas, sampler.plan(names, xy, **how))
        off = (cut().cpu().int() - slow.sample(names, xy, **how)[:, 0].int()).abs()
        took, what = b.seconds(cut), f"{px} px patches, {kind}, slides on the device"
        yield Row(f"{what}: cut", n * px * px / took / 1e6, "megapixels/s")
        yield Row(f"{what}: of the device's copy", 100 * copy / took, "%")
        yield Row(f"{what}: off the CPU's", check(int(off.max()), 1, what), "grey levels at most")


def repaint_slide(b):
    "The stain transform where the slide is on the device, and from and to memory of the host."
    import numpy as np
    from histokit.tissue.repaint import repaint, tensor_painter
    slide, plan = stain_plan(b)
    rows = b.torch.from_numpy(slide.reshape(-1, plan.factor.size)).to(b.device)
    out, paint, pixels = b.torch.empty_like(rows), tensor_painter(plan, len(rows), b.device), slide[..., 0].size
    def transform(): out.copy_(paint(rows))         # noqa: F821 (they are deleted below)
    took = b.seconds(transform)
    what = f"stain of a slide of {b.sizes.side} x {b.sizes.side}"
    yield Row(f"{what}: on the device", pixels / took / 1e6, "megapixels/s")
    yield Row(f"{what}: of the device's copy", 100 * b.copy_seconds(slide.nbytes) / took, "%")
    off = np.abs(out.cpu().numpy().reshape(slide.shape).astype(int) - repaint(slide, plan, "numpy"))
    yield Row(f"{what}: off the CPU's", check(int(off.max()), 1, what), "grey levels at most")
    del rows, out, paint
    for most in (2**17, 2**20, 2**22):
        took = b.seconds(lambda most=most: repaint(slide, plan, "torch", b.device, pixels=most))
        yield Row(f"{what}: from and to the host, {most} pixels at a time", pixels / took / 1e6, "megapixels/s")


def stain_plan(b):
    "A slide, and how it is given the look of another."
    import numpy as np
    from histokit.tissue.measure import measure_stain
    from histokit.tissue.repaint import paint_plan
    reference, other = b.slides.values()
    target, source = measure_stain(reference), measure_stain(other)
    repeats = -(-b.sizes.side // len(other))
    slide = np.tile(other, (repeats, repeats, 1))[:b.sizes.side, :b.sizes.side].copy()
    matrices = source["stain_matrix"], target["stain_matrix"]
    return slide, paint_plan(*matrices, (1.1, .9), source["white"], target["white"])


def jitter_stain(b):
    "Stain augmentation of a batch on the device."
    from histokit.tissue.jitter import StainJitter
    n = b.sizes.batch
    inputs, _ = b.patches(n, b.sizes.px).batch(range(n))
    batch = inputs["image"].to(b.device)
    took = b.seconds(lambda: StainJitter()(batch))
    yield Row(f"stain jitter, {b.sizes.px} px, batch {n}", n / took, "images/s")


# the same results

def compare_devices(b, net, amp):
    "Predictions on the card against those on the CPU, as a share of the largest."
    from histokit.learn.batches import predict
    called = "float32" if amp == "no" else check_precision(b, amp)
    model, data = b.model(net), b.patches(16, b.sizes.check_px)
    cpu = predict(model, data, 8, "cpu")[0]
    if not b.on_card and amp != "no": autocast_on_cpu(b, model)
    off = abs(predict(model, data, 8, b.device, amp=amp)[0] - cpu).max() / abs(cpu).max()
    what = f"{net}, {called}: predictions off the CPU's"
    yield Row(what, 100 * check(float(off), .05 if "bf16" in called else .01, what), "% of the largest")


def halve_batch(b):
    "A batch that does not fit, with the memory of the card cut down: training goes on with fewer rows at once."
    b.torch.backends.cudnn.allow_tf32 = False                  # rounding is to be the only difference
    data, lines = b.patches(3 * b.sizes.batch, b.sizes.check_px), []
    start, whole = weights_of(b.plain_model()), train_plain(b, data)
    if int(whole.history[-1]["at_once"]) < b.sizes.batch: raise Skipped("this card is full without being cut down")
    end = weights_of(whole.model)
    peak, base = (b.torch.cuda.max_memory_allocated(), b.torch.cuda.memory_allocated()) if b.on_card else (0, 0)
    del whole
    b.clean()
    cut = train_plain(b, data, log=lines.append, room=.4 * (peak - base) + base)
    rows, out = int(cut.history[-1]["at_once"]), [line for line in lines if "out of memory" in line]
    if not out or rows >= b.sizes.batch: raise AssertionError(f"memory never ran out: {rows} rows at once")
    yield Row("out of memory: batch that did not fit", b.sizes.batch, "rows", note=out[-1])
    yield Row("out of memory: rows it went on with", rows, "rows")
    off = check(distance(weights_of(cut.model), end, start), CLOSE, "weights after running out of memory")
    yield Row("out of memory: weights off those of the whole batch", 100 * off, "% of the way")


def train_plain(b, data, log=None, room=None):
    "The trainer of the checks after its run, with so many bytes of the card where that is said."
    model = b.plain_model()
    if room is not None: cut_memory(b, model, room)
    trainer = b.trainer(model, log=log, amp="no", epochs=1)
    trainer.fit(data)
    return trainer


def cut_memory(b, model, room):
    "Let the process have so many bytes of the card; on the CPU a model stands for it that refuses most of a batch."
    if b.on_card:
        total = b.torch.cuda.get_device_properties(0).total_memory
        return b.torch.cuda.set_per_process_memory_fraction(min(room / total, 1.))
    forward, most = model.forward, b.sizes.batch // 3
    def run(image, **kw):
        if not model.training or len(image) <= most: return forward(image, **kw)
        raise b.torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    model.forward = run


# processes

class Slow:
    "A dataset whose batches take a while, so that a kill finds training under way."
    def __init__(self, data, pause): self.data, self.pause, self.target = data, pause, data.target
    def __len__(self): return len(self.data)
    def epoch(self, seed): return Slow(self.data.epoch(seed), self.pause)
    def batch(self, rows):
        time.sleep(self.pause)
        return self.data.batch(rows)


def child(b, folder, pause, deterministic):
    "What a process of its own does: train the plain net, and write its weights."
    data = Slow(b.patches(6 * b.sizes.batch, b.sizes.check_px), pause)
    b.torch.backends.cudnn.allow_tf32 = False
    settings = dict(amp="no", save_every=1, deterministic=deterministic, log=functools.partial(print, flush=True))
    trainer = b.trainer(b.plain_model(), folder, **settings)
    trainer.fit(data)
    if trainer.main: b.torch.save(weights_of(trainer.model), Path(folder)/"end.pt")


def start_child(b, name, processes=1, pause=0., deterministic=True):
    "Start training in processes of their own; gives the process and its folder."
    spec = dict(folder=str(b.folder/name), pause=pause, deterministic=deterministic)
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *many, __file__, "--child", json.dumps(spec), *["--tiny"] * b.tiny]
    env = os.environ | (dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true") if b.tiny else {})
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=env, **pipes), b.folder/name


def end_child(process, folder):
    "The weights that a child ended with, and what it printed."
    import torch
    try: printed, _ = process.communicate(timeout=180)
    finally: process.kill()
    if process.returncode: raise RuntimeError(f"a child failed: …{printed.strip()[-600:]}")
    return torch.load(folder/"end.pt"), printed


def kill_inside(process, folder, saves=3):
    "Kill a child once it has written its state so many times."
    file, seen, end = folder/"last.pt", set(), time.time() + 180
    while len(seen) < saves:
        if process.poll() is not None: raise RuntimeError(f"ended before its kill: …{process.stdout.read()[-600:]}")
        if time.time() > end: raise RuntimeError("wrote no state in three minutes")
        if file.exists(): seen.add(file.stat().st_mtime_ns)
        time.sleep(.01)
    process.kill()
    process.wait()


def with_bits(b, part):
    "A part with kernels that give the same bits, or else, where one has no such kernel, without."
    try: yield from part(b, True)
    except RuntimeError as e:
        if "determinis" not in str(e): raise
        b.new_folder()
        for row in part(b, False):
            row.note = "a kernel has no deterministic form: to rounding"
            yield row


def resume_run(b, deterministic):
    "A run that is killed and goes on, against one that is not."
    whole = start_child(b, "whole", deterministic=deterministic)
    killed = start_child(b, "killed", pause=.2, deterministic=deterministic)
    try: kill_inside(*killed)
    finally: end, _ = end_child(*whole)
    again, printed = end_child(*start_child(b, "killed", deterministic=deterministic))
    if "going on after" not in printed: raise AssertionError("the killed run began afresh")
    what = "killed and resumed: weights off those of a whole run"
    off = distance(again, end, weights_of(b.plain_model()))
    note = "bit for bit" if deterministic else ""
    yield Row(what, 100 * check(off, 0 if deterministic else CLOSE, what), "% of the way", note=note)


def share_run(b, deterministic):
    "The weights of two processes that train together, against those of one."
    cards = b.torch.cuda.device_count()
    if b.on_card and cards < 2: raise Skipped(f"needs two cards, and there is {cards}")
    one, _ = end_child(*start_child(b, "one", deterministic=deterministic))
    two, _ = end_child(*start_child(b, "two", processes=2, deterministic=deterministic))
    off = check(distance(two, one, weights_of(b.plain_model())), CLOSE, "weights of two processes")
    yield Row("two processes: weights off those of one", 100 * off, "% of the way")


# the table

def all_parts(sizes):
    "The parts by name; the riskiest last."
    part, (large, small) = functools.partial, sizes.nets
    parts = dict(copy=copy_memory, patches=cut_patches, stain=repaint_slide, jitter=jitter_stain)
    for net in sizes.nets:
        for precision in PRECISIONS: parts[f"{net}-{precision}"] = part(train_net, net=net, precision=precision)
    parts[f"{large}-fp16-channels-last"] = part(train_net, net=large, precision="fp16", channels_last=True)
    parts[f"{small}-fp16-on-card"] = part(train_net, net=small, precision="fp16", on_card=True)
    for net in (sizes.small, small):
        for amp in ("no", *PRECISIONS): parts[f"devices-{net}-{amp}"] = part(compare_devices, net=net, amp=amp)
    return parts | dict(memory=halve_batch, resume=part(with_bits, part=resume_run),
        processes=part(with_bits, part=share_run))


def run_part(b, name, part):
    "The rows of a part; whatever goes wrong is a row."
    start = time.perf_counter()
    try:
        b.clean()
        for row in part(b):
            row.seconds, start = time.perf_counter() - start, time.perf_counter()
            yield row
    except Skipped as e: yield Row(name, note=str(e), status="skipped")
    except ModuleNotFoundError as e:
        yield Row(name, note=f"pip install {NEEDED.get(e.name, e.name)}", status="skipped")
    except Exception as e:
        text = " ".join(str(e).split())
        yield Row(name, seconds=time.perf_counter() - start, note=f"{type(e).__name__}: {text[:500]}", status="failed")


def run_in_fresh_process(names, tiny):
    "The rows of parts run by another process, since an error of CUDA leaves this one's card useless."
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)/"rows.json"
        command = [sys.executable, __file__, "--json", str(out), "--parts", *names, *["--tiny"] * tiny]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        rows = [Row(**r) for r in json.loads(out.read_text())["rows"]] if out.exists() else []
    return shown(rows or [Row(name, note="its process died", status="failed") for name in names])


def show(row):
    "One line of the table."
    value = "" if row.value is None else f"{row.value:,.4g}"
    status = "" if row.status == "measured" else row.status.upper() + ": "
    print(f"{row.what:92} {value:>9} {row.unit:20} {row.seconds:6.1f} s  {status}{row.note}", flush=True)


def shown(rows):
    "The rows, printed."
    for row in rows: show(row)
    return rows


def about(tiny):
    "The machine."
    found = dict(tiny=tiny, python=platform.python_version(), cpus=os.cpu_count(), machine=platform.machine())
    if not importlib.util.find_spec("torch"): return found
    import torch
    found |= dict(torch=torch.__version__, cuda=torch.version.cuda)
    if not torch.cuda.is_available(): return found
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return found | dict(cards=[f"{c.name}, {c.total_memory / 2**30:.0f} GiB, sm_{c.major}{c.minor}" for c in cards])


def run_all(names, tiny, written):
    "The rows of all parts, printed as they come; `written(rows)` is called after each part."
    parts, rows = {n: p for n, p in all_parts(TINY if tiny else Sizes()).items() if not names or n in names}, []
    if tiny and not names: parts["processes"] = not_tiny
    try: b = Bench(tiny)
    except (Skipped, ModuleNotFoundError) as e:
        why = str(e) if isinstance(e, Skipped) else f"pip install {e.name}"
        return shown([Row(n, note=why, status="skipped") for n in parts])
    for name, part in parts.items():
        for row in run_part(b, name, part):
            rows.append(row)
            show(row)
        written(rows)
        left = list(parts)[list(parts).index(name) + 1:]
        if rows[-1].status == "failed" and "CUDA error" in rows[-1].note and left:
            return rows + run_in_fresh_process(left, tiny)
    return rows


def not_tiny(b):
    raise Skipped("needs two cards; `--tiny --parts processes` does it with two processes on the CPU")
    yield


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", default="", help="where the rows are written")
    p.add_argument("--tiny", action="store_true", help="tiny nets and pictures on the CPU")
    p.add_argument("--parts", nargs="*", default=[], help="some parts by name; all where none is given")
    p.add_argument("--child", default="", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return child(Bench(a.tiny), **json.loads(a.child))
    if unknown := set(a.parts) - set(all_parts(TINY if a.tiny else Sizes())): p.error(f"unknown parts: {unknown}")
    missing = [pip for name, pip in NEEDED.items() if not importlib.util.find_spec(name)]
    if missing: print(f"missing: pip install {' '.join(missing)}\n", flush=True)
    found = about(a.tiny)
    print(", ".join(f"{k} {v}" for k, v in found.items()), flush=True)
    def written(rows):
        text = json.dumps(dict(about=found, rows=[asdict(r) for r in rows]), indent=1)
        if a.json: Path(a.json).write_text(text)
    rows = run_all(a.parts, a.tiny, written)
    written(rows)
    counts = {s: sum(r.status == s for r in rows) for s in ("measured", "skipped", "failed")}
    print(", ".join(f"{n} {s}" for s, n in counts.items()))
    return int(counts["failed"] > 0 or counts["measured"] == 0)


if __name__ == "__main__": sys.exit(main())

"""Stain normalisation of one large slide, and stain augmentation of batches: histokit's engines, and every other implementation that is installed.

    python tests/bench_stain.py [--side 4096] [--image TILE.png] [--alternatives-python PATH]

The slide is a tile repeated. Times are the best of several runs; extra memory is the peak of the process during the call, over what it held before, as a share of the slide, the result included.
Alternatives that do not install beside histokit can lie in an environment of their own, whose interpreter is given: they then run on the same slide, in a process of theirs.
    python -m venv alternatives && alternatives/bin/pip install 'setuptools<81' numpy psutil torch torchvision staintools spams-bin torchstain torch-staintools tiatoolbox openslide-bin
Each transform reads the slide's stain and repaints it. The last column is how far the result is from staintools', in grey levels: near 0 the same was computed."""
import argparse, contextlib, importlib, importlib.util, json, os, platform, subprocess, sys, tempfile, threading, time
from pathlib import Path

import numpy as np
import psutil
import torch
from histokit.core.pictures import as_rgb
from histokit.tissue.jitter import RandomReference, StainJitter
from histokit.tissue.measure import measure
from histokit.tissue.normalise import StainNormalizer
from histokit.tissue.repaint import paint_plan, repaint_tensor


def painted(size=512, seed=0):
    "A tile of nuclei on stroma."
    from scipy import ndimage
    rng = np.random.default_rng(seed)
    nuclei = ndimage.gaussian_filter((ndimage.gaussian_filter(rng.random((size, size)), 3) > .515).astype(float), 1)
    stroma = .3 + .7 * (np.clip(ndimage.gaussian_filter(rng.standard_normal((size, size)), 6) * 9, -1, 1) + 1) / 2
    vectors = np.array([[.55, .73, .40], [.25, .88, .40]])
    light = 255 * np.exp(-np.stack([nuclei * 1.1, stroma * (1 - .8 * nuclei) * .7], -1) @ vectors) + rng.normal(0, 2, (size, size, 3))
    return light.clip(0, 255).astype(np.uint8)


class PeakMemory:
    "The most memory that the process held above what it held at first, bytes."
    def __enter__(self):
        self.process, self.stop = psutil.Process(), threading.Event()
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch, daemon=True); self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(.001): self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_):
        self.stop.set(); self.thread.join()
        self.extra = max(self.peak, self.process.memory_info().rss) - self.start


def clock(call, runs):
    "Best time in seconds, the extra memory of the first run in bytes, and the result."
    times = []
    for i in range(runs):
        with PeakMemory() if i == 0 else contextlib.nullcontext() as memory:
            start = time.perf_counter(); result = call(); times.append(time.perf_counter() - start)
        if i == 0: extra = memory.extra
        if i + 1 < runs: del result
    return min(times), extra, result


# each gives what fits a slide, and what transforms it, reading its stain anew

def ours(engine, device="cpu", **params):
    params = dict(engine=engine, device=device, white=255) | params      # the white point that the others take
    def make(reference, slide):
        from histokit.tissue.normalise import StainNormalizer
        n = StainNormalizer(**params).fit(reference)
        n.transform(slide[:512, :512])                                   # compiled once for all
        return lambda: StainNormalizer(**params).fit(slide), lambda: n.transform(slide)
    return make


def staintools(reference, slide):
    import staintools as st
    n = st.StainNormalizer("vahadane"); n.fit(reference.copy())
    return lambda: st.StainNormalizer("vahadane").fit(slide), lambda: n.transform(slide)


def torchstain(reference, slide):
    import torchstain.torch.normalizers as tn
    n = tn.TorchMacenkoNormalizer(); chw = lambda im: torch.from_numpy(im).permute(2, 0, 1).float()
    n.fit(chw(reference))
    return lambda: tn.TorchMacenkoNormalizer().fit(chw(slide)), lambda: n.normalize(I=chw(slide), stains=False)[0].numpy()


def tiatoolbox(reference, slide):
    from tiatoolbox.tools.stainnorm import VahadaneNormalizer
    n = VahadaneNormalizer(); n.fit(reference)
    return lambda: VahadaneNormalizer().fit(slide), lambda: n.transform(slide)


def torch_staintools(reference, slide):
    from torch_staintools.constants import CONFIG
    CONFIG.ENABLE_COMPILE = False                      # compiling takes minutes
    from torch_staintools.normalizer.factory import NormalizerBuilder
    nchw = lambda im: torch.from_numpy(im).permute(2, 0, 1)[None].float() / 255
    n = NormalizerBuilder.build("vahadane"); n.fit(nchw(reference))
    return lambda: NormalizerBuilder.build("vahadane").fit(nchw(slide)), lambda: (n(nchw(slide))[0].permute(1, 2, 0) * 255).numpy()


# name -> module, what makes it, and by how much smaller a side its slide has, where a whole one takes an hour
OTHERS = {"staintools Vahadane": ("staintools", staintools, 1), "torchstain Macenko": ("torchstain", torchstain, 1), "tiatoolbox Vahadane": ("tiatoolbox", tiatoolbox, 1),
    "torch-staintools Vahadane": ("torch_staintools", torch_staintools, 8)}


def measure(name, make, reference, slide, runs):
    "What one implementation takes, as a flat dict; the picture is looked at in every eighth pixel."
    fit, transform = make(reference, slide)
    fit_s = clock(fit, runs)[0]; seconds, extra, result = clock(transform, runs)
    return dict(name=name, side=slide.shape[0], fit=fit_s, seconds=seconds, extra=extra / slide.nbytes, pixels=np.asarray(result)[:1024:8, :1024:8].astype(float).tolist())


# what augments a batch (B, 3, H, W) uint8; most libraries take one picture at a time

def each(call): return lambda batch: torch.stack([call(im) for im in batch])


def colour_jitter():
    from torchvision.transforms import v2
    return v2.ColorJitter(.2, .2, .2, .05)


def macenko_augmentor():
    from torchstain.torch.augmentors import TorchMacenkoAugmentor
    def augment(im): a = TorchMacenkoAugmentor(); a.fit(im); return a.augment()
    return each(augment)


def torch_staintools_augmentor():
    from torch_staintools.augmentor.factory import AugmentorBuilder
    a = AugmentorBuilder.build("macenko")
    return lambda batch: a(batch.float() / 255)


def tiatoolbox_augmentor():
    from tiatoolbox.tools.stainaugment import StainAugmentor
    a = StainAugmentor("macenko", stain_matrix=np.array([[.65, .70, .29], [.07, .99, .11]]))
    return each(lambda im: torch.from_numpy(a(im.permute(1, 2, 0).numpy())))


AUGMENTORS = {"torchvision ColorJitter, batch": ("torchvision", colour_jitter), "torchvision ColorJitter, each": ("torchvision", lambda: each(colour_jitter())),
    "torchstain Macenko augmentor": ("torchstain", macenko_augmentor), "torch-staintools Macenko": ("torch_staintools", torch_staintools_augmentor), "tiatoolbox StainAugmentor": ("tiatoolbox", tiatoolbox_augmentor)}


def images_per_second(call, batch, runs=3):
    call(batch)
    return len(batch) / clock(lambda: call(batch), runs)[0]


def batches(tile):
    "Batches of 32 crops of a tile."
    big = np.tile(tile, (2, 2, 1)); rng = np.random.default_rng(0)
    for px in (224, 400):
        yield px, torch.from_numpy(np.stack([big[y:y + px, x:x + px] for y, x in rng.integers(0, tile.shape[0], (32, 2))]).transpose(0, 3, 1, 2).copy())


def other(name, reference, slide):
    "What an alternative takes, as a dict."
    module, make, part = OTHERS[name]
    try: importlib.import_module(module)
    except Exception as e: return dict(name=name, missing=f"not installed ({type(e).__name__}: {e}); pip install {module.replace('_', '-')}")
    try: return measure(name, make, reference, slide[:slide.shape[0] // part, :slide.shape[1] // part].copy(), 1)
    except Exception as e: return dict(name=name, missing=f"failed ({type(e).__name__}: {e})")


def augmentors(tile):
    "What the alternatives of this interpreter take to augment, a dict each."
    for px, batch in batches(tile):
        for name, (module, make) in AUGMENTORS.items():
            if not importlib.util.find_spec(module): continue
            try: yield dict(name=name, px=px, rate=images_per_second(make(), batch, 1))
            except Exception as e: yield dict(name=name, px=px, missing=f"failed ({type(e).__name__})")


def work(a):
    "One of the jobs in a process of its own: what an earlier one left in memory would hide what this one takes."
    with np.load(a.worker) as f: tile, slide, reference = f["tile"], f["slide"], f["reference"]
    results = augmentors(tile) if a.job == "augment" else [other(a.job, reference, slide)] if a.job in OTHERS else [measure(a.job, engines()[a.job], reference, slide, a.runs)]
    for r in results: print("RESULT " + json.dumps(r), flush=True)


def apart(python, file, job, runs):
    "The results of a job, done by that interpreter."
    with tempfile.TemporaryFile("w+") as out:
        try: failed = subprocess.run([python, __file__, "--worker", str(file), "--job", job, "--runs", str(runs)], stdout=out, timeout=1200).returncode
        except subprocess.TimeoutExpired: failed = "stopped after 20 minutes"
        if failed: print(f"{job}: {failed}")
        out.seek(0); return [json.loads(line[7:]) for line in out if line.startswith("RESULT ")]


def show(r, copy, base):
    "One line of the table; copy and base are seconds a pixel."
    if "missing" in r: return print(f"{r['name']:30s} {r['missing'][:150]}")
    pixel = r["seconds"] / r["side"] ** 2
    off = f"{np.abs(np.asarray(r['pixels'])[:128, :128] - base[1][:len(r['pixels']), :len(r['pixels'])]).mean():10.2f}" if base else ""
    print(f"{r['name']:30s} {r['side']:6d} {r['fit']:9.3f} {r['seconds']:12.3f} {f'{base[0] / pixel:.3g} x' if base else '':>10} {r['extra']:12.2f} x {copy / pixel:9.2%} {1e-6 / pixel:9.3g} {off}", flush=True)


def gpu(slide, reference):
    "Megapixels a second of the arithmetic on the device, against the device's own copy."
    s, n = measure(slide), StainNormalizer().fit(reference)
    plan = paint_plan(s["stain_matrix"], n.stain_matrix_, 1., s["white"], n.white_)
    rows = torch.from_numpy(slide.reshape(-1, plan.factor.size)).cuda(); out = torch.empty_like(rows)
    def timed(call):
        for _ in range(3): call()
        torch.cuda.synchronize(); start = time.perf_counter()
        for _ in range(20): call()
        torch.cuda.synchronize(); return (time.perf_counter() - start) / 20
    ours_s, copy_s = timed(lambda: out.copy_(repaint_tensor(rows, plan))), timed(lambda: out.copy_(rows))
    print(f"{torch.cuda.get_device_name()}: {slide.shape[0] * slide.shape[1] / ours_s / 1e6:.0f} megapixels a second, {copy_s / ours_s:.1%} of the card's copy")


def pictures(a):
    "A tile, the slide made of it, and a reference of another colour."
    from histokit.core.pictures import read_picture
    tile = as_rgb(read_picture(a.image)) if a.image else painted()
    slide = np.tile(tile, (-(-a.side // tile.shape[0]), -(-a.side // tile.shape[1]), 1))[:a.side, :a.side].copy()
    reference = as_rgb(read_picture(a.reference)) if a.reference else (255 * (painted(seed=1) / 255.) ** [1.2, .9, 1.1]).astype(np.uint8)
    return tile, slide, reference


def engines():
    "Our engines that are here."
    found = {f"histokit {e}": ours(e) for e in ["numba"] * bool(importlib.util.find_spec("numba")) + ["torch", "numpy"]}
    found["histokit, white measured, ink"] = ours("auto", white=None, keep_ink=True)
    if torch.cuda.is_available(): found["histokit torch on CUDA"] = ours("torch", device="cuda")
    return found


def transforms(tile, slide, reference, a):
    "The table of transforms; gives what the alternatives took for augmentation."
    target = np.empty_like(slide); copy = clock(lambda: np.copyto(target, slide), 10)[0] / slide[..., 0].size
    print(f"slide {a.side} x {a.side}, {slide.nbytes / 1e6:.0f} MB; {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__} with {torch.get_num_threads()} threads, numpy {np.__version__}; "
        f"load {os.getloadavg()[0]:.1f}; a copy takes {copy * slide[..., 0].size * 1e3:.1f} ms")
    print(f"{'':30s} {'side':>6} {'fit, s':>9} {'transform, s':>12} {'faster':>10} {'extra memory':>14} {'of copy':>9} {'Mpx/s':>9} {'grey levels':>10}")
    base, augmented, python = None, {}, a.alternatives_python
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/"slide.npz"; np.savez(file, reference=reference, slide=slide, tile=tile)
        for job in [*OTHERS, *engines()]:
            there = job in OTHERS and python and not importlib.util.find_spec(OTHERS[job][0])
            for r in apart(python if there else sys.executable, file, job, a.runs):
                if job.startswith("staintools ") and "seconds" in r: base = r["seconds"] / r["side"] ** 2, np.asarray(r["pixels"])
                show(r, copy, base)
        for interpreter in {sys.executable, python or sys.executable}:
            for r in apart(interpreter, file, "augment", 1): augmented.setdefault(r["name"], {}).setdefault(r["px"], r.get("rate", r.get("missing")))
    return augmented


def augment(tile, found, runs):
    "The table of augmentations, images a second at batch 32."
    report = measure(tile); rates = {}
    for px, batch in batches(tile):
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            b = batch.to(device); there = " on CUDA" * (device == "cuda")
            for name, call in {"histokit StainJitter": StainJitter(), "histokit RandomReference": RandomReference([report], report)}.items():
                wait = (lambda x, call=call: call(x).sum().item()) if device == "cuda" else call
                rates.setdefault(name + there, {})[px] = images_per_second(wait, b, runs)
    rates |= found
    print(f"\nimages a second, batches of 32, {torch.get_num_threads()} threads")
    for name, r in rates.items(): print(f"{name:36s}" + "".join(f" {px} px: {v:8.0f}" if isinstance(v, float) else f" {px} px: {v[:80]}" for px, v in r.items()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--side", type=int, default=4096); p.add_argument("--image", default=""); p.add_argument("--reference", default=""); p.add_argument("--runs", type=int, default=5)
    p.add_argument("--alternatives-python", default=""); p.add_argument("--worker", default="", help=argparse.SUPPRESS); p.add_argument("--job", default="", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker: return work(a)
    tile, slide, reference = pictures(a)
    augment(tile, transforms(tile, slide, reference, a), a.runs)
    if torch.cuda.is_available(): gpu(slide, reference)
    else: print("no GPU here")


if __name__ == "__main__": sys.exit(main())

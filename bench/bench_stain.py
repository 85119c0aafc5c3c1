"""Stain normalisation of a large slide and augmentation of batches: histokit's engines, and all others that are here.

    python bench/bench_stain.py [--side 4096] [--image TILE.png] [--alternatives-python PATH]

The slide is a tile repeated. Times are the best of several runs. Extra memory is the peak of the process during the
call, over what it held before, as a share of the slide, the result included. Each transform reads the slide's stain and
repaints it. The last column is how far the result is from staintools', in grey levels: near 0 the same was computed.

Alternatives that do not install beside histokit can lie in an environment of their own, whose interpreter is given.
They then run on the same slide, in a process of theirs.

    python -m venv alternatives
    alternatives/bin/pip install 'setuptools<81' numpy psutil torch torchvision staintools spams-bin torchstain \\
        torch-staintools tiatoolbox openslide-bin

What a GPU does is measured by bench/gpu.py.
"""
import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch


class PeakMemory:
    "The most memory that the process held above what it held at first, bytes."
    def __enter__(self):
        self.process, self.stop = psutil.Process(), threading.Event()
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop.wait(.001): self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.extra = max(self.peak, self.process.memory_info().rss) - self.start


def clock(call, runs):
    "Best time in seconds, the extra memory of the first run in bytes, and the result."
    times, memory = [], PeakMemory()
    for i in range(runs):
        with memory if i == 0 else contextlib.nullcontext():
            start = time.perf_counter()
            result = call()
            times.append(time.perf_counter() - start)
        if i + 1 < runs: del result
    return min(times), memory.extra, result


# each makes, of a reference and a slide, what fits the slide and what transforms it, reading its stain anew

def ours(engine, **params):
    params = dict(engine=engine, white=255) | params                     # the white point that the others take
    def make(reference, slide):
        from histokit.tissue.normalise import StainNormalizer
        n = StainNormalizer(**params).fit(reference)
        n.transform(slide[:512, :512])                                   # compiled once for all
        return lambda: StainNormalizer(**params).fit(slide), lambda: n.transform(slide)
    return make


def staintools(reference, slide):
    import staintools as st
    n = st.StainNormalizer("vahadane")
    n.fit(reference.copy())
    return lambda: st.StainNormalizer("vahadane").fit(slide), lambda: n.transform(slide)


def torchstain(reference, slide):
    import torchstain.torch.normalizers as tn
    def chw(image): return torch.from_numpy(image).permute(2, 0, 1).float()
    n = tn.TorchMacenkoNormalizer()
    n.fit(chw(reference))
    def transform(): return n.normalize(I=chw(slide), stains=False)[0].numpy()
    return lambda: tn.TorchMacenkoNormalizer().fit(chw(slide)), transform


def tiatoolbox(reference, slide):
    from tiatoolbox.tools.stainnorm import VahadaneNormalizer
    n = VahadaneNormalizer()
    n.fit(reference)
    return lambda: VahadaneNormalizer().fit(slide), lambda: n.transform(slide)


def torch_staintools(reference, slide):
    from torch_staintools.constants import CONFIG
    from torch_staintools.normalizer.factory import NormalizerBuilder
    CONFIG.ENABLE_COMPILE = False                      # compiling takes minutes
    def nchw(image): return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    n = NormalizerBuilder.build("vahadane")
    n.fit(nchw(reference))
    def transform(): return (n(nchw(slide))[0].permute(1, 2, 0) * 255).numpy()
    return lambda: NormalizerBuilder.build("vahadane").fit(nchw(slide)), transform


# name -> module, what makes it, and by how much smaller a side its slide has, where a whole one takes an hour
OTHERS = {
    "staintools Vahadane": ("staintools", staintools, 1),
    "torchstain Macenko": ("torchstain", torchstain, 1),
    "tiatoolbox Vahadane": ("tiatoolbox", tiatoolbox, 1),
    "torch-staintools Vahadane": ("torch_staintools", torch_staintools, 8)}


def engines():
    "Our engines that are here."
    here = ["numba"] * bool(importlib.util.find_spec("numba")) + ["torch", "numpy"]
    found = {f"histokit {engine}": ours(engine) for engine in here}
    found["histokit, white measured, ink"] = ours("auto", white=None, keep_ink=True)
    if torch.cuda.is_available(): found["histokit torch on CUDA"] = ours("torch", device="cuda")
    return found


def time_transform(name, make, reference, slide, runs):
    "What one implementation takes, as a flat dict; the picture is looked at in every eighth pixel."
    fit, transform = make(reference, slide)
    fit_s = clock(fit, runs)[0]
    seconds, extra, result = clock(transform, runs)
    pixels = np.asarray(result)[:1024:8, :1024:8].astype(float).tolist()
    return dict(name=name, side=slide.shape[0], fit=fit_s, seconds=seconds, extra=extra / slide.nbytes, pixels=pixels)


def time_other(name, reference, slide):
    "What an alternative takes, as a dict."
    module, make, part = OTHERS[name]
    try: importlib.import_module(module)
    except Exception as e:
        mend = f"pip install {module.replace('_', '-')}"
        return dict(name=name, missing=f"not installed ({type(e).__name__}: {e}); {mend}")
    height, width = (n // part for n in slide.shape[:2])
    try: return time_transform(name, make, reference, slide[:height, :width].copy(), 1)
    except Exception as e: return dict(name=name, missing=f"failed ({type(e).__name__}: {e})")


# what augments a batch (B, 3, H, W) uint8; most libraries take one picture at a time

def each(call): return lambda batch: torch.stack([call(im) for im in batch])


def colour_jitter():
    from torchvision.transforms import v2
    return v2.ColorJitter(.2, .2, .2, .05)


def macenko_augmentor():
    from torchstain.torch.augmentors import TorchMacenkoAugmentor
    def augment(image):
        a = TorchMacenkoAugmentor()
        a.fit(image)
        return a.augment()
    return each(augment)


def torch_staintools_augmentor():
    from torch_staintools.augmentor.factory import AugmentorBuilder
    a = AugmentorBuilder.build("macenko")
    return lambda batch: a(batch.float() / 255)


def tiatoolbox_augmentor():
    from tiatoolbox.tools.stainaugment import StainAugmentor
    a = StainAugmentor("macenko", stain_matrix=np.array([[.65, .70, .29], [.07, .99, .11]]))
    return each(lambda im: torch.from_numpy(a(im.permute(1, 2, 0).numpy())))


AUGMENTORS = {
    "torchvision ColorJitter, batch": ("torchvision", colour_jitter),
    "torchvision ColorJitter, each": ("torchvision", lambda: each(colour_jitter())),
    "torchstain Macenko augmentor": ("torchstain", macenko_augmentor),
    "torch-staintools Macenko": ("torch_staintools", torch_staintools_augmentor),
    "tiatoolbox StainAugmentor": ("tiatoolbox", tiatoolbox_augmentor)}


def images_per_second(call, batch, runs=3):
    call(batch)
    return len(batch) / clock(lambda: call(batch), runs)[0]


def batches(tile):
    "Batches of 32 crops of a tile."
    big, rng = np.tile(tile, (2, 2, 1)), np.random.default_rng(0)
    for px in (224, 400):
        corners = rng.integers(0, tile.shape[0], (32, 2))
        crops = [big[y:y + px, x:x + px] for y, x in corners]
        yield px, torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy())


def time_augmentors(tile):
    "What the alternatives of this interpreter take to augment, a dict each."
    for px, batch in batches(tile):
        for name, (module, make) in AUGMENTORS.items():
            if not importlib.util.find_spec(module): continue
            try: yield dict(name=name, px=px, rate=images_per_second(make(), batch, 1))
            except Exception as e: yield dict(name=name, px=px, missing=f"failed ({type(e).__name__})")


# one job, one process: what an earlier one left in memory would hide what this one takes

def work(a):
    "Do one of the jobs, and print its results."
    with np.load(a.worker) as f: tile, slide, reference = f["tile"], f["slide"], f["reference"]
    if a.job == "augment": results = time_augmentors(tile)
    elif a.job in OTHERS: results = [time_other(a.job, reference, slide)]
    else: results = [time_transform(a.job, engines()[a.job], reference, slide, a.runs)]
    for r in results: print("RESULT " + json.dumps(r), flush=True)


def run_apart(python, file, job, runs):
    "The results of a job, done by that interpreter."
    command = [python, __file__, "--worker", str(file), "--job", job, "--runs", str(runs)]
    with tempfile.TemporaryFile("w+") as out:
        try: failed = subprocess.run(command, stdout=out, timeout=1200).returncode
        except subprocess.TimeoutExpired: failed = "stopped after 20 minutes"
        if failed: print(f"{job}: {failed}")
        out.seek(0)
        return [json.loads(line[7:]) for line in out if line.startswith("RESULT ")]


def grey_levels_off(pixels, base):
    "How far a result is from staintools', where both have pixels."
    n = min(128, len(pixels))
    return np.abs(np.asarray(pixels)[:n, :n] - base[:n, :n]).mean()


def show(r, copy, base):
    "One line of the table; copy and the first of base are seconds a pixel."
    if "missing" in r: return print(f"{r['name']:30s} {r['missing'][:150]}")
    pixel = r["seconds"] / r["side"] ** 2
    faster, off = (f"{base[0] / pixel:.3g} x", f"{grey_levels_off(r['pixels'], base[1]):10.2f}") if base else ("", "")
    line = f"{r['name']:30s} {r['side']:6d} {r['fit']:9.3f} {r['seconds']:12.3f} {faster:>10}"
    print(f"{line} {r['extra']:12.2f} x {copy / pixel:9.2%} {1e-6 / pixel:9.3g} {off}", flush=True)


def show_heading(slide, copy):
    "The machine, and the columns of the table."
    side, pixels = slide.shape[0], slide[..., 0].size
    machine = f"{os.cpu_count()} cores ({platform.machine()}), load {os.getloadavg()[0]:.1f}"
    versions = f"torch {torch.__version__} with {torch.get_num_threads()} threads, numpy {np.__version__}"
    print(f"slide {side} x {side}, {slide.nbytes / 1e6:.0f} MB, a copy takes {copy * pixels * 1e3:.1f} ms")
    print(f"{machine}; {versions}")
    print(f"{'':30s} {'side':>6} {'fit, s':>9} {'transform, s':>12} {'faster':>10} {'extra memory':>14} "
        f"{'of copy':>9} {'Mpx/s':>9} {'grey levels':>10}")


def show_transforms(tile, slide, reference, a):
    "The table of transforms; gives what the alternatives took for augmentation."
    target = np.empty_like(slide)
    copy = clock(lambda: np.copyto(target, slide), 10)[0] / slide[..., 0].size
    show_heading(slide, copy)
    base, augmented, there = None, {}, a.alternatives_python
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/"slide.npz"
        np.savez(file, reference=reference, slide=slide, tile=tile)
        for job in [*OTHERS, *engines()]:
            away = job in OTHERS and there and not importlib.util.find_spec(OTHERS[job][0])
            for r in run_apart(there if away else sys.executable, file, job, a.runs):
                if job.startswith("staintools ") and "seconds" in r:
                    base = r["seconds"] / r["side"] ** 2, np.asarray(r["pixels"])
                show(r, copy, base)
        for python in {sys.executable, there or sys.executable}:
            for r in run_apart(python, file, "augment", 1):
                augmented.setdefault(r["name"], {}).setdefault(r["px"], r.get("rate", r.get("missing")))
    return augmented


def show_augmentation(tile, others, runs):
    "The table of augmentations, images a second at batch 32."
    from histokit.tissue.jitter import RandomReference, StainJitter
    from histokit.tissue.measure import measure_stain
    report, rates = measure_stain(tile), {}
    calls = {"histokit StainJitter": StainJitter(), "histokit RandomReference": RandomReference([report], report)}
    for px, batch in batches(tile):
        for name, call in calls.items(): rates.setdefault(name, {})[px] = images_per_second(call, batch, runs)
    print(f"\nimages a second, batches of 32, {torch.get_num_threads()} threads")
    for name, found in (rates | others).items():
        values = [f"{v:8.0f}" if isinstance(v, float) else v[:80] for v in found.values()]
        print(f"{name:36s}" + "".join(f" {px} px: {v}" for px, v in zip(found, values)))


def pictures(a):
    "A tile, the slide made of it, and a reference of another colour."
    from histokit.core.pictures import read_rgb
    from histokit.tissue.toy import toy_slide
    def painted(seed): return toy_slide(1024, seed, ink=False).image[256:768, 256:768].copy()     # tissue only
    tile = read_rgb(a.image) if a.image else painted(0)
    repeats = -(-a.side // tile.shape[0]), -(-a.side // tile.shape[1]), 1
    slide = np.tile(tile, repeats)[:a.side, :a.side].copy()
    if a.reference: return tile, slide, read_rgb(a.reference)
    return tile, slide, (255 * (painted(1) / 255.) ** [1.2, .9, 1.1]).astype(np.uint8)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--side", type=int, default=4096, help="of the slide, pixels")
    p.add_argument("--image", default="", help="a tile of tissue; a painted one where there is none")
    p.add_argument("--reference", default="", help="a picture whose look the slide takes")
    p.add_argument("--runs", type=int, default=5, help="of which the best counts")
    p.add_argument("--alternatives-python", default="", help="the interpreter of another environment")
    p.add_argument("--worker", default="", help=argparse.SUPPRESS)
    p.add_argument("--job", default="", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.worker: return work(a)
    tile, slide, reference = pictures(a)
    others = show_transforms(tile, slide, reference, a)
    show_augmentation(tile, others, a.runs)


if __name__ == "__main__": sys.exit(main())

"""Stain normalisation of one large slide: histokit's engines, and every other implementation that is installed.

    python tests/bench_stain.py [--side 4096] [--image TILE.png]

The slide is a tile repeated. Times are the best of several runs; extra memory is the peak of the process during the call, over what it held before."""
import argparse, contextlib, importlib, os, platform, sys, threading, time

import numpy as np
import psutil
import torch
from scipy import ndimage

from histokit import stain as hs


def painted(size=512, seed=0):
    "A tile of nuclei on stroma."
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
    "Best time in seconds, and the extra memory of the first run in bytes."
    times = []
    for i in range(runs):
        with PeakMemory() if i == 0 else contextlib.nullcontext() as memory:
            start = time.perf_counter(); result = call(); times.append(time.perf_counter() - start)
        if i == 0: extra = memory.extra
        del result
    return min(times), extra


def ours(engine, device="cpu"):
    def make(reference, slide):
        n = hs.StainNormalizer(engine=engine, device=device).fit(reference)
        return lambda: hs.StainNormalizer(engine=engine).fit(slide), lambda: n.transform(slide)
    return make


def staintools(reference, slide):
    import staintools as st
    n = st.StainNormalizer("vahadane"); n.fit(reference.copy())
    return lambda: st.StainNormalizer("vahadane").fit(slide), lambda: n.transform(slide)


def torchstain(reference, slide):
    import torchstain.torch.normalizers as tn
    n = tn.TorchMacenkoNormalizer(); chw = lambda im: torch.from_numpy(im).permute(2, 0, 1).float()
    n.fit(chw(reference))
    return lambda: tn.TorchMacenkoNormalizer().fit(chw(slide)), lambda: n.normalize(I=chw(slide), stains=False)


def tiatoolbox(reference, slide):
    from tiatoolbox.tools.stainnorm import VahadaneNormalizer
    n = VahadaneNormalizer(); n.fit(reference)
    return lambda: VahadaneNormalizer().fit(slide), lambda: n.transform(slide)


def torch_staintools(reference, slide):
    from torch_staintools.normalizer.factory import NormalizerBuilder
    nchw = lambda im: torch.from_numpy(im).permute(2, 0, 1)[None].float() / 255
    n = NormalizerBuilder.build("vahadane", concentration_method="ls"); n.fit(nchw(reference))
    return lambda: NormalizerBuilder.build("vahadane").fit(nchw(slide)), lambda: n(nchw(slide))


OTHERS = {"staintools Vahadane": ("staintools", staintools), "torchstain Macenko": ("torchstain", torchstain), "tiatoolbox Vahadane": ("tiatoolbox", tiatoolbox),
    "torch-staintools Vahadane": ("torch_staintools", torch_staintools)}


def row(name, make, reference, slide, copy, base, runs):
    "One line of the table."
    fit, transform = make(reference, slide)
    fit_s, _ = clock(fit, runs); seconds, extra = clock(transform, runs)
    ratio = f"{base / seconds:7.0f} x" if base else "    1 x  "
    print(f"{name:28s} {fit_s:9.3f} {seconds:12.3f} {ratio:>10} {extra / slide.nbytes:12.2f} x {copy / seconds:9.1%} {slide.shape[0] * slide.shape[1] / seconds / 1e6:9.0f}", flush=True)
    return seconds


def gpu(slide, reference):
    "Megapixels a second of the arithmetic on the device, against the device's own copy."
    s, n = hs.measure(slide), hs.StainNormalizer().fit(reference)
    plan = hs.paint_plan(s["stain_matrix"], n.stain_matrix_, 1., s["white"], n.white_)
    rows = torch.from_numpy(slide.reshape(-1, plan.factor.size)).cuda(); out = torch.empty_like(rows)
    def timed(call):
        for _ in range(3): call()
        torch.cuda.synchronize(); start = time.perf_counter()
        for _ in range(20): call()
        torch.cuda.synchronize(); return (time.perf_counter() - start) / 20
    ours_s, copy_s = timed(lambda: out.copy_(hs.repaint_tensor(rows, plan))), timed(lambda: out.copy_(rows))
    print(f"{torch.cuda.get_device_name()}: {slide.shape[0] * slide.shape[1] / ours_s / 1e6:.0f} megapixels a second, {copy_s / ours_s:.1%} of the card's copy")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--side", type=int, default=4096); p.add_argument("--image", default=""); p.add_argument("--runs", type=int, default=5)
    a = p.parse_args()
    tile = hs.as_rgb(hs.read_picture(a.image)) if a.image else painted()
    slide = np.tile(tile, (-(-a.side // tile.shape[0]), -(-a.side // tile.shape[1]), 1))[:a.side, :a.side].copy()
    reference, target = painted(seed=1), np.empty_like(slide)
    reference = (255 * (reference / 255.) ** [1.2, .9, 1.1]).astype(np.uint8)
    copy, _ = clock(lambda: np.copyto(target, slide), 10)
    print(f"slide {a.side} x {a.side}, {slide.nbytes / 1e6:.0f} MB; {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__} with {torch.get_num_threads()} threads, numpy {np.__version__}; "
        f"load {os.getloadavg()[0]:.1f}; a copy takes {copy * 1e3:.1f} ms")
    print(f"{'':28s} {'fit, s':>9} {'transform, s':>12} {'faster':>10} {'extra memory':>14} {'of copy':>9} {'Mpx/s':>9}")
    base = None
    for name, (module, make) in OTHERS.items():
        try: importlib.import_module(module)
        except ImportError as e: print(f"{name:28s} not installed ({e.name})"); continue
        seconds = row(name, make, reference, slide, copy, base, 1)
        if module == "staintools": base = seconds
    for engine in ("torch", "numpy"): row(f"histokit {engine}", ours(engine), reference, slide, copy, base, a.runs)
    if torch.cuda.is_available(): row("histokit torch on CUDA", ours("torch", "cuda"), reference, slide, copy, base, a.runs)
    if torch.cuda.is_available(): gpu(slide, reference)
    else: print("no GPU here")


if __name__ == "__main__": sys.exit(main())

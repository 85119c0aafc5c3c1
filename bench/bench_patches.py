"""Patches a second against torchvision on PIL images, the share of a training step that waits for data, and memory.

    python bench/bench_patches.py [--quick]

Every figure is measured in this run."""
import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from histokit.spots.patches import Augmentation, HESpotDataset, PatchSampler

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ENGINES = ["numba"] * bool(importlib.util.find_spec("numba")) + ["numpy"]
SIDE = 2000                                                             # pixels of a slide, as the competition's


def fake_slides(n=3, side=SIDE):
    "Smooth noise in pink and violet: neither engine cares what is on a slide."
    rng = np.random.default_rng(0)
    for i in range(n):
        field = gaussian_filter(rng.standard_normal((side, side)).astype(np.float32), 3) * 25
        image = np.stack([200 + field, 140 + 1.5 * field, 190 + field], -1)
        yield f"S_{i + 1}", np.clip(image, 0, 255).astype(np.uint8)


def fake_spots(slides, n, px):
    "A table of n spots at random places, no patch over the border."
    rng = np.random.default_rng(1)
    names = np.array(list(slides))[rng.integers(len(slides), size=n)]
    x, y = rng.integers(px // 2, SIDE - px // 2, (n, 2)).T.astype(float)
    return pd.DataFrame(dict(slide=names, x=x, y=y))


# --- speed -----------------------------------------------------------------------------------

def pil_chain(hue):
    "The usual chain on PIL images: rotation and scale, two flips, colour jitter."
    turn = T.RandomAffine(180, scale=(.9, 1.1), interpolation=T.InterpolationMode.BILINEAR)
    flips = [T.RandomHorizontalFlip(), T.RandomVerticalFlip()]
    return T.Compose([turn, *flips, T.ColorJitter(.1, .1, .1, hue), T.PILToTensor()])


class PilPatches(Dataset):
    "Crops of pictures in memory through torchvision's transforms, one at a time."
    def __init__(self, slides, spots, px, transform):
        self.images = {n: Image.fromarray(s) for n, s in slides.items()}
        self.slide, self.xy, self.px = spots.slide.tolist(), spots[["x", "y"]].to_numpy(int), px
        self.transform = transform

    def __len__(self): return len(self.slide)

    def __getitem__(self, i):
        x, y = (self.xy[i] - self.px // 2).tolist()
        patch = self.images[self.slide[i]].crop((x, y, x + self.px, y + self.px))
        return dict(image=self.transform(patch)), torch.empty(0)


def rate(batches, n):
    "Patches a second; the first batch starts what has to be started and is not counted."
    it, done = iter(batches), 0
    next(it)
    start = time.perf_counter()
    for inputs, _ in it:
        done += len(inputs["image"])
        if done >= n: break
    return done / (time.perf_counter() - start)


def our_epochs(slides, spots, px, augmented):
    "Engine -> function of a turn that gives an epoch's batches."
    augment, makers = Augmentation() if augmented else None, {}
    for engine in ENGINES:
        data = HESpotDataset(spots, PatchSampler(slides, px, engine=engine), augment=augment)
        rate(data.batches(32), 64)
        makers[engine] = lambda turn, data=data: data.batches(32, True, turn)
    return makers


def their_epochs(slides, spots, px, augmented):
    "(Strength of the hue, processes) -> function of a turn that gives an epoch's batches."
    makers = {}
    for hue in ([0, .05] if augmented else [0]):
        data = PilPatches(slides, spots, px, pil_chain(hue) if augmented else T.PILToTensor())
        for workers in (0, CORES):
            load = lambda turn, data=data, workers=workers: DataLoader(data, 32, shuffle=True, num_workers=workers)
            makers[hue, workers] = load
    return makers


def speeds(slides, px, augmented, seconds):
    "Medians of rates: ours on all cores, torchvision's in as many processes and in one, in turns."
    spots, found = fake_spots(slides, 4096, px), {}
    makers = our_epochs(slides, spots, px, augmented) | their_epochs(slides, spots, px, augmented)
    want = dict.fromkeys(makers, 64)
    for turn in range(3):                                    # in turns, so that a busy machine slows all of them
        for name, make in makers.items():
            found.setdefault(name, []).append(rate(make(turn), want[name]))
            want[name] = int(min(max(seconds * found[name][-1], 64), 4000))
    return {name: statistics.median(v) for name, v in found.items()}


def show_speeds(v, px, augmented):
    "Rows of the table for one size."
    for hue in ([0, .05] if augmented else [0]):
        ours = "".join(f"{v[e]:17.0f}" for e in ENGINES) if not hue else " " * 17 * len(ENGINES)
        theirs = " ".join(f"{v[hue, w]:8.0f} ({v[ENGINES[0]] / v[hue, w]:5.1f}x)" for w in (0, CORES))
        print(f"{px:4d} {'yes' if augmented else 'no':>10}{ours}   {'with hue' if hue else '':8} {theirs}", flush=True)


def table_of_speeds(slides, quick):
    "Patches a second of every engine and of torchvision."
    print(f"patches a second on {CORES} cores, median of three turns; "
        f"in brackets, how many times torchvision's rate the engine '{ENGINES[0]}' reaches")
    print("augmented: any rotation, scale 0.9-1.1, flips, colour (torchvision: brightness, contrast, saturation, "
        "without and with hue; histokit: channels and both dyes in optical density)\n")
    ours = "".join(f"{'histokit, ' + e:>17}" for e in ENGINES)
    print(f"{'px':>4} {'augmented':>10}{ours}{'torchvision':>24}{f'in {CORES} processes':>18}")
    torch.set_num_threads(1)
    for px in (224, 400):
        for augmented in (False, True):
            show_speeds(speeds(slides, px, augmented, .5 if quick else 2), px, augmented)
    torch.set_num_threads(CORES)


# --- waiting -----------------------------------------------------------------------------------

def steps(model, target, batches, n):
    "Seconds waited for batches, and seconds in all, of n training steps."
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    it, waited, start = iter(batches), 0., None
    for i in range(n + 1):
        begin = time.perf_counter()
        inputs, _ = next(it)
        got = time.perf_counter()
        out = model(inputs["image"].float() / 255)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(out, target[:len(out)]).backward()
        optimizer.step()
        if i: waited += got - begin
        else: start = time.perf_counter()                    # the first step starts what has to be started
    return waited, time.perf_counter() - start


def wait_share(slides, quick, px=224, batch_size=16):
    "What a training step of resnet18 waits for its batch, and its share of the step."
    import timm
    spots, n = fake_spots(slides, 4096, px), 4 if quick else 12
    model, target = timm.create_model("resnet18", pretrained=False, num_classes=35), torch.rand(4096, 35)
    ours = HESpotDataset(spots, PatchSampler(slides, px), augment=Augmentation())
    theirs = DataLoader(PilPatches(slides, spots, px, pil_chain(.05)), batch_size, shuffle=True)
    print(f"\nresnet18 at {px} px, batches of {batch_size}, on the CPU: the share of a step that waits for data")
    for name, batches in {"histokit": ours.batches(batch_size, True), "torchvision, same process": theirs}.items():
        waited, total = steps(model, target, batches, n)
        each = f"{1e3 * waited / n:7.1f} of {1e3 * total / n:7.1f} ms a step"
        print(f"  {name:26} {each}   {waited / total:6.1%}", flush=True)


# --- memory -----------------------------------------------------------------------------------

TRAINING = """
    import sys, time, torch
    from histokit.spots.cache import SlideCache
    from histokit.spots.patches import Augmentation, HESpotDataset, PatchSampler
    from histokit.spots.slides import DataFactory
    path, budget = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    def peak():
        return next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if l.startswith('VmHWM'))
    spots = DataFactory(path).spots
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 7, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sampler = PatchSampler(SlideCache(path, 1 << 18), 224)
    data = HESpotDataset(spots, sampler, target=spots[['C1']], augment=Augmentation())
    def train(passes):
        for k in range(passes):
            for inputs, target in data.batches(16, True, k):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(inputs['image'].float() / 255), target).backward()
                optimizer.step()
    train(2)
    before, cache, start = peak(), SlideCache(path, budget), time.perf_counter()
    sampler.atlas.slides = cache
    train(1)
    hits = cache.hits / (cache.hits + cache.misses)
    print(peak() - before, cache.n_bytes, hits, len(spots) / (time.perf_counter() - start))
"""


def write_large(path, side, n=5):
    "A file of n slides of noise."
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as h:
        for i in range(n):
            d = h.create_dataset(f"images/Train/S_{i}", (side, side, 3), "u1", chunks=(256, 256, 3))
            for y in range(0, side, 256):
                d[y:y + 256] = rng.integers(0, 256, (256, side, 3), dtype=np.uint8)
            x, y = rng.integers(0, side, (2, 400))
            h[f"spots/Train/S_{i}"] = np.rec.fromarrays([x, y, rng.random(400)], names="x,y,C1")


def memory(quick, ratio=20):
    "Growth of the peak resident size over the same training with the least cache, in a fresh process."
    budget = (12 if quick else 40) << 20
    side = int((budget * ratio / 5 / 3) ** .5) // 256 * 256 + 256
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"large.h5"
        write_large(path, side)
        size = path.stat().st_size
        run = [sys.executable, "-c", textwrap.dedent(TRAINING), str(path), str(budget)]
        done = subprocess.run(run, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    if done.returncode: raise SystemExit(f"{done.stderr}\nthe memory benchmark failed")
    growth, held, hits, speed = map(float, done.stdout.split())
    mb = lambda n: f"{n / 2**20:.1f} MB"
    print(f"\na file of {mb(size)}, {size / budget:.1f} times the cache's budget of {mb(budget)}: "
        "one epoch of 224-px patches in random order")
    print(f"  over the same training with next to no cache, the peak resident size grew by {mb(growth)} "
        f"({growth / budget:.0%} of the budget); the cache held {mb(held)}, {hits:.0%} of tiles came from it; "
        f"{speed:.0f} patches a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter turns, a smaller file")
    quick = parser.parse_args().quick
    slides = dict(fake_slides())
    table_of_speeds(slides, quick)
    wait_share(slides, quick)
    memory(quick)

"""Patches a second against torchvision on PIL images, the share of a training step that waits for data, and memory; every figure is measured in this run.

    python tests/bench_patches.py [--quick]
"""
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

from histokit.spots.patches import Augmentation, PatchDataset, PatchSampler

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ENGINES = ["numba"] * bool(importlib.util.find_spec("numba")) + ["numpy"]
SIDE = 2000                                                             # pixels of a slide, as the competition's


def fake_slides(n=3, side=SIDE):
    "Smooth noise in pink and violet: neither engine cares what is on a slide."
    rng = np.random.default_rng(0)
    for i in range(n):
        field = gaussian_filter(rng.standard_normal((side, side)).astype(np.float32), 3) * 25
        yield f"S_{i + 1}", np.clip(np.stack([200 + field, 140 + 1.5 * field, 190 + field], -1), 0, 255).astype(np.uint8)


def fake_spots(slides, n, px):
    rng = np.random.default_rng(1)
    names = np.array(list(slides))[rng.integers(len(slides), size=n)]
    xy = rng.integers(px // 2, SIDE - px // 2, (n, 2))
    return pd.DataFrame(dict(slide=names, x=xy[:, 0].astype(float), y=xy[:, 1].astype(float)))


def pil_chain(hue):
    "The usual chain on PIL images: rotation and scale, two flips, colour jitter."
    return T.Compose([T.RandomAffine(180, scale=(.9, 1.1), interpolation=T.InterpolationMode.BILINEAR), T.RandomHorizontalFlip(), T.RandomVerticalFlip(), T.ColorJitter(.1, .1, .1, hue), T.PILToTensor()])


class PilPatches(Dataset):
    "Crops of pictures in memory through torchvision's transforms, one at a time."
    def __init__(self, slides, spots, px, transform):
        self.images = {n: Image.fromarray(s) for n, s in slides.items()}
        self.slide, self.xy, self.px, self.transform = spots.slide.tolist(), spots[["x", "y"]].to_numpy(int), px, transform

    def __len__(self): return len(self.slide)

    def __getitem__(self, i):
        x, y = (self.xy[i] - self.px // 2).tolist()
        return dict(image=self.transform(self.images[self.slide[i]].crop((x, y, x + self.px, y + self.px)))), torch.empty(0)


def rate(batches, n):
    "Patches a second of an iterable of batches; the first batch starts what has to be started and is not counted."
    it = iter(batches); done = 0
    next(it); start = time.perf_counter()
    for inputs, _ in it:
        done += len(inputs["image"])
        if done >= n: break
    return done / (time.perf_counter() - start)


def speeds(slides, px, augmented, seconds):
    "Rates of ours on all cores, and of torchvision in as many processes and in one, in turns, so that a busy machine slows all of them: medians."
    spots = fake_spots(slides, 4096, px)
    found, makers = {}, {}
    for engine in ENGINES:
        data = PatchDataset(spots, PatchSampler(slides, (px,), engine=engine), augment=Augmentation() if augmented else None)
        rate(data.batches(32), 64)
        makers[engine] = lambda turn, data=data: data.batches(32, True, turn)
    for hue in ([0, .05] if augmented else [0]):
        for workers in (0, CORES):
            data = PilPatches(slides, spots, px, pil_chain(hue) if augmented else T.PILToTensor())
            makers[hue, workers] = lambda turn, data=data, workers=workers: DataLoader(data, 32, shuffle=True, num_workers=workers)
    want = dict.fromkeys(makers, 64)
    for turn in range(3):
        for name, make in makers.items():
            found.setdefault(name, []).append(rate(make(turn), want[name]))
            want[name] = int(min(max(seconds * found[name][-1], 64), 4000))
    return {name: statistics.median(v) for name, v in found.items()}


def table_of_speeds(quick):
    slides = dict(fake_slides())
    print(f"patches a second on {CORES} cores, median of three turns; in brackets, how many times torchvision's rate the engine '{ENGINES[0]}' reaches")
    print("augmented: any rotation, scale 0.9-1.1, flips, colour (torchvision: brightness, contrast, saturation, without and with hue; histokit: channels and both dyes in optical density)\n")
    print(f"{'px':>4} {'augmented':>10}" + "".join(f"{'histokit, ' + e:>17}" for e in ENGINES) + f"{'torchvision':>24}{f'in {CORES} processes':>18}")
    torch.set_num_threads(1)
    for px in (224, 400):
        for augmented in (False, True):
            v = speeds(slides, px, augmented, .5 if quick else 2)
            for hue in ([0, .05] if augmented else [0]):
                ours = "".join(f"{v[e]:17.0f}" for e in ENGINES) if not hue else " " * 17 * len(ENGINES)
                theirs = " ".join(f"{v[hue, w]:8.0f} ({v[ENGINES[0]] / v[hue, w]:5.1f}x)" for w in (0, CORES))
                print(f"{px:4d} {'yes' if augmented else 'no':>10}{ours}   {'with hue' if hue else '':8} {theirs}", flush=True)
    torch.set_num_threads(CORES)
    return slides


def wait_share(slides, quick, px=224, batch_size=16):
    "Seconds that a training step of resnet18 waits for its batch, and its share of the step."
    import timm
    spots = fake_spots(slides, 4096, px)
    model = timm.create_model("resnet18", pretrained=False, num_classes=35); optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    target = torch.rand(4096, 35)

    def steps(batches, n):
        it, waited, start = iter(batches), 0., None
        for i in range(n + 1):
            begin = time.perf_counter(); inputs, _ = next(it); got = time.perf_counter()
            loss = torch.nn.functional.mse_loss(model(inputs["image"].float() / 255), target[:len(inputs["image"])])
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            if i: waited += got - begin
            else: start = time.perf_counter()
        return waited, time.perf_counter() - start

    ours = PatchDataset(spots, PatchSampler(slides, (px,)), augment=Augmentation())
    theirs = DataLoader(PilPatches(slides, spots, px, pil_chain(.05)), batch_size, shuffle=True)
    n = 4 if quick else 12
    print(f"\nresnet18 at {px} px, batches of {batch_size}, on the CPU: the share of a step that waits for data")
    for name, data in {"histokit": ours.batches(batch_size, True), "torchvision, same process": theirs}.items():
        waited, total = steps(data, n)
        print(f"  {name:26} {1e3 * waited / n:7.1f} of {1e3 * total / n:7.1f} ms a step   {waited / total:6.1%}", flush=True)


def memory(quick, ratio=20):
    "Growth of the peak resident size, over the same training with the least cache, when a file many times the cache's budget is read in random order, in a fresh process."
    budget = (12 if quick else 40) << 20
    side = int((budget * ratio / 5 / 3) ** .5) // 256 * 256 + 256
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/"large.h5"; rng = np.random.default_rng(0)
        with h5py.File(path, "w") as h:
            for i in range(5):
                d = h.create_dataset(f"images/Train/S_{i}", (side, side, 3), "u1", chunks=(256, 256, 3))
                for y in range(0, side, 256): d[y:y + 256] = rng.integers(0, 256, (256, side, 3), dtype=np.uint8)
                xy = rng.integers(0, side, (400, 2))
                h[f"spots/Train/S_{i}"] = np.rec.fromarrays([xy[:, 0], xy[:, 1], rng.random(400)], names="x,y,C1")
        size = path.stat().st_size
        code = f"""
            import sys, time, psutil, torch, pandas as pd
            from histokit.data import DataFactory
            from histokit.patches import Augmentation, PatchDataset, PatchSampler, TileCache
            torch.set_num_threads(1)
            def peak():
                return next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if l.startswith('VmHWM'))
            spots = DataFactory({str(path)!r}).spots
            model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 7, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 1))
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            data = PatchDataset(spots, PatchSampler(TileCache({str(path)!r}, 1 << 18), (224,)), spots[['C1']], augment=Augmentation())
            def train(passes):
                for k in range(passes):
                    for inputs, target in data.batches(16, True, k):
                        loss = torch.nn.functional.mse_loss(model(inputs['image'].float() / 255), target)
                        optimizer.zero_grad(); loss.backward(); optimizer.step()
            train(2)
            before, cache, start = peak(), TileCache({str(path)!r}, {budget}), time.perf_counter()
            data.sampler.atlas.slides = cache
            train(1)
            print(peak() - before, cache.n_bytes, cache.hits / (cache.hits + cache.misses), len(spots) / (time.perf_counter() - start))
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
        if done.returncode: print(done.stderr); raise SystemExit("the memory benchmark failed")
        growth, held, hits, speed = map(float, done.stdout.split())
    print(f"\na file of {size / 2**20:.0f} MB, {size / budget:.1f} times the cache's budget of {budget / 2**20:.0f} MB, one epoch of 224-px patches in random order")
    print(f"  over the same training with next to no cache, the peak resident size grew by {growth / 2**20:.1f} MB ({growth / budget:.0%} of the budget); the cache held {held / 2**20:.1f} MB, {hits:.0%} of tiles came from it; {speed:.0f} patches a second")


def gpu(slides):
    "Patches a second with the slides resident on a GPU."
    if not torch.cuda.is_available(): return print("\nno GPU here: not measured")
    print(f"\n{torch.cuda.get_device_name()}, slides resident")
    for px in (224, 400):
        spots = fake_spots(slides, 4096, px); sampler = PatchSampler(slides, (px,), device="cuda"); k = [sampler.position[s] for s in spots.slide]
        for name, augment in {"no": None, "yes": Augmentation()}.items():
            def once(augment=augment, sampler=sampler, k=k, spots=spots):
                return sampler.sample(k[:256], spots[["x", "y"]].to_numpy()[:256], **(augment.draw(256) if augment else {}))
            once(); torch.cuda.synchronize(); start = time.perf_counter()
            for _ in range(20): once()
            torch.cuda.synchronize()
            print(f"  {px} px, augmented {name:3}: {20 * 256 / (time.perf_counter() - start):9.0f} patches a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter turns, a smaller file")
    quick = parser.parse_args().quick
    slides = table_of_speeds(quick)
    wait_share(slides, quick)
    memory(quick)
    gpu(slides)

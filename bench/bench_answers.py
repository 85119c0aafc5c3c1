"""From fold models to an answer, timed: smoothing beside a loop over a grid and up to a million spots; views of patches
beside the forward passes that they cost.

    python bench/bench_answers.py [--spots 2088 30000 100000 300000 1000000] [--patches 512]

Seconds are of the processor, the best of several runs. The loop puts the spots of a slide on a grid of cells and
visits, for each spot and type, the cells around it, as published smoothing does; its answer is compared with the kit's.
"""
import argparse
import math
import os
import platform
import sys
import time

import numpy as np
import pandas as pd
import torch

from histokit.learn.batches import BatchDataset, predict, predict_views
from histokit.learn.networks import create_image_model
from histokit.learn.views import VIEWS
from histokit.spots.finish import Smoothing
from histokit.spots.lattice import smooth

WIDTH = 1.          # of the Gaussian, in pitches


def clock(call, runs=3):
    "Least seconds of the processor."
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def square(n):
    "n spots on a square lattice, a pitch of 1."
    side = math.ceil(n ** .5)
    r, c = np.divmod(np.arange(n), side)
    return pd.DataFrame(dict(slide="A", x=c.astype(float), y=r.astype(float)))


def grid_loop(values, spots, width):
    "Gaussian mean over a window of cells, one cell and one type after another."
    cell = {(int(x), int(y)): i for i, (x, y) in enumerate(zip(spots.x, spots.y))}
    reach, out = math.floor(3 * width), np.empty(values.shape)
    around = [(dx, dy, math.exp(-(dx * dx + dy * dy) / (2 * width ** 2))) for dx in range(-reach, reach + 1)
        for dy in range(-reach, reach + 1) if dx * dx + dy * dy <= (3 * width) ** 2]
    for (x, y), i in cell.items():
        for t in range(values.shape[1]):
            total = weights = 0.
            for dx, dy, w in around:
                j = cell.get((x + dx, y + dy))
                if j is None: continue
                total += w * values[j, t]
                weights += w
            out[i, t] = total / weights
    return out


def beside_the_loop(values, spots, seconds):
    "How much faster than the loop, and what looking at likeness costs."
    slow, wanted = clock(lambda: grid_loop(values, spots, WIDTH), 1), grid_loop(values, spots, WIDTH)
    error = abs(smooth(values, spots, WIDTH) - wanted).max()
    alike = clock(lambda: Smoothing((WIDTH,), .2)(values, spots), 5)
    return f"; the loop {slow:.2f} s, {slow / seconds:.0f} x, error {error:.0e}; bilateral {alike * 1e3:.0f} ms"


def time_smoothing(n, types=35):
    "A line for n spots, beside the loop where they are few."
    spots, values = square(n), np.random.default_rng(0).random((n, types))
    seconds = clock(lambda: smooth(values, spots, WIDTH), 9 if n < 10_000 else 1)
    more = beside_the_loop(values, spots, seconds) if n <= 3000 else ""
    print(f"smoothing {n:>9,} x {types}{seconds * 1e3:12.1f} ms  {1e6 * seconds / n:7.1f} µs a spot{more}", flush=True)


class Patches(BatchDataset):
    "Patches cut from a slide in memory, batch by batch."
    def __init__(self, n, px):
        g = torch.Generator().manual_seed(0)
        self.slide = torch.randint(0, 255, (3, 2048, 2048), dtype=torch.uint8, generator=g)
        self.at, self.px = torch.randint(0, 2048 - px, (n, 2), generator=g), px

    def __len__(self): return len(self.at)

    def batch(self, rows):
        cut = [self.slide[:, y:y + self.px, x:x + self.px] for y, x in self.at[rows].tolist()]
        return dict(image=torch.stack(cut)), torch.zeros(len(rows), 1)


def time_views(n, px=96):
    "Each list of views beside as many forward passes on batches that lie ready."
    model, data = create_image_model(35, "test_resnet.r160_in1k", "none").eval(), Patches(n, px)
    rows = [np.arange(n)[a:a + 64] for a in range(0, n, 64)]
    ready = [data.batch(r)[0]["image"] for r in rows]

    @torch.inference_mode()
    def passes(times):
        for _ in range(times):
            for images in ready: model(images)

    predict(model, data)
    for name in ("flips", "dihedral"): say_views(name, passes, lambda views: predict_views(model, data, views), n)


def say_views(name, passes, answer, n, runs=5):
    "The better of several runs of each, taken in turn."
    views, pairs = len(VIEWS[name]), []
    for _ in range(runs): pairs.append((clock(lambda: passes(views), 1), clock(lambda: answer(name), 1)))
    forward, whole = (min(of) for of in zip(*pairs))
    alone = f"{views} forward passes alone {forward:.2f} s; ratio {whole / forward:.3f}"
    print(f"{name:10}{views} views of {n} patches: {whole:.2f} s; {alone}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--spots", type=int, nargs="+", default=[2088, 30_000, 100_000, 300_000, 1_000_000])
    p.add_argument("--patches", type=int, default=512)
    a = p.parse_args()
    torch.set_num_threads(1)
    versions = f"numpy {np.__version__}, torch {torch.__version__}, one thread"
    print(f"{os.cpu_count()} cores ({platform.machine()}), {versions}; load {os.getloadavg()[0]:.1f}")
    for n in a.spots: time_smoothing(n)
    time_views(a.patches)


if __name__ == "__main__": sys.exit(main())

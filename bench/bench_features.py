"""An epoch of a head from cached features, and through the frozen backbone; what filling the cache and heads cost.

    python bench/bench_features.py [--quick]

The backbone is MobileNetV2 with random weights, on patches of 224 px of a demo slide. The head, its loss and its
trainer are the same on both sides. Last comes the size on disk."""
import argparse
import functools
import importlib.util
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from histokit.frozen.features import cached_features
from histokit.frozen.heads import fit_boost, fit_kernel, fit_pls, fit_ridge
from histokit.frozen.network_head import FeatureDataset, HeadModel, fit_head
from histokit.frozen.parts import split_model
from histokit.learn.losses import Loss
from histokit.learn.scores import mean_spearman
from histokit.learn.trainer import Trainer
from histokit.spots.cache import SlideCache
from histokit.spots.demo import smoke_demo
from histokit.spots.network import create_model
from histokit.spots.patches import HESpotDataset, PatchSampler
from histokit.spots.slides import DataFactory


def clock(call):
    "Seconds, and what the call gave."
    start = time.perf_counter()
    out = call()
    return time.perf_counter() - start, out


def epoch_seconds(model, data, n, device):
    "Seconds of the fastest of n epochs of training."
    loss = Loss("0.85*soft_spearman+0.15*mse")
    history = Trainer(model, loss, None, epochs=n, batch_size=32, device=device).fit(data)
    return history.seconds.min()


def demo_patches(quick):
    "Patches of training spots and their targets."
    factory = DataFactory(smoke_demo())
    spots = factory.spots.query("split == 'Train'").reset_index(drop=True)
    if quick: spots = spots.iloc[:64]
    sampler = PatchSampler(SlideCache(factory.path), (40,), 224)
    return HESpotDataset(spots, sampler, target=np.log1p(spots[factory.targets].to_numpy()))


def head_epoch(patches, folder, device):
    "The head's epoch, uncached and cached."
    target = patches.target
    model = create_model(target.shape[1], "mobilenetv2_100", "none", unfreeze=0)
    uncached = epoch_seconds(model, patches, 2, device)
    def read(): return cached_features(model, patches, "none", folder, device=device)
    fill, _ = clock(read)
    again, features = clock(read)
    width = features[0].shape[1]
    head = HeadModel(np.zeros(width), np.ones(width), target.shape[1], "mlp")
    cached = epoch_seconds(head, FeatureDataset(features, target), 5, device)
    print(f"an epoch of the head, {len(patches)} patches of 224 px, mobilenetv2_100, on {device}")
    print(f"  through the frozen backbone {uncached:9.3f} s")
    print(f"  from the cache              {cached:9.3f} s   {uncached / cached:6.0f} x faster (aim: 20 x)")
    print(f"  filling the cache, once     {fill:9.3f} s   {fill / uncached:6.2f} epochs")
    print(f"  opening and checking it     {again:9.3f} s")


def tail_epoch(patches, folder, device):
    "Training the last stage: whole model against the tail on cached activations."
    model = create_model(patches.target.shape[1], "mobilenetv2_100", "none", unfreeze=1)
    frozen, tail = split_model(model)
    held = cached_features(frozen, patches, "none", folder, device=device)
    whole = epoch_seconds(model, patches, 2, device)
    cut = epoch_seconds(tail, FeatureDataset(held, patches.target), 2, device)
    size = f"before {frozen.taken}; {held[0].nbytes / 1e6:.0f} MB a view"
    print("an epoch of the last stage and the head")
    print(f"  of the whole model          {whole:9.3f} s")
    print(f"  from cached activations     {cut:9.3f} s   {whole / cut:6.1f} x faster ({size})")


def head_times(quick):
    "Seconds of each head, its settings chosen on left-out groups."
    n, d, t = (600, 320, 12) if quick else (2000, 1280, 35)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(n, 20))
    def noisy(width): return hidden @ rng.normal(size=(20, width)) + 2 * rng.normal(size=(n, width))
    x, z = noisy(d), noisy(t)
    x, group = x.astype("f4"), np.arange(n) % 5
    network = functools.partial(fit_head, loss="soft_spearman", head="mlp")
    heads = dict(ridge=fit_ridge, pls=fit_pls, kernel=fit_kernel, network=network)
    if importlib.util.find_spec("lightgbm"): heads["lightgbm"] = fit_boost
    else: print("lightgbm is not installed: not measured")
    print(f"heads on {n} rows of {d} features and {t} targets, settings chosen on 5 left-out groups")
    for name, fit in heads.items():
        seconds, found = clock(lambda fit=fit: fit(x, z, group, mean_spearman))
        print(f"  {name:10} {seconds:8.2f} s   {len(found.scores):3} settings   chosen {found.chosen}", flush=True)


def disk(folder):
    "Bytes of a cached view against the same numbers in single precision."
    for file in sorted(folder.glob("*/view_identity.npy")):
        x, size = np.load(file, mmap_mode="r"), file.stat().st_size
        shape, share = "x".join(map(str, x.shape)), size / (4 * x.size)
        print(f"on disk, {shape:>18} {x.dtype}: {size / 1e6:8.2f} MB, {share:.3f} of single precision")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer patches, smaller heads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with {threads} threads, load {load:.1f}")
    patches = demo_patches(a.quick)
    with tempfile.TemporaryDirectory() as folder:
        head_epoch(patches, Path(folder), a.device)
        tail_epoch(patches, Path(folder), a.device)
        disk(Path(folder))
    head_times(a.quick)


if __name__ == "__main__": main()

"""An epoch of a head from cached features against the same epoch through the frozen backbone, the cost of filling it and of the heads, and the size on disk.

    python tests/bench_features.py [--quick]

The backbone is MobileNetV2 with random weights, on patches of 224 px of a demo slide; the head, its loss and its trainer are the same on both sides."""
import argparse, functools, importlib.util, os, tempfile, time
from pathlib import Path

import numpy as np
import torch

from histokit.frozen.features import cached_features
from histokit.frozen.heads import fit_boost, fit_kernel, fit_pls, fit_ridge
from histokit.frozen.network_head import FeatureDataset, HeadModel, fit_head
from histokit.frozen.parts import split_model
from histokit.spots.slides import DataFactory
from histokit.spots.cache import SlideCache
from histokit.spots.demo import smoke_demo
from histokit.learn.losses import Loss
from histokit.learn.scores import mean_spearman
from histokit.spots.network import create_model
from histokit.spots.patches import HESpotDataset, PatchSampler
from histokit.learn.trainer import Trainer


def clock(call):
    "Seconds, and what the call gave."
    start = time.perf_counter(); out = call()
    return time.perf_counter() - start, out


def epochs(model, data, n, device):
    "Seconds of each of n epochs of training a head."
    return Trainer(model, Loss("0.85*soft_spearman+0.15*mse"), None, epochs=n, batch_size=32, device=device).fit(data).seconds.tolist()


def head_epoch(factory, spots, Z, folder, device):
    "The head's epoch, uncached and cached."
    patches = HESpotDataset(spots, PatchSampler(SlideCache(factory.path), (40,), 224), target=Z)
    model = create_model(Z.shape[1], "mobilenetv2_100", "none", unfreeze=0)
    uncached = min(epochs(model, patches, 2, device))
    fill, F = clock(lambda: cached_features(model, patches, "none", folder, device=device))
    again, F = clock(lambda: cached_features(model, patches, "none", folder, device=device))
    head = HeadModel(np.zeros(F[0].shape[1]), np.ones(F[0].shape[1]), Z.shape[1], "mlp")
    cached = min(epochs(head, FeatureDataset(F, Z), 5, device))
    print(f"an epoch of the head, {len(spots)} patches of 224 px, mobilenetv2_100, on {device}")
    print(f"  through the frozen backbone {uncached:9.3f} s\n  from the cache              {cached:9.3f} s   {uncached / cached:6.0f} x faster (aim: 20 x)")
    print(f"  filling the cache, once     {fill:9.3f} s   {fill / uncached:6.2f} epochs\n  opening and checking it     {again:9.3f} s")


def tail_epoch(factory, spots, Z, folder, device):
    "Training the last stage: whole model against the tail on cached activations."
    patches = HESpotDataset(spots, PatchSampler(SlideCache(factory.path), (40,), 224), target=Z)
    model = create_model(Z.shape[1], "mobilenetv2_100", "none", unfreeze=1)
    frozen, tail = split_model(model)
    A = cached_features(frozen, patches, "none", folder, device=device)
    whole, cut = min(epochs(model, patches, 2, device)), min(epochs(tail, FeatureDataset(A, Z), 2, device))
    print(f"an epoch of the last stage and the head\n  of the whole model          {whole:9.3f} s")
    print(f"  from cached activations     {cut:9.3f} s   {whole / cut:6.1f} x faster (before {frozen.taken}; {A[0].nbytes / 1e6:.0f} MB a view)")


def head_times(quick):
    "Seconds of each head, its settings chosen on left-out groups."
    n, d, t = (600, 320, 12) if quick else (2000, 1280, 35)
    rng = np.random.default_rng(0); hidden = rng.normal(size=(n, 20))
    x, y = (hidden @ rng.normal(size=(20, w)) + 2 * rng.normal(size=(n, w)) for w in (d, t)); x, group = x.astype("f4"), np.arange(n) % 5
    heads = dict(ridge=fit_ridge, pls=fit_pls, kernel=fit_kernel, network=functools.partial(fit_head, loss="soft_spearman", head="mlp"))
    if importlib.util.find_spec("lightgbm"): heads["lightgbm"] = fit_boost
    else: print("lightgbm is not installed: not measured")
    print(f"heads on {n} rows of {d} features and {t} targets, settings chosen on 5 left-out groups")
    for name, fit in heads.items():
        seconds, f = clock(lambda fit=fit: fit(x, y, group, mean_spearman))
        print(f"  {name:10} {seconds:8.2f} s   {len(f.scores):3} settings   chosen {f.chosen}", flush=True)


def disk(folder):
    "Bytes of a cached view against the same numbers in single precision."
    for file in sorted(folder.glob("*/view_identity.npy")):
        x = np.load(file, mmap_mode="r")
        size = file.stat().st_size
        print(f"on disk, {'x'.join(map(str, x.shape)):>18} {x.dtype}: {size / 1e6:8.2f} MB, {size / (4 * x.size):.3f} of single precision")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer patches, smaller heads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    factory = DataFactory(smoke_demo()); spots = factory.spots.query("split == 'Train'").reset_index(drop=True).iloc[:64 if a.quick else None]
    Z = np.log1p(spots[factory.targets].to_numpy())
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        head_epoch(factory, spots, Z, Path(folder), a.device); tail_epoch(factory, spots, Z, Path(folder), a.device); disk(Path(folder))
    head_times(a.quick)


if __name__ == "__main__": main()

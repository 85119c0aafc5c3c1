"""Pictures a second, read and augmented, against torchvision on PIL images; and whether memory grows with their number.

    python bench/bench_pictures.py [--quick]

One thread each. Speeds are of processor time, which other work on the machine does not change."""
import argparse
import os
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from histokit.core.pixels import as_rgb
from histokit.core.runs import RunFolder
from histokit.pictures.augment import PictureAugmentation, augment_pictures
from histokit.pictures.classification import run_classification
from histokit.pictures.classify_settings import ClassifySettings
from histokit.pictures.folders import find_pictures
from histokit.pictures.prepared import PictureDataset, decode_pictures, prepare_pictures, read_square
from histokit.pictures.settings import PictureSettings
from histokit.pictures.toy import ToySettings, draw_toy, toy_people, toy_pictures


def chests(n, px):
    "Grey pictures (n, px, px) of that size, smooth with grain, as radiographs are."
    small = draw_toy(toy_people(ToySettings(n=n, test=0)))
    rng = np.random.default_rng(0)
    large = [np.asarray(Image.fromarray(p).resize((px, px), Image.Resampling.BICUBIC), int) for p in small]
    return [np.clip(p + rng.normal(0, 3, p.shape), 0, 255).astype(np.uint8) for p in large]


def rate(work, n, rounds):
    "Pictures a second of processor time: the median over rounds."
    work()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return n / np.median(seconds)


def row(what, usual, ours, usual_name):
    print(f"  {what:36}{usual_name:>22} {usual:8.0f}/s   histokit {ours:8.0f}/s   x {ours / usual:.1f}")


# --- reading ---------------------------------------------------------------------------------

def write_files(folder, pictures, suffix):
    "Pictures as files, and their paths."
    paths = [folder/f"{i}{suffix}" for i in range(len(pictures))]
    for path, picture in zip(paths, pictures): Image.fromarray(picture).save(path, **{} if suffix == ".png" else
        dict(quality=92))
    return paths


def pil_reader(paths, px):
    "What a Dataset over files usually does."
    change = v1.Compose([v1.Resize((px, px)), v1.PILToTensor()])
    return lambda: [change(Image.open(path).convert("RGB")) for path in paths]


def bench_reader(folder, n, rounds):
    print("reading and resizing")
    for side, suffix in ((2048, ".jpg"), (1024, ".jpg"), (384, ".jpg"), (1024, ".png")):
        paths = write_files(folder, chests(n, side), suffix)
        for px in (224, 384):
            usual = rate(pil_reader(paths, px), n, rounds)
            ours = rate(lambda p=px, files=paths: [read_square(path, p) for path in files], n, rounds)
            row(f"{side} px {suffix[1:]} to {px} px", usual, ours, "torchvision on PIL")


def coloured_files(folder, n):
    "JPEG files of 1024 px whose channels differ, and their paths."
    pictures = [np.stack([p, p, 255 - p], -1) for p in chests(n, 1024)]
    return write_files(folder, pictures, ".jpg")


def bench_epochs(folder, n, rounds):
    print("an epoch after the first: read and augmented, from pictures.npy instead of files")
    for name, paths in (("grey", write_files(folder, chests(n, 1024), ".jpg")), ("colour", None)):
        paths = paths or coloured_files(folder, n)
        for px in (224, 384):
            squares = [read_square(p, px).pixels for p in paths]
            np.save(folder/"pictures.npy", np.stack([as_rgb(s) for s in squares]))
            plain = PictureDataset(folder/"pictures.npy", range(n), np.zeros(n, int))
            changed = PictureDataset(folder/"pictures.npy", range(n), np.zeros(n, int), PictureAugmentation())
            both = v1.Compose([v1.Resize((px, px)), *pil_chain(v1).transforms])
            read = rate(pil_reader(paths, px), n, rounds)
            usual = rate(lambda p=paths, c=both: [c(Image.open(path).convert("RGB")) for path in p], n, rounds)
            row(f"{name} 1024 px jpg at {px} px, read", read, rate(lambda d=plain: d.batch(np.arange(n)), n, rounds),
                "torchvision on PIL")
            row(f"{name} 1024 px jpg at {px} px, both", usual, rate(lambda d=changed: d.batch(np.arange(n)), n, rounds),
                "torchvision on PIL")


# --- augmentation ----------------------------------------------------------------------------

def pil_chain(kind):
    "The same changes one picture at a time: torchvision's, with bilinear interpolation."
    turn = kind.RandomAffine(10, (.05, .05), (.9, 1.1), interpolation=v1.InterpolationMode.BILINEAR)
    return kind.Compose([turn, kind.ColorJitter(.1, .1), kind.PILToTensor()])


def bench_augmentation(n, rounds):
    print("augmentation: rotation, shift, scale, brightness, contrast")
    settings = PictureAugmentation()
    for px in (224, 384):
        grey = torch.from_numpy(np.stack(chests(n, px)))[:, None].repeat(1, 3, 1, 1)
        colour = grey.clone()
        colour[:, 2] = 255 - colour[:, 2]
        drawn = settings.draw(n)
        for name, images in (("grey", grey), ("colour", colour)):
            pil = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images]
            ours = rate(lambda i=images, d=drawn: augment_pictures(i, settings, d), n, rounds)
            for version, kind in (("v1", v1), ("v2", v2)):
                chain = pil_chain(kind)
                usual = rate(lambda p=pil, c=chain: [c(image) for image in p], n, rounds)
                row(f"{name}, {px} px", usual, ours, f"torchvision {version} on PIL")


# --- memory ----------------------------------------------------------------------------------

def bench_stage(folder, n):
    print("the whole of it: decode into pictures.npy at 224 px")
    (folder/"a").mkdir()
    (folder/"b").mkdir()
    for i, path in enumerate(write_files(folder, chests(n, 512), ".jpg")): path.rename(folder/"ab"[i % 2]/path.name)
    table, peaks = find_pictures(folder), {}
    for times in (1, 4):
        table.items = pd.concat([table.items] * times, ignore_index=True)
        tracemalloc.start()
        start = time.perf_counter()
        decode_pictures(folder/"pictures.npy", table, PictureSettings())
        seconds, peaks[times] = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        print(f"  {len(table.items)} pictures: {seconds:.1f} s, {peaks[times]:.0f} MB at the peak")


# --- a probe ---------------------------------------------------------------------------------

def bench_probe(folder, n):
    print(f"a probe of {n} pictures at 224 px: EfficientNet-Lite2, ladder and submission, two threads")
    os.environ["HISTOKIT_CACHE"] = str(folder/"cache")
    toy_pictures(folder/"toy", ToySettings(n=n - n // 5, test=n // 5, px=224))
    torch.set_num_threads(2)
    settings = ClassifySettings(backbone="tf_efficientnet_lite2", weights="package")
    start, busy = time.perf_counter(), time.process_time()
    table = find_pictures(folder/"toy")
    run = RunFolder(folder/"run").make()
    data = prepare_pictures(run, table, PictureSettings(input_px=224))
    metrics = run_classification(run, data, settings, say=lambda line: None)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    auc = metrics["auc"]["value"]
    print(f"  {seconds:.0f} s, {busy:.0f} s of processor time, {len(data.items)} pictures, AUC {auc:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few pictures, for a look")
    n, rounds = (8, 1) if parser.parse_args().quick else (24, 3)
    torch.set_num_threads(1)
    for bench, count in ((bench_reader, n), (bench_epochs, n)):
        with tempfile.TemporaryDirectory() as folder: bench(Path(folder), count, rounds)
    bench_augmentation(n, rounds)
    with tempfile.TemporaryDirectory() as folder: bench_stage(Path(folder), 40 if n == 8 else 250)
    with tempfile.TemporaryDirectory() as folder: bench_probe(Path(folder), 60 if n == 8 else 500)


if __name__ == "__main__": main()

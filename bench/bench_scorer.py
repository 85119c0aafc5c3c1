"""Seconds to draft a picture of 55 MB on a processor, reading included, against the published system's 2.3 s.

    python bench/bench_scorer.py [--quick] [--threads N]

The picture is painted, 4920 x 3730 pixels of RGB; the networks have random weights, which cost the same. Each number is
the median of several drafts, with the file in the system's cache; the first draft, which loads the model, is told
apart. The share of reading is measured alone."""
import argparse
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch

from histokit.review.demo import PaintedScores, paint_crop
from histokit.review.measures import PRESETS
from histokit.review.scorer import Scorer, create_score_network, score_pixels

PUBLISHED = 2.3      # seconds
AIM = .5
KINDS = {
    "striped": dict(rowsperstrip=16),
    "striped, LZW": dict(rowsperstrip=16, compression="lzw"),
    "planar": dict(planarconfig="separate", rowsperstrip=16),
    "tiled, deflate": dict(tile=(256, 256), compression="zlib")}


def large_crop(height=3730, width=4920):
    "A crop of 55 MB, made of painted ones."
    small = paint_crop(PaintedScores(2, 1, 1, 2), 512)
    tall = np.tile(small, (-(-height // 512), -(-width // 512), 1))
    return np.ascontiguousarray(tall[:height, :width])


def write_kind(path, crop, how):
    "One TIFF; planes first where they are stored apart."
    planar = how.get("planarconfig") == "separate"
    tifffile.imwrite(path, crop.transpose(2, 0, 1) if planar else crop, photometric="rgb", **how)
    return path


def make_scorer(path, backbone, stages, views):
    "A scorer of four measures with five further heads, random weights."
    measures = PRESETS["pancreas"]
    network = create_score_network(len(measures) * 6, stages, backbone=backbone, weights="none", unfreeze=0)
    config = dict(measures=[asdict(m) for m in measures], code="mse", heads=6, input_px=224, views=views,
        cuts=[[.2, .4, .6, .8]] * 4)
    Scorer([network], config).save(path)
    return Scorer.load(path)


def median_seconds(work, rounds):
    "The median of several calls, the first left out."
    work()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def bench(folder, rounds):
    "A line for each kind of file and each network; returns the slowest draft of a striped file."
    crop, worst = large_crop(), 0.
    paths = {kind: write_kind(folder/f"{i}.tif", crop, how) for i, (kind, how) in enumerate(KINDS.items())}
    for backbone, stages, views in (("resnet18", (), "none"), ("tf_efficientnet_lite2", (-4, -3, -2), "flips")):
        scorer = make_scorer(folder/f"{backbone}.safetensors", backbone, stages, views)
        start = time.perf_counter()
        scorer.draft(paths["striped"])
        print(f"{backbone}, views {views}: first draft, model loaded {time.perf_counter() - start:.2f} s")
        for kind, path in paths.items():
            whole = median_seconds(partial(scorer.draft, path), rounds)
            reading = median_seconds(partial(score_pixels, path, 224), rounds)
            said = f"published {PUBLISHED} s   x {PUBLISHED / whole:.1f}"
            size = path.stat().st_size / 1e6
            print(f"  {kind:16}{size:5.0f} MB   draft {whole:.2f} s (reading {reading:.2f})   {said}")
            if kind == "striped": worst = max(worst, whole)
    return worst


def main():
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--quick", action="store_true", help="fewer rounds")
    ask.add_argument("--threads", type=int, default=0, help="of torch; 0 = as it is")
    asked = ask.parse_args()
    if asked.threads: torch.set_num_threads(asked.threads)
    print(f"draft of a 55 MB TIFF on a processor, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as place: worst = bench(Path(place), 3 if asked.quick else 9)
    print(f"the slowest draft of a striped TIFF took {worst:.2f} s; the aim is {AIM} s")


if __name__ == "__main__": main()

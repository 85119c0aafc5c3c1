"""How far registration leaves spots from the truth, and how often it is wrongly sure.

python bench/measure_registration.py [--slides 50] [--size 2000] [--real FILE.h5 ...] [--json OUT.json]

Painted slides get factors from 0.90 to 1.05 and shifts up to 80 px; so do the slides of a file whose coordinates are
right (--real; shifts up to three pitches), which are also tried as they are.
An error is the mean distance of a slide's spots from the truth, in spot pitches; "bias" is the same without the
rounding of the file, "stated" the standard error claimed for it. "Wrong" is a claim that leaves more than half a pitch.
"""
import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd

from histokit.core.files import write_json
from histokit.spots.slides import DataFactory
from histokit.spots.demo import make_slide
from histokit.spots.frame import fit_lattice
from histokit.spots.register import register

COVERAGE = (2197, 2270, 690, 1187, 1677, 328, 2088)     # spots of 4992


def distance(a, b, pitch): return float(np.hypot(*(a - b).T).mean()/pitch)


def trial(image, true, pitch, rng, values=None, move=True, reach=80.):
    "One slide with a factor and a shift of its own; how far off it was and is."
    scale, shift = (rng.uniform(.9, 1.05), rng.uniform(-reach, reach, 2)) if move else (1., np.zeros(2))
    given = np.round((true - shift)/scale)
    start = time.perf_counter()
    r = register(image, given, values)
    seconds = time.perf_counter() - start
    return dict(spots=len(true), scale=scale, found=r.scale, before=distance(given, true, pitch),
        after=distance(r.apply(given), true, pitch), confident=r.confident,
        bias=distance(r.apply((true - shift)/scale), true, pitch),
        stated=r.evidence.get("standard_errors", {}).get("position_px", np.nan)/pitch,
        method=r.evidence["method"], seconds=seconds, why="; ".join(r.evidence["reasons"]))


def painted(n, size, seed=0):
    "Slides made in memory, each with its own seed."
    for i in range(n):
        slide = make_slide([50, seed, i], size, 4., COVERAGE[i % 7]/4992)
        yield trial(slide.image, slide.xy, 100/slide.geo.um,
            np.random.default_rng([seed, i])) | dict(name=f"painted {i}")


def real(path, times=10):
    "Slides of a file whose coordinates are right: as they are, and moved `times` times."
    factory = DataFactory(path)
    for name, rows in factory.spots.groupby("slide").indices.items():
        table, image = factory.spots.iloc[rows], factory.read_slide(name)
        xy = table[["x", "y"]].to_numpy(float)
        values = table[factory.targets].to_numpy() if factory.slides[name].split == "Train" else None
        lattice = fit_lattice(xy)
        pitch = lattice.pitch if lattice else factory.slides[name].pitch_px
        for i in range(times + 1):
            rng = np.random.default_rng([9, i])
            seen = trial(image, xy, pitch, rng, values, move=i > 0, reach=max(80., 3*pitch))
            yield seen | dict(name=name, moved=i > 0)


def summary(t):
    "The figures of the page."
    sure = t[t.confident]
    def level(q): return float(np.quantile(sure.after, q)) if len(sure) else None
    return dict(slides=len(t), before_median=float(t.before.median()), after_median=level(.5), after_p95=level(.95),
        after_max=level(1.), confident=len(sure),
        abstained=1 - len(sure)/len(t), right=int((sure.after <= .5).sum()), wrong=int((sure.after > .5).sum()),
        seconds_median=float(t.seconds.median()), seconds_max=float(t.seconds.max()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--slides", type=int, default=50)
    p.add_argument("--size", type=int, default=2000)
    p.add_argument("--real", nargs="*", default=[])
    p.add_argument("--json", default="")
    a = p.parse_args()
    out, pd.options.display.width = {}, 220
    if a.slides:
        t = pd.DataFrame(painted(a.slides, a.size))
        out["painted"] = summary(t)
        print(t.drop(columns="why").round(4).to_string())
        print(*sorted(set(t.why[~t.confident])), sep="\n")
    for path in a.real:
        if not Path(path).exists():
            print(f"{path} is not here: skipped")
            continue
        t = pd.DataFrame(real(path))
        print(t.drop(columns="why").round(4).to_string())
        print(t.why[~t.confident].value_counts().head(12).to_string())
        out |= {f"{Path(path).name}, moved": summary(t[t.moved]), f"{Path(path).name}, as it is": summary(t[~t.moved])}
    print(pd.DataFrame(out).to_string())
    if a.json: write_json(a.json, out)


if __name__ == "__main__": main()

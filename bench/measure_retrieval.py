"""What a search is worth on real pictures and spots, beside chance; nothing of them is part of the project.

    python bench/measure_retrieval.py REAL [--sets chest_xray adult tb spots] [--embedder NAME] [--adapter]

REAL is a folder with cxr/chest_xray, cxr/adult, cxr/tb and her2st_cells.h5. Leave-one-out among labelled pictures; the
patient (of spots the slide) and near-duplicates are left out, and for comparison only the query itself."""
import argparse
import tempfile
import time
from pathlib import Path

from histokit.pictures.settings import PictureSettings
from histokit.retrieval.adapter import gallery_gain
from histokit.retrieval.embedders import DEFAULT_EMBEDDER, open_embedder
from histokit.retrieval.evaluate import evaluate_gallery, ranking_agreement
from histokit.retrieval.gallery import build_gallery
from histokit.retrieval.sources import open_source

SETS = ("chest_xray", "adult", "tb", "spots")


def measure(name, real, embedder, home, adapter):
    path = real/"her2st_cells.h5" if name == "spots" else real/"cxr"/name
    if not path.exists(): return print(f"\n== {name}: {path} is not here; skipped")
    source, start = open_source(path, 224., PictureSettings()), time.time()
    gallery = build_gallery(source, home/name, embedder)
    print(f"\n== {name}: {source!r}\n{len(gallery)} embedded in {time.time() - start:.0f} s by {embedder.asked}")
    print(evaluate_gallery(gallery))
    if name == "spots":
        for k in (1, 5, 20): show_agreement(ranking_agreement(gallery, k))
    elif adapter: show_gain(*gallery_gain(gallery))


def show_agreement(found):
    difference = f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    nearest = f"the {found['k']} nearest spots of other sections: Spearman {found['nearest']:.3f}"
    print(f"ranking of cell types by {nearest}, a random spot {found['chance']:.3f}, difference {difference}")


def show_gain(gain, chosen):
    print("an adapter, on patients that neither trained nor chose it; chosen:", ", ".join(f"{c.shape} {c.width}"
        for c in chosen))
    for row in gain.itertuples():
        interval = f"[{row.low:+.3f}, {row.high:+.3f}]"
        print(f"  {row.measure:18}{row.plain:.3f} -> {row.adapted:.3f}, difference {row.difference:+.3f} {interval}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--embedder", default=DEFAULT_EMBEDDER)
    parser.add_argument("--adapter", action="store_true")
    args = parser.parse_args()
    embedder = open_embedder(args.embedder)
    with tempfile.TemporaryDirectory() as home:
        for name in args.sets: measure(name, args.real, embedder, Path(home), args.adapter)


if __name__ == "__main__": main()

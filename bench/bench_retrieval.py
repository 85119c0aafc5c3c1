"""Milliseconds a query, exactly and nearly, and pictures embedded a second.

    python bench/bench_retrieval.py [--quick] [--exact] [--threads 2]

A million vectors of 512 numbers (--quick: fifty thousand), much as an encoder's are: mixtures of 2 000 groups in 64
directions, with noise. In vectors without any structure no approximate search finds its way. --exact leaves out the
graph, whose building takes minutes."""
import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from histokit.retrieval.embedders import open_embedder
from histokit.retrieval.gallery import build_gallery
from histokit.retrieval.nearest import (NearestSettings, exact_nearest, faiss_nearest, load_faiss, make_approximate,
    recall_of, set_effort)
from histokit.retrieval.sources import picture_source


class Mixture:
    "Vectors of length one that lie in groups."
    def __init__(self, width=512, directions=64, groups=2000, seed=0):
        self.rng = np.random.default_rng(seed)
        self.spread = (1 / np.sqrt(1 + np.arange(directions))).astype(np.float32)
        self.basis = np.linalg.qr(self.rng.standard_normal((width, directions)))[0].T.astype(np.float32)
        self.centre = (self.rng.standard_normal((groups, directions)) * self.spread * 1.5).astype(np.float32)

    def draw(self, n):
        out = np.empty((n, self.basis.shape[1]), np.float32)
        for a in range(0, n, 50_000):
            m = min(50_000, n - a)
            z = self.rng.standard_normal((m, len(self.basis)), np.float32) * self.spread
            z += self.centre[self.rng.integers(len(self.centre), size=m)]
            x = z @ self.basis + .02 * self.rng.standard_normal((m, out.shape[1]), np.float32)
            out[a:a + m] = x / np.linalg.norm(x, axis=1, keepdims=True)
        return out


def milliseconds(work, rounds):
    "The median and the least time of a call."
    work()
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        took.append((time.perf_counter() - start) * 1e3)
    return f"{np.median(took):8.1f} ms, at best {min(took):.1f}"


def bench_exact(vectors, asked):
    print(f"exact search of 1 query among {len(vectors):,} x {vectors.shape[1]}")
    print("  torch  ", milliseconds(lambda: exact_nearest(vectors, asked[:1], 10), 15))
    flat = load_faiss().IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    print("  FAISS flat", milliseconds(lambda: faiss_nearest(flat, asked[:1], 10), 7))


def bench_graph(vectors, asked):
    start = time.time()
    index, facts = make_approximate(vectors, NearestSettings("hnsw"))
    print(f"HNSW, built in {time.time() - start:.0f} s; chosen effort {facts['effort']}, recall {facts['recall']:.3f}")
    right = exact_nearest(vectors, asked, 10)[1]
    for effort in sorted({facts["effort"], 64, 128, 256}):
        set_effort(index, effort)
        start = time.perf_counter()
        found = np.concatenate([faiss_nearest(index, asked[i:i + 1], 10)[1] for i in range(len(asked))])
        took = (time.perf_counter() - start) / len(asked) * 1e3
        print(f"  effort {effort:4}: {took:6.2f} ms a query, recall@10 on new queries {recall_of(found, right):.3f}")


def bench_embedding(n, threads):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as home:
        for i in range(n):
            small = Image.fromarray(rng.integers(0, 255, (24, 20), np.uint8))
            (Path(home)/"set").mkdir(exist_ok=True)
            small.resize((1024, 860), Image.Resampling.BICUBIC).save(Path(home)/"set"/f"{i:04}.jpg", quality=90)
        embedder, source = open_embedder("timm:tf_efficientnet_lite0"), picture_source(Path(home)/"set")
        start = time.time()
        build_gallery(source, Path(home)/"index", embedder)
        took = time.time() - start
        print(f"{n} JPEGs of 1024 x 860 into an index at {embedder.px} px: {took:.0f} s, {n / took:.0f}/s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_faiss().omp_set_num_threads(args.threads)
    print(f"{args.threads} threads, load of the machine {os.getloadavg()[0]:.1f}")
    bench_embedding(100 if args.quick else 500, args.threads)
    mixture = Mixture()
    vectors, asked = mixture.draw(50_000 if args.quick else 1_000_000), mixture.draw(200)
    bench_exact(vectors, asked)
    if not args.exact: bench_graph(vectors, asked)


if __name__ == "__main__": main()

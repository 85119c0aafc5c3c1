"""The review app under load: four people who save at once, alone and while the queue works; tiles; the server's memory.

    python bench/bench_review.py [--quick] [--files 20]

Every figure is measured in this run, against a server in a process of its own."""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil

from histokit.review.serve import open_study
from histokit.review.store_images import NewFile
from histokit.review.tiles import write_tiles

ROOT = Path(__file__).resolve().parent.parent
US = {"X-Histokit": "1"}
KEYS = ("architecture", "atrophy", "complexes", "fibrosis")


def large_tiff(path, height=3456, width=5184, seed=0):
    "A striped TIFF of 18 million pixels, 54 MB."
    import tifffile
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (height // 16, width // 16, 3), dtype=np.uint8)
    tifffile.imwrite(path, small.repeat(16, 0).repeat(16, 1), photometric="rgb", rowsperstrip=16)
    return path


class Server:
    "The command `histokit review` in a process of its own."
    def __init__(self, study):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from histokit.start import begin; begin()"
        told = [sys.executable, "-c", code, "review", str(study), "--port", "0", "--no-browser"]
        there = os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
        self.process = subprocess.Popen(told, stdout=subprocess.PIPE, text=True, env=there)
        self.url = self.process.stdout.readline().split(" at ")[1].split()[0]

    def client(self): return httpx.Client(base_url=self.url, headers=US, trust_env=False, timeout=120)
    def memory(self): return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def filled_study(folder, n):
    "A study of n images without files."
    with open_study(folder) as store:
        for i in range(n): store.register(NewFile(f"S-{i // 10}_Image{i % 10:03}.tif", f"{i:064}", 1, 8, 8))


def save_all(server, people, images, rounds=1):
    "People who each score every image, one measure a save: seconds of each save."
    seconds, begin = [], time.perf_counter()
    def work(person):
        with server.client() as client:
            for i in range(images * rounds):
                uid = f"load-{person}-{i:06}-{os.getpid()}-{time.monotonic_ns()}"[:64]
                body = dict(events=[dict(uid=uid, measure=KEYS[i % 4], value=i % 5, seconds=1)])
                start = time.perf_counter()
                client.post(f"/api/images/{i % images + 1}/events", json=body).raise_for_status()
                seconds.append(time.perf_counter() - start)
    threads = [threading.Thread(target=work, args=(p,)) for p in range(people)]
    for t in threads: t.start()
    for t in threads: t.join()
    return seconds, len(seconds) / (time.perf_counter() - begin)


def told(name, seconds, rate):
    worst = statistics.quantiles(seconds, n=20)[-1]
    median = statistics.median(seconds)
    print(f"{name:44} {rate:6.0f} saves/s   median {median * 1e3:5.1f} ms   95 % under {worst * 1e3:6.1f} ms",
        flush=True)


def upload(server, path, n, sizes):
    "Upload one large file under n names; the server's memory after each."
    with server.client() as client:
        for i in range(n):
            content = path.read_bytes()[:-8] + i.to_bytes(8, "little")     # other bytes each time
            client.post("/api/uploads", files=dict(files=(f"L-1_Image{i:03}.tif", content))).raise_for_status()
            sizes.append(server.memory())


def main(quick, files):
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} before the start")
    with tempfile.TemporaryDirectory(prefix="histokit-bench-") as folder:
        folder = Path(folder)
        tiff = large_tiff(folder/"large.tif")
        begin = time.perf_counter()
        write_tiles(folder/"large.zip", tiff)
        cut = time.perf_counter() - begin
        print(f"tiles of 18 million pixels, {tiff.stat().st_size / 1e6:.0f} MB striped TIFF: {cut:.2f} s")
        filled_study(folder/"study", 200)
        server = Server(folder/"study")
        told("4 people, 200 images, nothing else", *save_all(server, 4, 50 if quick else 200))
        sizes, before = [], server.memory()
        loader = threading.Thread(target=upload, args=(server, tiff, 4 if quick else files, sizes))
        loader.start()
        told("while 54 MB files come in and are cut", *save_all(server, 4, 50 if quick else 200))
        loader.join()
        told("while the queue works", *save_all(server, 1, 50))
        print(f"server's memory: {before:.0f} MB before, {sizes[0]:.0f} MB after the first file, "
            f"{sizes[-1]:.0f} MB after {len(sizes)} of 54 MB, {max(sizes):.0f} MB at most")
        server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--files", type=int, default=20, help="of 54 MB that are uploaded; 100 need 6 GB of disk")
    asked = parser.parse_args()
    main(asked.quick, asked.files)

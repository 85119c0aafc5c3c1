"""The per-spot score: a loop over scipy, histokit on arrays, on tensors, and on a GPU where there is one.

    python tests/bench_metrics.py [--rows 2088 100000] [--types 35]

Times are the best of several runs. The loop runs on at most 2 088 rows; its time for more is in proportion.
Predictions are small integers, so that ties are many; the truth has none."""
import argparse, os, platform, sys, time

import numpy as np
import torch
from scipy.stats import spearmanr

from histokit.learn.scores import spearman_columns, spearman_rows


def clock(call, runs):
    "Best time in seconds."
    times = []
    for _ in range(runs): start = time.perf_counter(); call(); times.append(time.perf_counter() - start)
    return min(times)


def table(n, types, runs):
    "The lines for n rows."
    rng = np.random.default_rng(0)
    pred, true = rng.integers(0, 12, (n, types)).astype(float), rng.random((n, types))
    m = min(n, 2088)
    oracle = np.array([spearmanr(p, t).statistic for p, t in zip(pred[:m], true[:m])])
    loop = clock(lambda: [spearmanr(p, t).statistic for p, t in zip(pred[:m], true[:m])], 2) * n / m
    print(f"\n{f'{n} x {types}':24}{'ms':>10}{'faster':>10}{'largest error':>16}\n{'scipy loop':24}{loop * 1e3:10.1f}{'1 x':>10}")
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    ways = {"histokit, arrays": (pred, true)} | {f"histokit, {d} tensors": [torch.tensor(v, device=d) for v in (pred, true)] for d in devices}
    for name, given in ways.items():
        call = lambda given=given: spearman_rows(*given).sum().item()         # .item() waits for the device
        call(); seconds, out = clock(call, runs), spearman_rows(*(v[:m] for v in given))
        error = np.abs(np.asarray(out.tolist()) - oracle).max()
        print(f"{name:24}{seconds * 1e3:10.1f}{loop / seconds:8.0f} x{error:16.1e}", flush=True)
    slow = clock(lambda: [spearmanr(p, t).statistic for p, t in zip(pred.T, true.T)], 1)
    fast = clock(lambda: spearman_columns(pred, true), 2)
    print(f"{'per type, arrays':24}{fast * 1e3:10.1f}{slow / fast:8.1f} x  against a loop of scipy over the types")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[2088, 100_000])
    p.add_argument("--types", type=int, default=35); p.add_argument("--runs", type=int, default=5)
    a = p.parse_args()
    print(f"{os.cpu_count()} cores ({platform.machine()}), numpy {np.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads; "
        f"load {os.getloadavg()[0]:.1f}; {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU here'}")
    for n in a.rows: table(n, a.types, a.runs)


if __name__ == "__main__": sys.exit(main())

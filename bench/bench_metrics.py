"""Scores timed: Spearman of rows beside a loop over scipy, AUC beside scikit-learn, and intervals.

    python bench/bench_metrics.py [--rows 2088 100000] [--types 35]

Times are the best of several runs. The loop runs on at most 2 088 rows; its time for more is in proportion.
Predictions are small integers, so that ties are many; the truth has none."""
import argparse
import os
import platform
import sys
import time

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from histokit.learn.bootstrap import bootstrap_interval, mean_interval
from histokit.learn.scores import SCORES, roc_auc, spearman_columns, spearman_rows

LOOP_ROWS = 2088


def clock(call, runs):
    "Best time in seconds."
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def line(name, seconds, slow=None, rest=""):
    "A line of the table."
    faster = f"{slow / seconds:10.1f} x" if slow else " " * 12
    print(f"{name:28}{seconds * 1e3:10.1f}{faster}{rest}", flush=True)


def loop(pred, true):
    "Spearman of each row, one call of scipy at a time."
    return np.array([spearmanr(p, t).statistic for p, t in zip(pred, true)])


def time_rows(pred, true, runs):
    "Spearman of each row."
    m = min(len(pred), LOOP_ROWS)
    oracle = loop(pred[:m], true[:m])
    slow = clock(lambda: loop(pred[:m], true[:m]), 2) * len(pred) / m
    line("scipy loop", slow)
    ways = {"arrays": (pred, true)}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        ways[f"{device} tensors"] = [torch.tensor(v, device=device) for v in (pred, true)]
    for name, given in ways.items():
        call = lambda given=given: spearman_rows(*given).sum().item()         # .item() waits for the device
        call()
        error = np.abs(np.asarray(spearman_rows(*(v[:m] for v in given)).tolist()) - oracle).max()
        line(f"histokit, {name}", clock(call, runs), slow, f"  largest error {error:.1e}")


def time_columns(pred, true):
    "Spearman of each column."
    slow = clock(lambda: loop(pred.T, true.T), 1)
    line("per type, arrays", clock(lambda: spearman_columns(pred, true), 2), slow, "  than a loop of scipy")


def time_auc(pred, true, runs):
    "AUC of every column, and its largest difference to scikit-learn's."
    label = true > .9
    error = abs(roc_auc(pred, label) - roc_auc_score(label, pred))
    slow = clock(lambda: roc_auc_score(label, pred), runs)
    line("AUC, macro", clock(lambda: roc_auc(pred, label), runs), slow, f"  than scikit-learn, error {error:.1e}")


def time_intervals(pred, true):
    "1000 draws of 20 units: of a mean over rows, and of an AUC."
    unit, each = np.arange(len(pred)) * 20 // len(pred), spearman_rows(pred, true)
    label = true[:, 0] > .9
    line("interval of a mean", clock(lambda: mean_interval(each, unit), 2))
    line("interval of an AUC", clock(lambda: bootstrap_interval(SCORES["roc_auc"], pred[:, 0], label, unit), 1))


def measure(n, types, runs):
    "The lines for n rows."
    rng = np.random.default_rng(0)
    pred, true = rng.integers(0, 12, (n, types)).astype(float), rng.random((n, types))
    print(f"\n{f'{n} x {types}':28}{'ms':>10}{'faster':>12}")
    time_rows(pred, true, runs)
    time_columns(pred, true)
    time_auc(pred, true, runs)
    time_intervals(pred, true)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", default=[2088, 100_000])
    p.add_argument("--types", type=int, default=35)
    p.add_argument("--runs", type=int, default=5)
    a = p.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU here"
    threads = f"torch {torch.__version__} with {torch.get_num_threads()} threads"
    print(f"{os.cpu_count()} cores ({platform.machine()}), numpy {np.__version__}, {threads}; "
        f"load {os.getloadavg()[0]:.1f}; {gpu}")
    for n in a.rows: measure(n, a.types, a.runs)


if __name__ == "__main__": sys.exit(main())

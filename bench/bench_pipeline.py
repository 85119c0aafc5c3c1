"""What the pipeline costs besides its work: a run's wall time beside the same work called as functions, in one process.

    python bench/bench_pipeline.py [--epochs 3]

Both do the same stages on the small synthetic slides, with the same settings and threads. The difference is what a run
adds: processes, notebooks, checks before the first stage, figures, fingerprints. A run that has nothing to do costs as
much as its last line says.
"""
import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = ("stain_method=macenko", "views=flips", "input_px=48", "smoothing=auto", "fold_processes=1")


def run_seconds(run, overrides):
    "Wall time of a run, and what it says of each stage."
    asked = f"'demo', {list(overrides)!r}, {str(run)!r}, show=print"
    code = f"from histokit.pipeline import run_pipeline\nrun_pipeline({asked})"
    start = time.time()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return time.time() - start, said


def work_seconds(data, epochs):
    "The same work as plain calls, imports left out."
    from histokit.core.runs import RunFolder
    from histokit.pipeline import TASKS, find_recipe, read_recipe, resolve, stage_settings
    from histokit.spots.answers import run_prediction
    from histokit.spots.check_run import check_run
    from histokit.spots.crossval import run_training
    from histokit.spots.prepare import prepare_spots, register_slides, write_prepared
    from histokit.spots.slides import DataFactory
    from histokit.stain import normalise_file
    ask = resolve(read_recipe(find_recipe("demo")), [f"data_path={data}", f"epochs={epochs}", *SETTINGS])
    split, stain, network, training, prediction, _ = (stage_settings(s, ask[s.name]) for s in TASKS["spots"].stages)
    quiet, run, seconds = contextlib.redirect_stdout(io.StringIO()), RunFolder().make(), {}

    def timed(name, work):
        start = time.time()
        with quiet: found = work()
        seconds[name] = time.time() - start
        return found

    def prepare():
        factory = DataFactory(data)
        moved = register_slides(factory, split.registration)
        write_prepared(run, factory, prepare_spots(factory, split), moved, split)

    timed("data", prepare)
    timed("stain", lambda: normalise_file(data, run/"slides.h5", stain.stain_method, ""))
    timed("train", lambda: run_training(run, data, training, network.recipe()))
    timed("predict", lambda: run_prediction(run, data, prediction))
    timed("check", lambda: check_run(run.path, data))
    return seconds


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--epochs", type=int, default=3)
    a = p.parse_args()
    from histokit.spots.demo import smoke_demo
    data, folder = str(smoke_demo()), Path(tempfile.mkdtemp())
    asked = [f"data_path={data}", f"epochs={a.epochs}", *SETTINGS]
    wall, said = run_seconds(folder/"run", asked)
    again, _ = run_seconds(folder/"run", asked)
    work = work_seconds(data, a.epochs)
    total = sum(work.values())
    print(said.strip())
    print("the work alone: " + ", ".join(f"{name} {s:.1f} s" for name, s in work.items()))
    print(f"a run {wall:.1f} s, its work {total:.1f} s: overhead {wall - total:.1f} s, {wall / total:.2f} x the work")
    print(f"a run that has nothing to do {again:.1f} s")


if __name__ == "__main__": main()

"""What finished runs cost: time, memory and disk, from what each run folder says of itself, into one table.

    python bench/measure_recipes.py [RUN …] [--out nbs/measured/recipes.csv] [--venv .venv]

A row a recipe and data file; a row that is there already is replaced. Runs that were resumed are refused, since their
stages were not all timed on one day. Measure on a machine that does nothing else. With --venv, the disk that an
installation takes goes to install.csv beside the table.
"""
import argparse
from pathlib import Path

import h5py
import pandas as pd

from histokit.core.files import read_json, write_table
from histokit.core.text import BadInput

GB = 1e9


def folder_bytes(folder):
    "Bytes of all files below a folder."
    return sum(f.lstat().st_size for f in Path(folder).rglob("*"))


def slide_count(path):
    "Slides and spots of a data file."
    with h5py.File(path) as h5:
        tables = [t for part in h5["spots"].values() for t in part.values()]
        return len(tables), sum(len(t) for t in tables)


CUDA = ("nvidia", "triton")      # what PyTorch's usual build brings for GPUs, beside itself


def row_of(run):
    "What a finished run says of itself."
    about = read_json(Path(run)/"run.json")
    stages, asked = about["stages"].values(), about["parameters"]
    if not all("seconds" in s for s in stages): raise BadInput(f"{run}: some stages were not timed; run it afresh")
    slides, spots = slide_count(asked["data_path"])
    return dict(recipe=about["recipe"], data=Path(asked["data_path"]).name, slides=slides, spots=spots,
        backbone=asked["backbone"], device=about["device"], cores=about["cores"],
        seconds=round(sum(s["seconds"] for s in stages)), memory_gb=round(max(s["peak_mb"] for s in stages) / 1e3, 1),
        disk_gb=round(folder_bytes(run) / GB, 2), commit=about["commit"][:7])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--out", default="nbs/measured/recipes.csv")
    parser.add_argument("--venv")
    a = parser.parse_args()
    if a.venv:
        packages = next(Path(a.venv).glob("lib/python*/site-packages"))
        cuda = sum(folder_bytes(p) for name in CUDA for p in packages.glob(name))
        parts = {Path(a.venv).name: folder_bytes(a.venv), "cuda": cuda}
        disk = pd.DataFrame(dict(what=list(parts), gb=[round(size / GB, 1) for size in parts.values()]))
        write_table(Path(a.out).with_name("install.csv"), disk)
    if not a.runs: return
    table = pd.DataFrame([row_of(run) for run in a.runs])
    if Path(a.out).exists(): table = pd.concat([pd.read_csv(a.out), table])
    table = table.drop_duplicates(["recipe", "data", "device"], keep="last")
    write_table(a.out, table)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()

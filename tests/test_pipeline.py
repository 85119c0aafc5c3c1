"""The pipeline end to end: what a run leaves and skips, how it survives being killed, that it works from a wheel."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import SMOKE

from histokit.spots.slides import DataFactory
from histokit.pipeline import STAGES, run_pipeline
from histokit.core.submission import check_submission

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, "-c", "from histokit.cli import main; main()"]


def test_run_folder_is_complete(finished_run, demo_file):
    run, factory = finished_run, DataFactory(demo_file)
    for name in ("params.yaml", "slides.h5", "spots.parquet", "oof.parquet", "metrics.json", "submission.csv",
        "run.json", "model.json", "stain.json", "checks.json", *(f"{s}.ipynb" for s in STAGES)):
        assert (run/name).exists(), name
    check_submission(pd.read_csv(run/"submission.csv"), int(factory.spots.split.eq("Test").sum()), factory.targets)
    assert not list(run.rglob("*.tmp*"))
    info = json.loads((run/"run.json").read_text())
    assert set(info["stages"]) == set(STAGES) and all(s["seconds"] > 0 and s["peak_mb"] > 50
        for s in info["stages"].values())
    names = [r["name"] for r in json.loads((run/"metrics.json").read_text())["oof"]]
    assert names[0] == "random" and "constant: mean rank" in names and names[-1] == "+ smoothing"


def test_out_of_fold_is_out_of_fold(finished_run):
    oof, spots = pd.read_parquet(finished_run/"oof.parquet"), pd.read_parquet(finished_run/"spots.parquet")
    train = spots[spots.split == "Train"]
    assert len(oof) == len(train) and np.isfinite(oof.filter(regex=r"^C\d").to_numpy()).all()
    assert oof.groupby("slide").fold.nunique().max() == 1 and (oof.fold >= 0).all()


def test_slides_are_a_data_file(finished_run, demo_file):
    a, b = DataFactory(demo_file), DataFactory(finished_run/"slides.h5")
    assert a.targets == b.targets and a.names() == b.names()
    np.testing.assert_allclose(a.spots[["x", "y"]], b.spots[["x", "y"]])


def test_done_stages_are_skipped_and_changed_ones_run(finished_run, demo_file, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path/"again"))
    state = json.loads((run/"stages.json").read_text())
    said = []
    # The copy has another run_dir, which changes no result and so no key.
    run_pipeline("demo", [f"data_path={demo_file}", *SMOKE, "views=flips"], run, show=said.append)
    ran = [line for line in said if line.startswith("[")]
    assert ["unchanged" in line for line in ran][:3] == [True, True, True] and "unchanged" not in ran[4]
    assert json.loads((run/"stages.json").read_text())["00_data"] == state["00_data"]


def test_killed_run_leaves_nothing_half_and_carries_on(demo_file, tmp_path):
    run = tmp_path/"killed"
    args = [*CLI, "run", "demo", "--run-dir", str(run), "-p", f"data_path={demo_file}",
        *(a for p in [*SMOKE, "epochs=40", "patience=0"] for a in ("-p", p))]
    child = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.time() + 240
    while not (run/"folds"/"0"/"last.pt").exists() and time.time() < limit and child.poll() is None: time.sleep(.05)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert (run/"folds"/"0"/"last.pt").exists() and not (run/"submission.csv").exists()
    for made in run.rglob("*.parquet"): pd.read_parquet(made)
    for made in run.rglob("*.json"): json.loads(made.read_text())
    said = []
    run_pipeline("demo", [f"data_path={demo_file}", *SMOKE, "epochs=40", "patience=0"], run, show=said.append)
    assert sum("unchanged" in line for line in said) >= 3 and any("going on after epoch" in line for line in said)
    assert (run/"submission.csv").exists()


def test_two_runs_keep_out_of_one_folder(tmp_path, demo_file):
    from histokit.core.text import BadInput
    from histokit.core.runs import run_lock
    with run_lock(tmp_path), pytest.raises(BadInput, match="another run is at work"): run_pipeline("demo",
        [f"data_path={demo_file}"], tmp_path)


def test_score_and_validate(finished_run, demo_file):
    from histokit.spots.demo import demo_paths
    cli = lambda *a: subprocess.run([*CLI, *map(str, a)], capture_output=True, text=True)
    valid = cli("validate", finished_run/"submission.csv", "--data", demo_file)
    assert valid.returncode == 0 and "is valid" in valid.stdout
    truth = demo_paths(demo_file).truth
    assert json.loads(cli("score", truth, truth, "--json").stdout)["per_spot"] == pytest.approx(1)
    assert cli("score", finished_run/"submission.csv", "nowhere.csv").returncode == 1
    assert cli("score").returncode == 2


@pytest.mark.slow
def test_wheel_runs_outside_the_repository(tmp_path, demo_file):
    "The stage notebooks and the recipes travel in the wheel."
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True,
        capture_output=True)
    site = tmp_path/"site"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site),
        *map(str, tmp_path.glob("*.whl"))], check=True)
    env = os.environ | dict(PYTHONPATH=str(site))
    where = subprocess.run([sys.executable, "-c", "import histokit; print(histokit.__file__)"], env=env, cwd=tmp_path,
        capture_output=True, text=True, check=True).stdout
    assert str(site) in where
    done = subprocess.run([*CLI, "run", "demo", "--run-dir", str(tmp_path/"run"), "-p", f"data_path={demo_file}",
        *(a for p in SMOKE for a in ("-p", p))], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"run"/"submission.csv").exists()


def test_wheel_carries_notebooks_and_recipes(tmp_path):
    import zipfile
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"histokit/_assets/nbs/{s}.ipynb"
        for s in STAGES} <= set(names) and "histokit/_assets/params/demo.yaml" in names
    assert not [n for n in names if "checkpoint" in n or n.endswith(".h5")]

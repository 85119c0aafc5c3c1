"""The pipeline end to end: what a run leaves and skips, how it survives being killed, that it works from a wheel."""
import ast
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
import psutil
import pytest
from conftest import SMOKE, smoke
from typer.testing import CliRunner

from histokit.cli import app
from histokit.core.checks import error, has_error, note
from histokit.core.files import read_json
from histokit.core.notebooks import read_cells, stage_cells, stage_parameters
from histokit.core.stop import STOPPED
from histokit.core.submission import check_submission, write_submission
from histokit.core.text import BadInput
from histokit.pipeline import STAGES, find_recipe, read_recipe, run_pipeline, run_report, typed
from histokit.spots.check_predictions import check_submission_file
from histokit.spots.check_run import write_checks
from histokit.spots.demo import demo_paths, make_demo
from histokit.spots.slides import DataFactory

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
    run_pipeline("demo", [*smoke(demo_file), "views=flips"], run, show=said.append)
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


# --- verdicts and scores ----------------------------------------------------------------------------------------------

def cli(*args):
    "A command in this process."
    return CliRunner().invoke(app, [str(a) for a in args])


def test_score_and_validate(finished_run, demo_file):
    valid = cli("validate", finished_run/"submission.csv", "--data", demo_file)
    assert valid.exit_code == 0 and "is valid" in valid.stdout
    truth = demo_paths(demo_file).truth
    assert json.loads(cli("score", truth, truth, "--json").stdout)["per_spot"] == pytest.approx(1)
    assert cli("score", finished_run/"submission.csv", "nowhere.csv").exit_code == 1
    assert cli("score").exit_code == 2


def test_a_submission_has_one_interval(finished_run, demo_file, tmp_path):
    "The score of a file is the last rung of its run's ladder, beside the same constants."
    truth, rungs = demo_paths(demo_file).truth, read_json(finished_run/"metrics.json")["test"]
    shutil.copy(finished_run/"submission.csv", tmp_path/"mine.csv")
    scored = json.loads(cli("score", finished_run/"submission.csv", truth, "--json").stdout)
    assert json.loads(cli("score", tmp_path/"mine.csv", truth, "--data", finished_run, "--json").stdout) == \
        scored | dict(ladder=[*scored["ladder"][:-1], scored["ladder"][-1] | dict(name="mine.csv")])
    for name in ("per_spot", "low", "high"): assert scored[name] == pytest.approx(rungs[-1][name], abs=1e-6)
    for mine, run in zip(scored["ladder"][:-1], rungs): assert mine == run
    alone = cli("score", tmp_path/"mine.csv", truth)
    assert "[" not in alone.stdout and "give --data" in alone.stdout


def z_scores(t): return (t - t.mean()) / t.std()
def constant(t): return t * 0 + t.iloc[0]
def equal_rows(t): return t * 0 + 1

@pytest.mark.parametrize("change, valid", [(z_scores, False), (constant, True), (equal_rows, True), (np.log, True)])
def test_one_verdict_on_an_answer(change, valid, finished_run, demo_file, tmp_path):
    "Written, checked, scored: an answer is valid everywhere or nowhere, and no error is found in a valid one."
    factory, file = DataFactory(demo_file), tmp_path/"submission.csv"
    made = pd.read_csv(finished_run/"submission.csv")
    answer = change(made[factory.targets])
    pd.concat([made[["ID"]], answer], axis=1).to_csv(file, index=False)
    said = cli("validate", file, "--data", demo_file)
    assert (said.exit_code, " is valid" in said.stdout, "error" in said.stdout) == (1 - valid, valid, False)
    told = json.loads(cli("validate", file, "--data", demo_file, "--json").stdout)
    assert told["valid"] == valid and any(f["level"] == "error" for f in told["findings"]) != valid
    assert has_error(check_submission_file(file, factory)) != valid
    assert cli("score", file, demo_paths(demo_file).truth).exit_code == 1 - valid
    try: write_submission(tmp_path/"again.csv", answer.to_numpy(), factory.targets)
    except BadInput: assert not valid
    assert (tmp_path/"again.csv").exists() == valid


@pytest.mark.parametrize("objection", [BadInput("1 check failed"), RuntimeError("05_debug_checks failed (KeyError)")])
def test_objections_of_the_last_stage_undo_nothing(objection, finished_run, demo_file, tmp_path, monkeypatch):
    run, said = Path(shutil.copytree(finished_run, tmp_path/"run")), []
    for name in ("run.json", "checks.json", "05_debug_checks.ipynb"): (run/name).unlink()
    def object_to(*args): raise objection
    monkeypatch.setattr("histokit.pipeline.run_notebook", object_to)
    run_pipeline("demo", smoke(demo_file), run, show=said.append)
    assert f"    {objection}; the run is kept without it" in said
    assert set(read_json(run/"run.json")["stages"]) == set(STAGES[:-1])
    assert cli("export-h5ad", run, tmp_path/"out.h5ad").exit_code == 0


def test_what_checks_object_to_is_said_at_the_end(finished_run, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path/"run"))
    write_checks(run, dict(file=[note("it is small")], training=[error("it is broken", "mend it")]))
    assert "error   it is broken; mend it" in run_report(run) and "it is small" not in run_report(run)


# --- a run does the work, not the book --------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_executed_pages_are_short_and_open_with_the_result(stage, finished_run):
    cells = read_cells(finished_run/f"{stage}.ipynb")
    whole = read_cells(ROOT/"nbs"/f"{stage}.ipynb")
    texts = ["".join(c["source"]) for c in cells]
    code = [c for c in cells if c["cell_type"] == "code"]
    start = texts.index(next(t for t in texts if t.startswith("## The stage")))
    assert [c["cell_type"] for c in cells[:start]] == ["markdown", "code", "code"] and texts[0].startswith("# ")
    assert all(c["metadata"]["jupyter"]["source_hidden"] for c in cells[1:start])
    assert any(c.get("outputs") for c in cells[start:start + 3]), "no result in the first cells"
    story = {"".join(c["source"]) for c in whole} - {"".join(c["source"]) for c in stage_cells(whole)}
    assert not story & set(texts) and "fastcore" not in "".join(texts)
    assert not [o for c in code for o in c["outputs"] if "… " in "".join(o.get("text", ""))]


@pytest.mark.slow
def test_a_page_by_hand_gives_the_same_files(finished_run, tmp_path):
    "papermill on the whole page, story and all."
    run = Path(shutil.copytree(finished_run, tmp_path/"run"))
    shutil.rmtree(run/"folds")
    (run/"oof.parquet").unlink()
    asked = dict(read_json(run/"run.json")["parameters"], run_dir=str(run))
    known = stage_parameters(ROOT/"nbs"/"03_train.ipynb")
    given = [a for name in known for a in ("-r" if known[name].kind == "str" else "-p", name, str(asked[name]))]
    command = [sys.executable, "-m", "papermill", str(ROOT/"nbs"/"03_train.ipynb"), str(tmp_path/"out.ipynb"), *given]
    done = subprocess.run([*command, "-k", "python3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert made(run) == made(finished_run)
    a, b = (pd.read_parquet(r/"oof.parquet") for r in (run, finished_run))
    np.testing.assert_allclose(a.select_dtypes("number"), b.select_dtypes("number"), rtol=1e-3, atol=1e-4)


def made(run): return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file() and p.suffix != ".pt")


# --- stopped ----------------------------------------------------------------------------------------------------------

START = [sys.executable, "-c", "from histokit.start import begin; begin()"]


def stopped(args, when, *signals, folder):
    "Start a command, send its whole group signals after some seconds or after a line, and see what is left."
    with open(folder/"out", "w") as out, open(folder/"err", "w") as err:
        child = subprocess.Popen([*START, *map(str, args)], stdout=out, stderr=err, start_new_session=True)
    limit = time.time() + 240
    if isinstance(when, float): time.sleep(when)
    else:
        while when not in (folder/"out").read_text() and time.time() < limit and child.poll() is None: time.sleep(.05)
    family = psutil.Process(child.pid).children(recursive=True)
    for s in signals: os.killpg(child.pid, s)
    status = child.wait(20)
    left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not left and (folder/"err").read_text() == STOPPED + "\n"
    assert not [p for p in folder.rglob(".*") if p.name != ".lock"]
    return status


def smoke_args(demo_file, run, *more):
    return ["run", "demo", "--run-dir", run, *(a for p in [f"data_path={demo_file}", *SMOKE, *more] for a in ("-p", p))]


def test_stopped_at_the_start(demo_file, tmp_path):
    assert stopped(["check", demo_file], .3, signal.SIGINT, folder=tmp_path) == 130


def test_stopped_in_a_stage(demo_file, tmp_path):
    "Pressed twice while a kernel starts or works."
    args = smoke_args(demo_file, tmp_path/"run")
    assert stopped(args, "[1/", signal.SIGINT, signal.SIGINT, folder=tmp_path) == 130


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_training_and_gone_on_with(number, demo_file, tmp_path):
    run, more = tmp_path/"run", ["epochs=40", "patience=0", "fold_processes=2"]
    args = smoke_args(demo_file, run, *more)
    assert stopped(args, "epoch 3/", number, folder=tmp_path) == 128 + number
    for file in run.rglob("*.parquet"): pd.read_parquet(file)
    said = []
    run_pipeline("demo", [f"data_path={demo_file}", *SMOKE, *more], run, show=said.append)
    assert any("going on after epoch" in line for line in said) and (run/"submission.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("args", [["check", "DATA", "--html", "OUT.html"], ["stain", "DATA", "", "OUT.h5"]])
@pytest.mark.parametrize("seconds", [1., 3.])
def test_stopped_in_other_commands(args, seconds, tmp_path):
    data = make_demo(tmp_path/"data"/"large.h5", n_train=3, n_test=1, size=1600).path
    words = dict(DATA=data) | {name: tmp_path/name for name in ("OUT.html", "OUT.h5")}
    assert stopped([words.get(a, a) for a in args], seconds, signal.SIGINT, folder=tmp_path) == 130


def test_failed_pages_go_when_their_stage_has_succeeded(finished_run, demo_file, tmp_path):
    run = Path(shutil.copytree(finished_run, tmp_path/"run"))
    (run/"02_model.failed.ipynb").write_text("{}")
    run_pipeline("demo", smoke(demo_file), run, show=lambda line: None)
    assert not list(run.glob("*.failed.ipynb"))


def test_parameters_are_described_by_their_own_stage():
    rows = json.loads(cli("parameters", "best", "--json").stdout)
    for row in rows:
        declared = stage_parameters(ROOT/"nbs"/f"{row['stage']}.ipynb")[row["name"]]
        assert (row["about"], row["type"]) == (declared.about, declared.kind)
    by_stage = {(r["stage"], r["name"]): r for r in rows}
    assert len(by_stage) == len(rows) and len({r["about"] for r in rows if r["name"] == "seed"}) > 1
    given = {k: v for k, v in read_recipe(find_recipe("best")).items() if k != "task"}
    for r in rows:
        if r["name"] in given: assert r["value"] == typed(r["name"], given[r["name"]], r["type"])
    assert [r["name"] for r in json.loads(cli("parameters", "best", "smooth", "--json").stdout)] == ["smoothing"]
    few = json.loads(cli("parameters", "seed", "--stage", "train", "--json").stdout)
    assert [(r["stage"], r["name"]) for r in few] == [("03_train", "seed")]
    assert cli("parameters", "porbe").exit_code == 1


# --- what is installed ----------------------------------------------------------------------------------------------

HIDE = """
import importlib.machinery
find, hidden = importlib.machinery.PathFinder.find_spec, set({hidden!r})
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in hidden else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
EXTRAS = dict(fast=["numba"], tiff=["tifffile", "imagecodecs"], boost=["lightgbm"], torchsort=["torchsort"],
    staintools=["staintools", "spams", "cv2"], kaggle=["kaggle"], lab=["jupyterlab", "ipywidgets", "anywidget"],
    dicom=["pydicom"], dev=["nbdev", "fastcore", "execnb", "nbconvert"])


def required(name, found):
    "The distributions that one needs to be installed, with those that they need."
    from importlib.metadata import PackageNotFoundError, requires
    from packaging.requirements import Requirement
    try: lines = requires(name) or []
    except PackageNotFoundError: return found
    found.add(canonical(name))
    for r in map(Requirement, lines):
        wanted = r.marker is None or r.marker.evaluate(dict(extra=""))
        if wanted and canonical(r.name) not in found: required(r.name, found)
    return found


def canonical(name): return name.lower().replace("_", "-").replace(".", "-")


@pytest.fixture(scope="session")
def undeclared():
    "The top-level modules that `pip install .` alone would not have brought here."
    from importlib.metadata import packages_distributions
    there = required("histokit", set())
    modules = packages_distributions().items()
    return sorted({m for m, names in modules if not there & set(map(canonical, names))} - {"pip", "setuptools"})


def top_level_imports(source):
    "The first names of what a source imports when it is executed, functions left out."
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import): yield from (a.name.partition(".")[0] for a in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: yield node.module.partition(".")[0]


def test_a_run_imports_nothing_undeclared(undeclared):
    assert {"fastcore", "tifffile", "numba", "nbdev"} <= set(undeclared) and "torch" not in undeclared
    sources = {s: "\n".join("".join(c["source"]) for c in stage_cells(read_cells(ROOT/"nbs"/f"{s}.ipynb"))
        if c["cell_type"] == "code") for s in STAGES}
    modules = {f.relative_to(ROOT/"histokit").as_posix(): f for f in (ROOT/"histokit").rglob("*.py")}
    app = {name for name in modules if name.startswith("review/")}      # an extra; imported when it is asked for
    sources |= {name: f.read_text() for name, f in modules.items() if "_assets" not in f.parts and name not in app}
    at_once = [n for text in sources.values() for n in ast.parse(text).body if isinstance(n, ast.ImportFrom)]
    assert app and not [n.module for n in at_once if n.level and (n.module or "").startswith("review")]
    wrong = {name: set(top_level_imports(text)) & set(undeclared) for name, text in sources.items()}
    assert not {name: found for name, found in wrong.items() if found}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with the wheel of this tree, installed."
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder/"site"),
        *map(str, folder.glob("*.whl"))], check=True)
    return folder/"site"


def run_from_wheel(site, folder, hidden, *args):
    "The installed command in another folder, where some modules cannot be imported."
    (folder/"hook").mkdir()
    (folder/"hook"/"sitecustomize.py").write_text(HIDE.format(hidden=list(hidden)))
    env = os.environ | dict(PYTHONPATH=os.pathsep.join([str(folder/"hook"), str(site)]))
    done = subprocess.run([sys.executable, str(site/"bin"/"histokit"), *args], env=env, cwd=folder, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "caught in kernel" not in done.stderr
    where = "import histokit; print(histokit.__file__)"
    said = subprocess.run([sys.executable, "-c", where], env=env, cwd=folder, capture_output=True, text=True).stdout
    assert str(site) in said
    return done


PROBE = ["backbone=test_resnet.r160_in1k", "weights=none", "input_px=32", "pca=8", "views=none", "smoothing=1"]
SMALL = dict(demo=SMOKE, probe=PROBE)


def runs_from_wheel(recipe, site, folder, hidden, demo_file):
    options = [f"data_path={demo_file}", *SMALL[recipe]]
    asked = [a for p in options for a in ("-p", p)]
    run_from_wheel(site, folder, hidden, "run", recipe, "--run-dir", "run", *asked)
    assert {"submission.csv", "run.json", "checks.json"} <= {f.name for f in (folder/"run").iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL)
def test_wheel_runs_with_what_it_declares(recipe, site, tmp_path, demo_file, undeclared):
    "The stage notebooks and the recipes travel in the wheel; nothing is imported that it does not bring."
    runs_from_wheel(recipe, site, tmp_path, undeclared, demo_file)


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("recipe", SMALL)
def test_wheel_runs_without_an_extra(recipe, extra, site, tmp_path, demo_file):
    runs_from_wheel(recipe, site, tmp_path, EXTRAS[extra], demo_file)


def test_wheel_carries_notebooks_and_recipes(site):
    import zipfile
    names = zipfile.ZipFile(next(site.parent.glob("*.whl"))).namelist()
    assert {f"histokit/_assets/nbs/{s}.ipynb"
        for s in STAGES} <= set(names) and "histokit/_assets/params/demo.yaml" in names
    assert not [n for n in names if "checkpoint" in n or n.endswith(".h5")]

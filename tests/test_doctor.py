"""`histokit doctor` on machines, runs and files in which something was broken: what it prints, and its exit status."""
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import histokit.cli_doctor
import histokit.core.machine
import histokit.learn.encoders
from histokit.cli import app
from histokit.core.files import write_json
from histokit.core.processes import find_function
from histokit.core.runs import RunFolder, StageBook
from histokit.doctor_run import how_to_go_on, keys_now
from histokit.pipeline import TASKS, find_recipe, read_recipe, resolve

BEGIN = [sys.executable, "-c", "from histokit.start import begin; begin()", "doctor"]
WELL = dict(torch="2.15.0", cuda=None, cpu="", gpus=[], mps=False)


def doctor(*args): return CliRunner().invoke(app, ["doctor", *map(str, args)])


def says(answer, text, status):
    "Assert what it printed, and its exit status."
    assert text in answer.stdout, answer.output
    assert answer.exit_code == status, answer.output
    assert answer.exception is None or isinstance(answer.exception, SystemExit)


def refused(answer, text):
    "Assert that it refused in one line."
    assert answer.exit_code == 1 and not answer.stdout, answer.output
    assert answer.stderr.startswith("histokit: ") and answer.stderr.count("\n") == 1 and text in answer.stderr


# --- the machine ---------------------------------------------------------------------------------------------------

@pytest.fixture
def machine(monkeypatch, tmp_path):
    "A well machine, home and working folder of its own; torch is not asked."
    monkeypatch.setattr("histokit.cli_doctor.ask_torch", lambda: WELL)
    monkeypatch.setattr("histokit.cli_doctor.driver_gpus", lambda: ([], ""))
    for name in [n for n in os.environ if n.startswith(("KAGGLE_", "HF_"))]: monkeypatch.delenv(name)
    home = tmp_path/"home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home/".cache"))
    monkeypatch.chdir(tmp_path)
    return home


def package(folder, name, version, *needs):
    "A folder in which a package of this version seems to be installed."
    info = folder/f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs)]
    (info/"METADATA").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_a_torch_that_does_not_load_is_a_finding(tmp_path):
    (tmp_path/"torch").mkdir()
    (tmp_path/"torch"/"__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    broken = os.environ | dict(PYTHONPATH=str(tmp_path))
    done = subprocess.run(BEGIN, capture_output=True, text=True, env=broken, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    said = "error: torch cannot be imported (ImportError: libcudart.so.12: cannot open shared object file)"
    assert said in done.stdout
    assert "pip install --force-reinstall torch torchvision" in done.stdout
    (tmp_path/"w.safetensors").write_bytes(bytes([2]) + bytes(7) + b"{}")
    asked = subprocess.run([*BEGIN, tmp_path/"w.safetensors"], capture_output=True, text=True, env=broken, timeout=120)
    assert asked.returncode == 1 and "Traceback" not in asked.stdout + asked.stderr
    assert "error: cannot be judged: libcudart.so.12: cannot open shared object file; histokit doctor" in asked.stdout


def test_this_machine_as_text_and_as_json(machine):
    text, value = doctor(), json.loads(doctor("--json").stdout)
    for heading in ("machine", "disk", "packages", "extras", "weights", "tools", "Kaggle", "online"):
        assert f"\n{heading}\n" in f"\n{text.stdout}" and value[heading]
    errors = [f for some in value.values() if isinstance(some, list) for k in some for f in k["findings"]
        if f["level"] == "error"]
    assert value["errors"] == len(errors) and text.exit_code == (1 if errors else 0)
    assert len(text.stdout.splitlines()) < len(doctor("--all").stdout.splitlines())


def test_a_full_disk(machine, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("histokit.core.machine.shutil.disk_usage", lambda path: usage(10**12, 10**12, 5 << 20))
    says(doctor(), "error: the disk is full, or nearly so; free some space, or choose another folder", 1)


def test_a_folder_that_is_a_file(machine):
    Path("runs").write_text("")
    says(doctor(), "is a file, not a folder", 1)


def test_little_memory(machine, monkeypatch):
    monkeypatch.setattr("histokit.core.machine.memory_limit", lambda root: 10**9)
    says(doctor(), "warning: little for a run, which takes 2 GB and more; close other programs", 0)


@pytest.mark.parametrize("name, version, needs, said", [
    ("numpy", "1.20.0", (), "error: 1.20.0 is not >=1.26; pip install 'numpy>=1.26'"),
    ("torchvision", "0.29.2", ("torch==9.9.9",), "error: was made for torch==9.9.9, and torch is "),
    ("kaggle", "1.6.0", (), "warning: too old: kaggle 1.6.0; pip install 'histokit[kaggle]'")])
def test_wrong_versions(machine, monkeypatch, tmp_path, name, version, needs, said):
    monkeypatch.syspath_prepend(package(tmp_path/"site", name, version, *needs))
    says(doctor(), said, 0 if said.startswith("warning") else 1)


def test_packages_that_are_missing(machine, monkeypatch):
    there = histokit.core.installed.installed_version
    lost = ("h5py", "pydicom", "tifffile", "imagecodecs")
    monkeypatch.setattr("histokit.core.installed.installed_version", lambda n: "" if n in lost else there(n))
    answer = doctor()
    says(answer, "error: is not installed; pip install 'h5py>=3.10'", 1)
    assert "note: optional; pip install 'histokit[dicom,tiff]', or some of them" in answer.stdout


@pytest.mark.parametrize("said, driver, text", [
    (WELL, (["Tesla T4"], "550.54"), "error: torch uses none of them: torch is built for the CPU"),
    (WELL | dict(cuda="12.8", gpus=[dict(name="Tesla K80", bytes=12e9, sm="3.7", fault="no kernel image")]),
        (["Tesla K80"], "470"), "error: it does not compute (no kernel image); install torch for this driver"),
    (dict(fault="it did not answer within 60 s"), ([], ""), "error: torch cannot be imported (it did not answer")])
def test_gpus_that_do_not_compute(machine, monkeypatch, said, driver, text):
    monkeypatch.setattr("histokit.cli_doctor.ask_torch", lambda: said)
    monkeypatch.setattr("histokit.cli_doctor.driver_gpus", lambda: driver)
    says(doctor(), text, 1)


def test_the_driver_is_asked(machine, monkeypatch, tmp_path):
    program = tmp_path/"bin"/"nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'Tesla T4, 550.54'\necho 'Tesla T4, 550.54'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    assert histokit.core.machine.driver_gpus() == (["Tesla T4", "Tesla T4"], "550.54")
    program.write_text("#!/bin/sh\nexit 9\n")
    assert histokit.core.machine.driver_gpus() == ([], "")


def test_a_log_in_that_others_may_read(machine):
    assert "note: needed only to push kernels and to submit; kaggle auth login" in doctor().stdout
    file = machine/".kaggle"/"kaggle.json"
    file.parent.mkdir()
    file.write_text('{"username": "ann", "key": "0123456789abcdef"}')
    file.chmod(0o644)
    before = doctor()
    says(before, f"warning: others on this machine may read {file}; chmod 600 {file}", before.exit_code)
    file.chmod(0o600)
    after = doctor("--json")
    assert {k["level"] for k in json.loads(after.stdout)["Kaggle"]} == {"ok"} and "for ann" in after.stdout
    assert "0123456789abcdef" not in before.output + after.output
    file.write_text("{")
    says(doctor(), f"error: {file} is not readable", 1)


def test_nothing_is_asked_of_the_internet_unless_told(machine, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.socket.connect", lambda self, address: asked.append(address))
    monkeypatch.setattr("histokit.learn.encoders.is_reachable", lambda url: asked.append(url))
    assert "internet  not asked; --online does" in doctor().stdout and not asked
    says(doctor("--online"), "warning: cannot be reached; look at the network and at a proxy", 0)
    assert asked == ["https://www.kaggle.com", "https://huggingface.co"]


def test_weights_that_were_not_fetched_whole(machine):
    checkpoints = machine/".cache"/"torch"/"hub"/"checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(torch.zeros(9999), checkpoints/"resnet18-f37072fd.pth")
    whole = (checkpoints/"resnet18-f37072fd.pth").read_bytes()
    (checkpoints/"resnet18-f37072fd.pth").write_bytes(whole[:20_000])
    says(doctor(), "error: resnet18-f37072fd.pth is cut off: 20.0 kB, without its end; delete it", 1)


# --- a run ---------------------------------------------------------------------------------------------------------

STAGES = TASKS["spots"].names()


@pytest.fixture
def run(tmp_path, demo_file):
    "A finished run of spots, as its files say."
    from histokit.spots.demo import demo_paths
    data = tmp_path/"my slides.h5"
    shutil.copy(demo_file, data)
    made = RunFolder(tmp_path/"runs"/"mine").make()
    ask = resolve(read_recipe(find_recipe("demo")), [f"data_path={data}", "epochs=7", "hidden=64,32"])
    (made/"params.yaml").write_text(yaml.safe_dump(dict(recipe="demo", task="spots") | ask.flat()))
    shutil.copy(demo_paths(demo_file).truth, made/"submission.csv")
    for stage, key in keys_now(TASKS["spots"], ask).items():
        (made/f"{stage}.json").write_text("{}")
        since = (made/f"{stage}.json").stat().st_mtime_ns
        StageBook(made).add(stage, key, since, 3., 900)
    write_json(made/"run.json", dict(recipe="demo", histokit="0.1.0", python="3.11", device="cpu"))
    return made


def test_a_run_that_is_well(run):
    answer = doctor(run.path)
    says(answer, "all is well", 0)
    assert "valid: 119 rows, 35 targets" in answer.stdout
    assert f"to hand in  histokit kernels submit {run.path}/submission.csv --competition SLUG" in answer.stdout


def test_the_line_to_type_asks_for_the_same(run):
    "Also where a path holds a space."
    words = shlex.split(how_to_go_on(run))
    assert words[:5] == ["histokit", "run", "demo", "--run-dir", str(run.path)]
    given = [text for flag, text in zip(words, words[1:]) if flag == "-p"]
    assert {"epochs=7", "hidden=64,32"} <= set(given)
    asked = yaml.safe_load((run/"params.yaml").read_text())
    again = dict(recipe="demo", task="spots") | resolve(read_recipe(find_recipe("demo")), given).flat()
    assert again == asked


def failed_at(run, stage, *outputs):
    "The run as it is when a stage has failed."
    StageBook(run).forget(STAGES[STAGES.index(stage):])
    cell = dict(cell_type="code", source=["1"], outputs=list(outputs))
    write_json(run/f"{stage}.failed.ipynb", dict(cells=[cell]))


def test_a_run_with_a_failed_stage(run):
    failed_at(run, "03_train", dict(output_type="error", ename="BadInput", evalue="the loss is nan;\nlower lr"))
    answer = doctor(run.path)
    says(answer, "error: BadInput: the loss is nan; lower lr; 03_train.failed.ipynb shows where", 1)
    assert "warning  04_tta_smoothing  not run" in answer.stdout
    assert "to go on  histokit run demo --run-dir" in answer.stdout and "kernels submit" not in answer.stdout


def test_a_stage_whose_process_was_ended(run):
    failed_at(run, "03_train")
    says(doctor(run.path), "error: its process was ended, most likely for want of memory: lower cache_mb", 1)


def test_a_report_that_failed_undoes_nothing(run):
    failed_at(run, "05_debug_checks", dict(output_type="error", ename="KeyError", evalue="'x'"))
    says(doctor(run.path), "warning: KeyError: 'x'", 0)


def test_a_run_that_was_stopped(run):
    StageBook(run).forget(STAGES[3:])
    (run/"folds").mkdir()
    (run/"folds"/".model.77.tmp.safetensors").write_bytes(b"")
    answer = doctor(run.path)
    says(answer, "warning: it has not run, or was stopped; go on", 0)
    assert "half-written  .model.77.tmp.safetensors" in answer.stdout


def test_a_run_that_is_at_work(run):
    StageBook(run).forget(STAGES[3:])
    with open(run/".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = doctor(run.path)
    says(answer, "another process works in it", 0)
    assert "not yet" in answer.stdout and "until it has ended" in answer.stdout


def test_files_of_a_run_that_are_gone(run):
    (run/"01_stain.json").unlink()
    lost = "error: what it made is gone, or of another size: 01_stain.json; go on: it is then run again"
    says(doctor(run.path), lost, 1)


def test_a_run_of_other_code(run):
    book = StageBook(run).read()
    StageBook(run).add("02_model", "another key", 0, 3., 900)
    assert StageBook(run).read()["01_stain"] == book["01_stain"]
    answer = doctor(run.path)
    says(answer, "warning: out of date: the code, its parameters or the data are others now", 0)
    assert "to renew    histokit run demo" in answer.stdout and "to hand in" in answer.stdout


def test_data_that_are_gone(run, tmp_path):
    (tmp_path/"my slides.h5").unlink()
    says(doctor(run.path), "error: it is gone; put it back, or start a new run with -p data_path=FILE", 1)


def test_data_that_have_changed(run, tmp_path):
    write_json(run/"run.json", dict(recipe="demo", data_sha256="0" * 64))
    says(doctor(run.path), "warning: it has changed since the run", 0)


@pytest.mark.parametrize("name, text, said", [
    ("params.yaml", "a: [", "error: params.yaml is not readable"),
    ("params.yaml", "task: spoons\n", "error: params.yaml names no task that is known here"),
    ("params.yaml", "task: spots\nepocs: 3\n", "error: unknown parameter 'epocs' (did you mean 'epochs'?)"),
    ("stages.json", "{", "stages.json  not readable"),
    ("run.json", "{", "is not readable JSON"),
    ("checks.json", "[", "is not readable JSON")])
def test_files_of_a_run_that_are_broken(run, name, text, said):
    (run/name).write_text(text)
    says(doctor(run.path), said, 1)


def test_what_a_run_objects_to(run):
    found = [dict(level="warning", what="the model scores 0.4", mend="train longer", where="scores"),
        dict(level="note", what="119 rows differ")]
    write_json(run/"checks.json", dict(counts={}, parts=dict(predictions=found)))
    answer = doctor(run.path)
    says(answer, "warning: scores: the model scores 0.4; train longer", 0)
    assert "119 rows differ" not in answer.stdout


def test_an_answer_that_is_not_valid(run):
    lines = (run/"submission.csv").read_text().splitlines()
    (run/"submission.csv").write_text("\n".join(lines[:-3]) + "\n")
    says(doctor(run.path), "116 rows for 119 test spots; give one row for each", 1)


# --- files and folders ---------------------------------------------------------------------------------------------

def shifted(lines): return [lines[0], *(f"{i + 1},{line.partition(',')[2]}" for i, line in enumerate(lines[1:]))]
def without_a_row(lines): return [*lines[:5], *lines[6:]]
def lost_number(lines): return [*lines[:-1], lines[-1].rpartition(",")[0] + ","]


def standardised(lines):
    rows = np.array([line.split(",")[1:] for line in lines[1:]], float)
    z = (np.log(rows) - np.log(rows).mean(0)) / np.log(rows).std(0)
    return [lines[0], *(",".join(map(str, [i, *row])) for i, row in enumerate(z))]


@pytest.mark.parametrize("change, alone, with_data", [
    (shifted, "row 0 has ID 1; IDs count 0 to 118", "row 0 has ID 1; IDs count 0 to 118"),
    (without_a_row, "row 4 has ID 5", "118 rows for 119 test spots"),
    (lost_number, "C35 of ID 118 is not finite", "C35 of ID 118 is not finite"),
    (standardised, "z-scores", "z-scores")])
def test_answers_that_are_wrong(tmp_path, demo_file, change, alone, with_data):
    from histokit.spots.demo import demo_paths
    file = tmp_path/"answer.csv"
    file.write_text("\n".join(change(demo_paths(demo_file).truth.read_text().splitlines())) + "\n")
    says(doctor(file), alone, 1)
    says(doctor(file, "--data", demo_file), with_data, 1)


def test_an_answer_that_is_right(demo_file):
    from histokit.spots.demo import demo_paths
    truth = demo_paths(demo_file).truth
    says(doctor(truth), "answer: 119 rows, 35 targets", 0)
    assert "give --data FILE.h5, FOLDER or RUN" in doctor(truth).stdout
    says(doctor(truth, "--data", demo_file), f"for {demo_file}", 0)


def test_a_data_file_whole_and_cut(tmp_path, demo_file):
    says(doctor(demo_file), "HDF5 file of slides", 0)
    half = tmp_path/"half.h5"
    half.write_bytes(Path(demo_file).read_bytes()[:100_000])
    says(doctor(half), "error: it is cut off: 100 kB of ", 1)
    answer = doctor(demo_file, half)
    says(answer, f"{half}: file", 1)
    assert f"{demo_file}: file" in answer.stdout


@pytest.mark.parametrize("name, content, said", [
    ("resnet18.pth", b"<!DOCTYPE html><html>Sign in", "error: it is a web page; the download failed"),
    ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "error: it is a pointer that Git LFS left"),
    ("slides.h5", b"", "error: it is empty"),
    ("slides.h5", b"\0" * 999, "error: it is zeros only"),
    ("answer.csv", b"\x1f\x8b\x08 data", "error: it is packed with gzip; unpack it first"),
    ("a.ipynb", b"{}", "error: it is no notebook that can be read"),
    ("a.yaml", b"task: spots\nlosss: mse\n", "error: unknown parameter 'losss' (did you mean 'loss'?)"),
    ("a.png", b"\x89PNG\r\n\x1a\n", "error: ")])
def test_files_that_are_not_what_they_seem(tmp_path, name, content, said):
    (tmp_path/name).write_bytes(content)
    says(doctor(tmp_path/name), said, 1)


def test_weights(tmp_path):
    good = dict(w=torch.ones(1000, 10), b=torch.zeros(3))
    save_file(good, tmp_path/"good.safetensors")
    says(doctor(tmp_path/"good.safetensors"), "weights: 2 tensors, 10,003 numbers of float32, 40.1 kB", 0)
    whole = (tmp_path/"good.safetensors").read_bytes()
    (tmp_path/"cut.safetensors").write_bytes(whole[:10_000])
    says(doctor(tmp_path/"cut.safetensors"), "error: it is cut off: 10.0 kB of 40.1 kB", 1)
    torch.save(good | dict(w=torch.tensor([float("inf")])), tmp_path/"inf.pth")
    says(doctor(tmp_path/"inf.pth"), "error: 1 tensors hold what is no number (w); train or copy it again", 1)
    torch.save([1, 2], tmp_path/"list.pth")
    says(doctor(tmp_path/"list.pth"), "holds no state dict", 1)


def test_folders(tmp_path):
    (tmp_path/"kernel").mkdir()
    (tmp_path/"kernel"/"kernel-metadata.json").write_text("{}")
    says(doctor(tmp_path/"kernel"), "Kaggle kernel", 1)
    rng = np.random.default_rng(0)
    for kind in ("normal", "ill"):
        (tmp_path/"pictures"/"train"/kind).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path/"pictures"/"train"/kind/f"{kind}{i}.png")
    (tmp_path/"pictures"/"train"/"ill"/"ill3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    answer = doctor(tmp_path/"pictures")
    says(answer, "folder of pictures", 0)
    assert "warning: train/ill/ill3.png: 1 left out" in answer.stdout


def test_what_is_nothing_that_is_known(tmp_path):
    (tmp_path/"notes.txt").write_text("to do")
    (tmp_path/"empty").mkdir()
    refused(doctor(tmp_path/"nothing.h5"), "does not exist; check the path")
    refused(doctor(tmp_path/"empty"), "is empty; give a run, or a folder of pictures or kernels")
    refused(doctor(tmp_path/"notes.txt"), "is text; give a run, a data file, an answer")
    refused(doctor(tmp_path/"notes.txt"/"a.csv"), "does not exist")


@pytest.mark.parametrize("recipe", ["demo", "image_probe"])
def test_the_keys_are_those_of_the_pipeline(tmp_path, demo_file, monkeypatch, recipe):
    "A run whose stages do nothing but are entered in the book is up to date until a parameter is another."
    from histokit import pipeline
    from histokit.pictures.toy import smoke_pictures
    monkeypatch.setattr(pipeline, "run_notebook", lambda *args: dict(seconds=1., peak_mb=1))
    monkeypatch.setattr(pipeline, "package_fingerprint", lambda: "the code")
    monkeypatch.setattr(pipeline, "start_ready", lambda: None)
    monkeypatch.setattr(pipeline, "call_ready", lambda name, *args: find_function(name)(*args))
    data = demo_file if recipe == "demo" else smoke_pictures()
    asked = [f"data_path={data}", "seed=5"]
    made = pipeline.run_pipeline(recipe, asked, tmp_path/"run", show=lambda line: None)
    assert "out of date" not in doctor(made).stdout
    values = yaml.safe_load((made/"params.yaml").read_text())
    (made/"params.yaml").write_text(yaml.safe_dump(values | dict(seed=6)))
    assert "warning: out of date" in doctor(made).stdout

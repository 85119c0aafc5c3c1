"""Bad input through the command line: one line with the trouble and the mend, exit status 1, earlier results kept."""
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import SMOKE
from typer.testing import CliRunner

from histokit.core.files import atomic, read_json, write_json, write_table
from histokit.core.text import BadInput
from histokit.cli import app
from histokit.spots.mistakes import replace_dataset

CLI = [sys.executable, "-c", "from histokit.cli import main; main()"]
FIRST = "spots/Train/S_1"


def cli(*args): return CliRunner().invoke(app, [str(a) for a in args])


def edit(h, change, where=FIRST):
    "Change a slide's record array."
    replace_dataset(h, where, change(h[where][:]))


def renamed(old, new):
    def change(rec):
        rec.dtype.names = [new if n == old else n for n in rec.dtype.names]
        return rec
    return change


def lower(rec):
    rec.dtype.names = [n.lower() for n in rec.dtype.names]
    return rec


def with_value(column, row, value):
    def change(rec):
        rec[column][row] = value
        return rec
    return change


def as_text(h):
    rec = h[FIRST][:]
    types = [(n, h5py.string_dtype() if n == "C2" else rec.dtype[n]) for n in rec.dtype.names]
    new = np.zeros(len(rec), types)
    for n in rec.dtype.names: new[n] = rec[n].astype(str) if n == "C2" else rec[n]
    replace_dataset(h, FIRST, new)


def swapped(h):
    "A slide that is wider than high, with x and y exchanged."
    rec, image = h[FIRST][:], h["images/Train/S_1"][:]
    keep = rec["y"] < 300
    replace_dataset(h, "images/Train/S_1", image[:300])
    rec = rec[keep]
    rec["x"], rec["y"] = rec["y"].copy(), rec["x"].copy()
    replace_dataset(h, FIRST, rec)


def remove(where):
    def change(h): del h[where]
    return change


# what is done to the file -> words of the trouble, words of the mend
BAD = {
    "group": (remove("spots"), "/spots is missing", "rename or add it"),
    "train group": (remove("images/Train"), "/images/Train is missing", "rename or add it"),
    "picture": (remove("images/Train/S_2"), "S_2", "rename or add it|every slide needs a picture and spots"),
    "misspelt": (lambda h: edit(h, renamed("C2", "C_2")), "unknown column 'C_2'", "targets are named C1, C2"),
    "lower case": (lambda h: edit(h, lower), "unknown column 'c1'", "did you mean 'C1'"),
    "no x": (lambda h: edit(h, renamed("x", "col")), "no column 'x'", "columns are x, y, C1"),
    "nan": (lambda h: edit(h, with_value("C3", 4, np.nan)), "C3 of row 4 is nan", "drop these rows or fill them"),
    "negative": (lambda h: edit(h, with_value("C3", 4, -.5)), "C3 of row 4 is -0.5", "cannot be negative"),
    "object": (as_text, "column C2 has type object", "write it as float64"),
    "outside": (lambda h: edit(h, with_value("x", 0, 5000)), "1 of .* spots lie outside", "another resolution"),
    "duplicate": (lambda h: edit(h, lambda r: np.concatenate([r, r[:2]])), r"2 spot\(s\) given twice",
    "keep one of each position"),
    "empty": (lambda h: edit(h, lambda r: r[:0]), "holds no spot", "remove the slide or fill it"),
    "swapped": (swapped, "lie outside the .* picture", "x and y look swapped"),
    "beyond 0-1": (lambda h: replace_dataset(h, "images/Train/S_2", h["images/Train/S_2"][:] * 255), "floats",
    "scale them to 0-1|store it as uint8"),
}


def make_bad(demo_file, folder, kind):
    path = folder/"bad.h5"
    shutil.copyfile(demo_file, path)
    with h5py.File(path, "r+") as h: BAD[kind][0](h)
    return path


def snapshot(run):
    "Hash of every result; what a run writes about itself is not one."
    own = ("params.yaml", "stages.json", ".lock")
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.rglob("*"))
        if p.is_file() and p.name not in own and "failed" not in p.name}


@pytest.fixture(scope="module")
def earlier(finished_run, tmp_path_factory):
    "A finished run of its own, with the hashes of its results."
    run = tmp_path_factory.mktemp("earlier")/"run"
    shutil.copytree(finished_run, run)
    return run, snapshot(run)


def one_line(result):
    "The only line on stderr, of a command that ended with 1."
    assert result.exit_code == 1 and (result.exception is None
        or isinstance(result.exception, SystemExit)), result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("histokit: "), lines
    return lines[0]


def assert_says(text, kind):
    import re
    for words in BAD[kind][1:]: assert re.search(words, text), (words, text)


@pytest.mark.parametrize("kind", BAD)
def test_check_names_trouble_and_mend(kind, demo_file, tmp_path):
    result = cli("check", make_bad(demo_file, tmp_path, kind))
    assert result.exit_code == 1 and isinstance(result.exception, (SystemExit, type(None)))
    errors = [line for line in result.stdout.splitlines() if line.startswith("error")]
    assert errors and any(all(__import__("re").search(w, e) for w in BAD[kind][1:]) for e in errors), errors


@pytest.mark.parametrize("kind", BAD)
def test_run_refuses_and_leaves_earlier_results(kind, demo_file, tmp_path, earlier):
    run, before = earlier
    bad = make_bad(demo_file, tmp_path, kind)
    assert_says(one_line(cli("run", "demo", "-p", f"data_path={bad}", "--run-dir", run)), kind)
    assert snapshot(run) == before


@pytest.mark.parametrize("name,content,words",
    [("gone.h5", None, "does not exist"), ("text.h5", b"no HDF5", "not a readable HDF5"),
    ("folder.h5", "folder", "is a folder"), ("cut.h5", "cut", "cut off")])
def test_files_that_are_no_data_file(name, content, words, demo_file, tmp_path, earlier):
    path, (run, before) = tmp_path/name, earlier
    if content == "folder": path.mkdir()
    elif content == "cut": path.write_bytes(open(demo_file, "rb").read()[:50_000])
    elif content: path.write_bytes(content)
    checked = cli("check", path)
    assert checked.exit_code == 1 and words in checked.stdout and len(checked.stdout.strip().splitlines()) == 1
    assert words in one_line(cli("run", "demo", "-p", f"data_path={path}", "--run-dir", run))
    assert snapshot(run) == before


def test_check_finds_all_of_it(demo_file, tmp_path):
    "One mistake does not hide another, on the same slide or on others."
    path = tmp_path/"many.h5"
    shutil.copyfile(demo_file, path)
    with h5py.File(path, "r+") as h:
        edit(h, lower)
        edit(h, with_value("C1", 3, -1.), "spots/Train/S_2")
        edit(h, with_value("C2", 5, np.inf), "spots/Train/S_2")
        edit(h, with_value("y", 1, -7), "spots/Train/S_2")
        BAD["beyond 0-1"][0](h)
        del h["images/Train/S_3"]
    result = cli("check", path, "--json")
    report = json.loads(result.stdout)
    text = "\n".join(f"{f['where']}: {f['what']}" for f in report["errors"])
    assert result.exit_code == 1 and all(f["mend"] for f in report["errors"])
    for words in ("'c1'", "C1 of row 3 is -1", "C2 of row 5 is inf", "lie outside", "0-255",
        "S_3 is missing"): assert words in text, (words, text)


def test_check_of_a_good_file(demo_file):
    result = cli("check", demo_file, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["errors"] == [] and any("constant" in f["what"] for f in report["notes"])


@pytest.mark.parametrize("place", ["file/below", "/proc/histokit"])
def test_unwritable_folder(place, demo_file, tmp_path):
    (tmp_path/"file").write_text("a file")
    place = place if place.startswith("/") else str(tmp_path/place)
    assert "cannot write" in one_line(cli("run", "demo", "-p", f"data_path={demo_file}", "--run-dir", place))
    assert (tmp_path/"file").read_text() == "a file"


def test_full_disk_keeps_the_earlier_file(tmp_path, monkeypatch):
    "No space left at any moment of writing."
    path = write_json(tmp_path/"a.json", dict(score=1))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def fail(*args): raise full
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(BadInput, match="the disk is full; free some space"): write_json(path, dict(score=2))
    monkeypatch.undo()
    with pytest.raises(BadInput, match="the disk is full"), atomic(path) as tmp:
        tmp.write_text("half")
        raise full
    assert read_json(path) == dict(score=1) and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_results_that_outgrow_the_limit(demo_file, tmp_path):
    "A run whose files may not grow beyond some kilobytes, as on a full disk: one line, and no file half written."
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    args = [*CLI, "run", "demo", "--run-dir", str(tmp_path/"run"),
        *(a for p in [f"data_path={demo_file}", *SMOKE] for a in ("-p", p))]
    done = subprocess.run(args, preexec_fn=limit, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "cannot write" in lines[0] and "outgrows" in lines[0], done.stderr[-1500:]
    assert not (tmp_path/"run"/"spots.parquet").exists() and not list((tmp_path/"run").rglob("*.tmp*"))


def test_killed_while_writing(tmp_path):
    "SIGKILL in the middle of a write leaves the earlier file whole, and the next write goes through."
    path = write_table(tmp_path/"a.csv", pd.DataFrame(dict(a=[1])))
    code = "\n".join([
        "import time",
        "from histokit.core.files import atomic",
        f"with atomic({str(path)!r}) as tmp:",
        "    tmp.write_text('half')",
        "    print('writing', flush=True)",
        "    time.sleep(60)"])
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert pd.read_csv(path).a.tolist() == [1]
    write_table(path, pd.DataFrame(dict(a=[2])))
    assert pd.read_csv(path).a.tolist() == [2]


def test_wrong_parameters(demo_file, tmp_path, earlier):
    run, before = earlier
    for param, words in (("epoch=3", "did you mean 'epochs'"), ("epochs=many", "must be a whole number"),
        ("data_path=nowhere.h5", "does not exist"), ("truth_path=nowhere.csv", "does not exist")):
        assert words in one_line(cli("run", "demo", "-p", f"data_path={demo_file}", "-p", param, "--run-dir", run))
    assert snapshot(run) == before


def test_check_is_quick(demo_file):
    start = time.time()
    cli("check", demo_file)
    assert time.time() - start < 10

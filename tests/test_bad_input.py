"""Bad input through the command line: one line with the trouble and the mend, exit status 1, earlier results kept."""
import errno
import hashlib
import json
import os
import re
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

from histokit.core.files import atomic, file_fingerprint, read_json, write_json, write_table
from histokit.core.hdf5 import open_h5
from histokit.core.pictures import read_picture, write_picture
from histokit.core.text import BadInput
from histokit.cli import app
from histokit.spots.cache import SlideCache
from histokit.spots.check_file import read_views
from histokit.spots.mistakes import replace_dataset
from histokit.spots.own_slides import import_visium
from histokit.spots.slides import DataFactory
from histokit.spots.stain_files import normalise_file, stain_image_file

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
    "nan": (lambda h: edit(h, with_value("C3", 4, np.nan)), "C3 of row 4 is nan", "leave these spots out of training"),
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
        "slide S_3 is in spots/Train only"): assert words in text, (words, text)


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


# files that people bring: locked, forbidden, unfinished, linked, and attributes as other programs write them

GRID = np.stack(np.meshgrid(np.arange(6.), np.arange(7.)), -1).reshape(-1, 2) * 12 + 10


def toy_slide(h, place, seed=0):
    "A slide small enough to be made for every test."
    rng = np.random.default_rng(seed)
    names = ["x", "y", *(("C1", "C2") if "Train" in place else ("Test_Set",))]
    spots = np.zeros(len(GRID), [(n, "f8") for n in names])
    spots["x"], spots["y"] = GRID.T
    for n in names[2:]: spots[n] = rng.random(len(GRID)) + .1
    h[f"images/{place}"] = rng.integers(100, 255, (100, 90, 3), dtype=np.uint8)
    h[f"spots/{place}"] = spots


@pytest.fixture
def toy(tmp_path):
    "Two training slides and one of test."
    with h5py.File(tmp_path/"toy.h5", "w") as h:
        for seed, place in enumerate(("Train/S_1", "Train/S_2", "Test/S_3")): toy_slide(h, place, seed)
    return tmp_path/"toy.h5"


def said(f, *args):
    "The line of the error."
    with pytest.raises(BadInput) as e: f(*args)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


def openers(path, tmp_path):
    "Every way into a data file, each as a function."
    return [lambda: open_h5(path), lambda: DataFactory(path), lambda: SlideCache(path),
        lambda: normalise_file(path, tmp_path/"out"/"out.h5", "none")]


WRONG_FILES = {"pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "packed with gzip.*unpack"),
    "zip": (b"PK\x03\x04" + bytes(40), "a ZIP archive"),
    "login": (b"<html><head>", "a web page"), "empty": (b"", "it is empty"), "zeros": (bytes(9000), "zeros only"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG picture"), "text": (b"a,b\n", "it is text"),
    "torn": (b"\x89HDF\r\n\x1a\n" + bytes(90), "begins as an HDF5 file and is damaged")}

@pytest.mark.parametrize("kind", WRONG_FILES)
def test_what_is_no_data_file_is_named(tmp_path, kind):
    data, words = WRONG_FILES[kind]
    (tmp_path/"a.h5").write_bytes(data)
    for f in openers(tmp_path/"a.h5", tmp_path): assert re.search(words, said(f))
    found = [f for f in read_views(tmp_path/"a.h5")[0] if f.level == "error"]
    assert len(found) == 1 and re.search(words, str(found[0]))


def test_a_locked_file_is_called_locked(toy, tmp_path):
    import fcntl
    with open(toy, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        lines = [said(f) for f in openers(toy, tmp_path)] + [str(read_views(toy)[0][0])]
        (tmp_path/"gather.h5").unlink(missing_ok=True)
        with h5py.File(tmp_path/"gather.h5", "w") as h:
            for top in ("images", "spots"): h[top] = h5py.ExternalLink("toy.h5", f"/{top}")
        lines.append(said(DataFactory, tmp_path/"gather.h5"))
        lines.append(said(lambda: import_visium(tmp_path/"nowhere", None, toy, split="Test", append=True)))
    for line in lines[:-1]: assert "is locked: another process has it open" in line and "damaged" not in line
    assert DataFactory(toy).names() == ["S_1", "S_2", "S_3"]


def test_a_file_that_a_killed_program_left_open(tmp_path):
    with h5py.File(tmp_path/"a.h5", "w", libver="latest") as h:
        h["x"] = [1]
        h.swmr_mode = True
        shutil.copyfile(tmp_path/"a.h5", tmp_path/"left.h5")
    assert "open for writing in another program, or was when that was killed" in said(open_h5, tmp_path/"left.h5")


@pytest.mark.parametrize("number,words", [(errno.EACCES, "no permission"), (errno.EIO, "disk or network drive"),
    (errno.ESTALE, "network drive was lost"), (errno.ENOLCK, "HDF5_USE_FILE_LOCKING"), (errno.EMFILE, "ulimit -n")])
def test_the_reason_of_the_system_reaches_the_reader(toy, tmp_path, monkeypatch, number, words):
    picture = tmp_path/"a.png"
    write_picture(picture, np.zeros((9, 9, 3), np.uint8))
    def fail(*args, **kwargs): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(h5py, "File", fail)
    assert words in said(open_h5, toy)
    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("io.open", fail)
    assert words in said(read_picture, picture)
    assert words in said(file_fingerprint, toy)
    assert words in said(read_json, tmp_path/"a.json")


def test_what_fails_while_a_file_is_written_is_named(tmp_path):
    def writing(error):
        with atomic(tmp_path/"a.txt"): raise error
    source = FileNotFoundError(errno.ENOENT, "No such file or directory", "source.tif")
    assert "source.tif" in said(writing, source) and "cannot write" not in said(writing, source)
    assert "image file is truncated" in said(writing, OSError("image file is truncated"))
    assert "cannot write" in said(writing, OSError(errno.ENOSPC, "No space left on device"))
    assert "disk is full" in said(writing, OSError("unable to write, errno = 28, error message = 'No space left'"))
    assert not list(tmp_path.iterdir())


def break_link(h, link):
    del h["images/Train/S_2"]
    h["images/Train/S_2"] = link


def virtual(h, source, dataset="p"):
    layout = h5py.VirtualLayout((100, 90, 3), np.uint8)
    layout[:] = h5py.VirtualSource(source, dataset, (100, 90, 3))
    del h["images/Train/S_2"]
    h.create_virtual_dataset("images/Train/S_2", layout)


def raw_file(h, name):
    del h["images/Train/S_2"]
    h.create_dataset("images/Train/S_2", (100, 90, 3), np.uint8, external=[(name, 0, 27_000)])


BROKEN = {
    "soft": (lambda h: break_link(h, h5py.SoftLink("/images/Old/S_2")), "link to /images/Old/S_2, which is not there"),
    "round": (lambda h: break_link(h, h5py.SoftLink("/images/Train/S_2")), "leads back to itself"),
    "lost file": (lambda h: break_link(h, h5py.ExternalLink("lost.h5", "/p")), "to lost.h5:/p, which is not there"),
    "lost item": (lambda h: break_link(h, h5py.ExternalLink("part.h5", "/q")), "to part.h5:/q, which is not there"),
    "no HDF5": (lambda h: break_link(h, h5py.ExternalLink("text.h5", "/p")), "text.h5 is not a readable HDF5 file"),
    "group": (lambda h: break_link(h, h["spots"]), "images/Train/S_2 is not a dataset"),
    "virtual": (lambda h: virtual(h, "lost.h5"), "gathers values from lost.h5, which is not there"),
    "virtual item": (lambda h: virtual(h, "part.h5", "q"), "gathers values from part.h5:q, which is not there"),
    "raw": (lambda h: raw_file(h, "lost.bin"), "values in lost.bin, which is not there"),
    "short raw": (lambda h: raw_file(h, "short.bin"), "values in short.bin, which is too short"),
}

@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_slide_leads_to_is_missed_by_name(toy, tmp_path, kind):
    with h5py.File(tmp_path/"part.h5", "w") as h: h["p"] = np.zeros((100, 90, 3), np.uint8)
    (tmp_path/"text.h5").write_text("no HDF5")
    (tmp_path/"short.bin").write_bytes(bytes(100))
    with h5py.File(toy, "r+") as h: BROKEN[kind][0](h)
    for f in openers(toy, tmp_path)[1:]: assert BROKEN[kind][1] in said(f)
    assert sum(BROKEN[kind][1] in str(f) for f in read_views(toy)[0] if f.level == "error") == 1
    assert not (tmp_path/"out"/"out.h5").exists()


def test_a_filter_that_is_missing_is_named(toy, monkeypatch):
    with h5py.File(toy, "r+") as h:
        picture = h["images/Train/S_1"][:]
        del h["images/Train/S_1"]
        h.create_dataset("images/Train/S_1", data=picture, compression="lzf")
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    line = said(DataFactory, toy)
    assert "images/Train/S_1 is packed by the HDF5 filter 32000 (lzf)" in line and "damaged" not in line


@pytest.mark.parametrize("depth", ["slides", "parts", "tops"])
@pytest.mark.parametrize("link", ["external", "soft", "hard", "virtual"])
def test_gathered_slides_are_the_same_for_all_that_read_them(toy, tmp_path, depth, link):
    with h5py.File(toy, "r+") as whole, h5py.File(tmp_path/"gather.h5", "w") as h:
        if link in ("soft", "hard"):
            for top in ("images", "spots"): whole.copy(top, h, f"kept/{top}")
        groups = [f"{top}/{part}" for top in ("images", "spots") for part in whole[top]]
        places = [f"{group}/{name}" for group in groups for name in whole[group]]
        ends = {"/".join(p.split("/")[:dict(slides=3, parts=2, tops=1)[depth]]) for p in places}
        for end in sorted(ends):
            if link == "external" or link == "virtual": h[end] = h5py.ExternalLink("toy.h5", f"/{end}")
            elif link == "soft": h[end] = h5py.SoftLink(f"/kept/{end}")
            else: h[end] = h[f"kept/{end}"]
        if link == "virtual" and depth == "slides":
            del h["images/Train/S_1"]
            layout = h5py.VirtualLayout((100, 90, 3), np.uint8)
            layout[:] = h5py.VirtualSource("toy.h5", "images/Train/S_1", (100, 90, 3))
            h.create_virtual_dataset("images/Train/S_1", layout)
    out = tmp_path/"elsewhere"/"out.h5"                          # relative links would lead nowhere from there
    assert list(normalise_file(tmp_path/"gather.h5", out, "none")) == ["S_1", "S_2", "S_3"]
    a, b = DataFactory(toy), DataFactory(out)
    assert a.names() == DataFactory(tmp_path/"gather.h5").names() == b.names()
    pd.testing.assert_frame_equal(a.spots, b.spots)
    for name in a.names(): assert np.array_equal(a.read_slide(name), b.read_slide(name))
    assert not [f for f in read_views(tmp_path/"gather.h5")[0] if "missing" in str(f) or "is not there" in str(f)]
    with h5py.File(out) as h: assert not isinstance(h["spots/Train"].get("S_1", getlink=True), h5py.ExternalLink)


def test_what_is_not_read_is_said_and_kept(toy, tmp_path):
    with h5py.File(toy, "r+") as h:
        toy_slide(h, "Valid/S_9")
        h["images"].attrs["note"], h["images/Valid"].attrs["note"] = "a", "b"
        h["barcodes/Train/S_1"], h["extra/lost"] = np.arange(3), h5py.SoftLink("/gone")
    words = "images/Valid: this is not read, only Train and Test are"
    assert words in DataFactory(toy).notes
    assert any(words in str(f) and f.level == "warning" for f in read_views(toy)[0])
    normalise_file(toy, tmp_path/"out.h5", "none")
    with h5py.File(tmp_path/"out.h5") as h:
        assert {"S_9"} == set(h["images/Valid"]) and h["images"].attrs["note"] + h["images/Valid"].attrs["note"] == "ab"
        assert h["barcodes/Train/S_1"][:].tolist() == [0, 1, 2] and "lost" in h["extra"]


ONE_PATIENT = {"bytes": np.bytes_("P1"), "padded": np.array(b"P1\0\0", "S6"), "blanks": " P1 ",
    "array": np.array([b"P1"]),
    "matrix": np.array([["P1"]], object), "twice": np.array([b"P1", b"P1"]), "tab": "P1\t"}

@pytest.mark.parametrize("kind", ONE_PATIENT)
def test_one_patient_is_never_two(toy, kind):
    with h5py.File(toy, "r+") as h:
        for name, value in (("S_1", "P1"), ("S_2", ONE_PATIENT[kind])):
            h[f"images/Train/{name}"].attrs["patient"] = value
    factory = DataFactory(toy)
    assert factory.slides["S_1"].patient == factory.slides["S_2"].patient == "P1" and not factory.notes


@pytest.mark.parametrize("a,b", [(7, "7"), (7., np.int16(7)), (np.array([[7.]]), b"7"), ("Zo\u00eb", "Zoe\u0308")])
def test_numbers_and_accents_of_one_patient(toy, a, b):
    with h5py.File(toy, "r+") as h:
        h["images/Train/S_1"].attrs["patient"], h["spots/Train/S_2"].attrs["patient"] = a, b
    factory = DataFactory(toy)
    assert factory.slides["S_1"].patient == factory.slides["S_2"].patient and not factory.notes


def test_an_enumeration_gives_its_name_and_a_reference_gives_none(toy):
    with h5py.File(toy, "r+") as h:
        kind = h5py.enum_dtype({"P1": 0, "P2": 1})
        h["images/Train/S_1"].attrs.create("patient", 1, dtype=kind)
        h["images/Train/S_2"].attrs["patient"] = h["spots"].ref
    factory = DataFactory(toy)
    assert [s.patient for s in factory.slides.values()] == ["P2", "S_2", "S_3"] and len(factory.notes) == 1


@pytest.mark.parametrize("value", ["", "unknown", "N/A", np.nan, h5py.Empty("f"), np.array([b"P1", b"P2"]), b" "])
def test_a_patient_that_is_none_is_said(toy, value):
    with h5py.File(toy, "r+") as h:
        for name in ("S_1", "S_2"): h[f"images/Train/{name}"].attrs["patient"] = value
    factory = DataFactory(toy)
    assert [s.patient for s in factory.slides.values()] == ["S_1", "S_2", "S_3"] and len(factory.notes) == 2
    assert sum("attribute patient is" in str(f) for f in read_views(toy)[0] if f.level == "warning") == 2


def test_patients_that_are_spelt_alike_and_names_that_are_nearly_right(toy):
    with h5py.File(toy, "r+") as h:
        h["images/Train/S_1"].attrs["patient"], h["images/Train/S_2"].attrs["patient"] = "P1", "p 1"
        h["images/Test/S_3"].attrs["Patient"] = "P1"
    notes = " ".join(DataFactory(toy).notes)
    assert "'P1' and 'p 1' are taken for different ones" in notes and "'Patient' was ignored; rename it" in notes


SCALES = {"array": (np.array([6.]), 6), "matrix": (np.array([[6.]]), 6), "two": (np.array([6., 6.]), 6),
    "text": ("6.0", 6),
    "bytes": (np.bytes_("6.0 "), 6), "comma": ("6,0", 6), "unit": ("6 µm/px", 6), "whole": (np.int32(6), 6),
    "word": ("unknown", None), "nothing": ("", None), "zero": (0., None), "negative": (-6., None),
    "nan": (np.nan, None),
    "infinite": (np.inf, None), "unequal": (np.array([6., 3.]), None), "empty": (h5py.Empty("f"), None),
    "none": (np.array([]), None), "truth": (True, None), "fields": (np.array((1, 2.), "i4,f8"), None)}

@pytest.mark.parametrize("kind", SCALES)
def test_the_scale_as_other_programs_write_it(toy, kind):
    value, expected = SCALES[kind]
    with h5py.File(toy, "r+") as h:
        h["images/Train/S_1"].attrs["um_per_px"] = value
    factory = DataFactory(toy)
    info = factory.slides["S_1"]
    assert info.um_source == ("attribute" if expected else "lattice") and np.isfinite(info.um_per_px)
    if expected: assert info.um_per_px == expected
    assert len(factory.notes) == (not expected or kind == "comma"), factory.notes
    found = [f for f in read_views(toy)[0] if "um_per_px" in str(f) and "attribute" in str(f)]
    assert len(found) == len(factory.notes) and all(f.level == "warning" for f in found)


@pytest.mark.parametrize("value,names", [(np.array([b"T ", b"B"]), ["T", "B"]), (["T", "B"], ["T", "B"]), ("T,B", None),
    (["T"], None), (["T", "T"], None), (["T", ""], None), (h5py.Empty("S1"), None), (np.array([1, 2]), ["1", "2"])])
def test_the_names_of_the_types_as_other_programs_write_them(toy, value, names):
    with h5py.File(toy, "r+") as h: h.attrs["cell_types"] = value
    factory = DataFactory(toy)
    assert factory.cell_types == (names or ["C1", "C2"]) and len(factory.notes) == (names is None)


DARK = {"12 bits": (lambda p: p.astype(np.uint16) * 16, "a picture of 12 bits"),
    "0-255": (lambda p: p.astype(np.float32), "divide by 255"), "0 and 1": (lambda p: p // 250, "holds only 0 and 1"),
    "nan": (lambda p: np.where(p > 250, np.nan, p / 255), "not finite")}

@pytest.mark.parametrize("kind", DARK)
def test_the_range_of_a_slide_is_guarded_wherever_it_is_read(toy, tmp_path, kind):
    change, words = DARK[kind]
    with h5py.File(toy, "r+") as h: replace_dataset(h, "images/Train/S_2", change(h["images/Train/S_2"][:]))
    reads = [lambda: DataFactory(toy).read_slide("S_2"), lambda: SlideCache(toy)["S_2"],
        lambda: normalise_file(toy, tmp_path/"out.h5", "none")]
    for f in reads: assert words in said(f)
    assert any(words in str(f) for f in read_views(toy)[0] if f.level == "error")


def test_a_copy_keeps_the_kind_of_every_attribute(toy, tmp_path):
    with h5py.File(toy, "r+") as h:
        h["images/Train/S_1"].attrs.create("patient", 1, dtype=h5py.enum_dtype({"P1": 0, "P2": 1}))
        h["images/Train/S_2"].attrs["patient"], h["images/Train/S_2"].attrs["seen"] = np.bytes_("P2"), h5py.Empty("f")
    normalise_file(toy, tmp_path/"out.h5", "none")
    factory = DataFactory(tmp_path/"out.h5")
    assert factory.slides["S_1"].patient == factory.slides["S_2"].patient == "P2" and not factory.notes


def test_pictures_of_a_folder_that_are_left_are_named(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("in/a.png", "in/B.TIF", "ref.png"):
        write_picture(tmp_path/name, rng.integers(0, 255, (40, 40, 3), np.uint8))
    for name in ("c.WEBP", "d.czi", "notes.txt"): (tmp_path/"in"/name).write_bytes(b"")
    reports = stain_image_file(tmp_path/"in", tmp_path/"ref.png", tmp_path/"in"/"out", method="reinhard")
    written = {n: r["written"] for n, r in reports.items()}
    assert written == {"B.TIF": True, "a.png": True, "c.WEBP": False, "d.czi": False}
    assert "of a folder only .png, .jpg" in reports["d.czi"]["reason"]

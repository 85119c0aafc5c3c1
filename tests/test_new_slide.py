"""Slides that no run has seen: read from any scanner, predicted window by window, one or many, and what is refused."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from typer.testing import CliRunner

import scanner_files
from histokit.core.files import write_json
from histokit.core.pictures import open_picture, picture_size, write_picture
from histokit.core.pixels import as_picture
from histokit.core.runs import RunFolder
from histokit.core.text import BadInput
from histokit.core.windows import at_factor
from histokit.spots import many_slides, new_slide
from histokit.spots.cache import SlideCache
from histokit.spots.many_slides import SlideJobs, Workers, list_slides, predict_slide, predict_slides, run_key
from histokit.spots.new_slide import NewSlide, NewSlideSettings, OpenedSlide, find_tissue, open_new_slide, place_spots
from histokit.spots.new_slide import spot_patches, trained_view
from histokit.spots.patches import HESpotDataset, PatchSampler, patch_size
from histokit.spots.predictor import Predictor, predict_run

RNG = np.random.default_rng(0)
QUIET = dict(say=lambda line: None)
FEW = NewSlideSettings(chunk=64, device="cpu")


def smooth_picture(height=1024, width=1280):
    "Colours that change slowly, which JPEG keeps."
    y, x = np.mgrid[:height, :width]
    waves = np.sin(x / 90), np.cos(y / 70), np.sin((x + y) / 130)
    return np.stack([128 + 90 * w for w in waves], -1).astype(np.uint8)


def train(folder, data, **settings):
    "A ridge on a small network."
    from histokit.spots.answers import run_prediction
    from histokit.spots.crossval import run_training
    from histokit.spots.settings import PredictionSettings, TrainingSettings
    run = RunFolder(folder).make()
    asked = dict(method="ridge", input_px=32, target="rank", compare_random=False, device="cpu", views="none")
    network = dict(backbone="test_resnet.r160_in1k", weights="none", head="linear")
    network["backbone"] = settings.pop("backbone", network["backbone"])
    run_training(run, data, TrainingSettings(**asked | settings), network, **QUIET)
    run_prediction(run, data, PredictionSettings(device="cpu"))
    run.write_json("run.json", dict(parameters=dict(data_path=str(data))))
    return run.path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_file):
    "A run folder, not to be changed."
    return train(tmp_path_factory.mktemp("trained")/"run", demo_file)


@pytest.fixture(scope="module")
def predictor(trained):
    return Predictor.load(trained, device="cpu")


@pytest.fixture(scope="module")
def pixels(demo_file):
    "The test slide of the demo."
    return np.array(SlideCache(demo_file)["S_4"])


@pytest.fixture(scope="module")
def um(demo_file):
    with open_new_slide(NewSlide(f"{demo_file}:S_4")) as slide: return slide.um_per_px


@pytest.fixture
def mine(tmp_path, pixels, um):
    "The slide as a picture that the run does not know."
    path = tmp_path/"slides"/"mine.tif"
    path.parent.mkdir()
    write_picture(path, as_picture(pixels, um_per_px=(um, um)), tile=64)
    return path


def jobs_of(trained, out, settings=FEW, maps=1):
    return SlideJobs(str(trained), str(out), settings, maps, run_key(trained))


def results(folder):
    "The bytes of everything that a slide leaves; how long it took is not the same twice."
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if p.name not in ("seconds.json", ".lock")}


# --- files of every kind ----------------------------------------------------------------------

@pytest.mark.parametrize("kind", scanner_files.WRITERS)
def test_scanners_formats_are_pictures_with_smaller_copies(tmp_path, kind):
    pytest.importorskip("openslide")
    pixels = smooth_picture()
    path = scanner_files.WRITERS[kind](tmp_path/f"scan.{kind}", pixels)
    at = 2 if kind == "scn" else 0                   # this slide begins 1 µm into the collection, the rest is white
    with open_picture(path) as picture:
        assert picture.um_per_px == pytest.approx((scanner_files.UM,) * 2, rel=1e-3)
        assert picture_size(path) == picture.shape[1::-1]
        window = picture[200 + at:330 + at, 300 + at:500 + at].astype(int)
        assert np.abs(window - pixels[200:330, 300:500]).max() < 12
        if kind == "scn": assert picture[0:2, 0:300].min() == 255 and picture.shape == (2048, 2560, 3)
        for copy in picture.smaller():
            factor = round(picture.shape[0] / copy.shape[0])
            assert copy.shape[1] * factor == picture.shape[1]
            if factor == 2 and kind != "scn":
                seen = copy[100:160, 150:250].astype(int)
                assert np.abs(seen - pixels[200:320:2, 300:500:2]).max() < 12
        assert len(picture.smaller()) == dict(svs=1, ndpi=4, scn=1, mrxs=0)[kind]
    with open_new_slide(NewSlide(str(path))) as slide: assert slide.um_per_px == pytest.approx(.5, rel=1e-3)


def test_without_openslide_its_formats_are_refused_with_the_mend(tmp_path, monkeypatch):
    from histokit.core import wsi
    (tmp_path/"a.mrxs").write_bytes(b"\xff\xd8\xff" + bytes(99))
    monkeypatch.setattr(wsi, "_openslide", lambda: None)
    with pytest.raises(BadInput, match="pip install openslide-python openslide-bin"): open_picture(tmp_path/"a.mrxs")
    scanner_files.write_svs(tmp_path/"b.svs", smooth_picture(300, 400))
    with open_picture(tmp_path/"b.svs") as picture: assert picture.shape == (300, 400, 3)      # TIFF needs none


@pytest.mark.parametrize("how", ["tiles", "strips", "ome", "jpeg pyramid", "16 bits", "grey"])
def test_every_tiff_becomes_the_same_slide(tmp_path, how):
    pixels, path = smooth_picture(600, 700), tmp_path/"a.tif"
    per_cm = dict(resolution=(20000, 20000), resolutionunit="CENTIMETER", photometric="rgb")
    expected = pixels
    if how == "tiles": tifffile.imwrite(path, pixels, tile=(128, 128), compression="zlib", **per_cm)
    if how == "strips": tifffile.imwrite(path, pixels, rowsperstrip=16, compression="lzw", **per_cm)
    if how == "16 bits": tifffile.imwrite(path, pixels.astype(np.uint16) * 257, tile=(128, 128), **per_cm)
    if how == "grey":
        tifffile.imwrite(path, pixels[..., 0], tile=(128, 128), **per_cm | dict(photometric="minisblack"))
        expected = pixels[..., :1].repeat(3, -1)
    if how == "ome":
        path = tmp_path/"a.ome.tif"
        about = dict(axes="YXS", PhysicalSizeX=.5, PhysicalSizeY=.5)
        tifffile.imwrite(path, pixels, tile=(128, 128), metadata=about, photometric="rgb")
    if how == "jpeg pyramid":
        write_picture(path, as_picture(pixels, um_per_px=(.5, .5), pyramid=True, compression="jpeg"), tile=128)
    with open_new_slide(NewSlide(str(path))) as slide:
        assert slide.um_per_px == pytest.approx(.5)
        assert np.abs(slide.picture[90:200, 30:350].astype(int) - expected[90:200, 30:350]).max() <= (9 if "jpeg" in how
            else 0)
        assert len(slide.picture.smaller()) == (3 if "pyramid" in how else 0)
        small, factor = at_factor(slide.picture, 4)
        mean = expected[:600, :700].reshape(150, 4, 175, 4, 3).mean((1, 3))
        assert factor == 4 and np.abs(small[:, :] - mean).max() < (9 if "jpeg" in how else .51)


def test_a_turned_scan_is_turned_in_its_copies(tmp_path):
    pixels = smooth_picture(300, 500)
    with tifffile.TiffWriter(tmp_path/"a.tif") as file:
        for level, more in ((pixels, dict(subifds=1)), (pixels[::2, ::2], dict(subfiletype=1))):
            file.write(level, tile=(128, 128), photometric="rgb", metadata=None,
                extratags=[(274, "H", 1, 6, True)], **more)
    with open_picture(tmp_path/"a.tif") as picture:
        assert np.array_equal(picture[:, :], np.rot90(pixels, -1))
        copy, = picture.smaller()
        assert np.array_equal(copy[:, :], np.rot90(pixels[::2, ::2], -1))


def test_windows_of_a_reduced_pyramid_do_not_depend_on_the_cut():
    pixels = RNG.integers(0, 256, (511, 640, 3), np.uint8)
    for factor in (1.7, 2, 3.33, 7.9):
        small, _ = at_factor(as_picture(pixels), factor)
        whole = small[:, :]
        for _ in range(20):
            ys, xs = (slice(*np.sort(RNG.integers(0, n + 1, 2))) for n in whole.shape[:2])
            assert np.array_equal(small[ys, xs], whole[ys, xs])


# --- the same as in the pipeline --------------------------------------------------------------

@pytest.mark.parametrize("resident", [True, False])
def test_patches_at_the_trained_scale_are_those_of_the_pipeline(mine, pixels, predictor, um, resident):
    with open_new_slide(NewSlide(str(mine))) as slide:
        view = trained_view(slide, predictor, 64)
        if not resident: view.windows.max_bytes = 1
        spots = place_spots(slide, find_tissue(slide), predictor).spots
        patches = spot_patches(view, spots, predictor)(slice(0, None))
        assert patches.sampler.resident == resident and view.factor == 1
        sides = tuple(patch_size(size, um) for size in predictor.sizes_um)
        whole = HESpotDataset(spots, PatchSampler({slide.name: pixels}, sides, predictor.input_px))
        rows = np.arange(len(spots))
        assert np.array_equal(patches.images(rows), whole.images(rows))


def test_own_spots_of_a_picture_alone_have_the_submitted_values(trained, mine, tmp_path, demo_file):
    with open_new_slide(NewSlide(f"{demo_file}:S_4")) as slide: slide.table.to_csv(tmp_path/"spots.csv", index=False)
    asked = [NewSlide(str(mine), spots=str(tmp_path/"spots.csv")), NewSlide(f"{demo_file}:S_4", spots="file")]
    table = predict_slides(trained, asked, tmp_path/"out", FEW, maps=1, **QUIET)
    assert table.status.tolist() == ["predicted"] * 2
    submitted = predict_run(trained, device="cpu").iloc[:, 1:].to_numpy()
    for slide in asked:
        values = pd.read_parquet(tmp_path/"out"/slide.name/"spots.parquet").iloc[:, 5:].to_numpy()
        assert np.abs(values / submitted - 1).max() < 1e-4


def test_a_raw_slide_is_repainted_as_the_pipeline_did(finished_run, demo_file, tmp_path):
    "Stain, registration and scale of a whole run: the raw picture gives what was submitted."
    known = {s["name"]: s for s in RunFolder(finished_run).json("data.json")["slides"]}
    spots = RunFolder(finished_run).table("spots.parquet")
    spots[spots.slide.eq("S_4")][["x", "y"]].to_csv(tmp_path/"spots.csv", index=False)
    asked = NewSlide(f"{demo_file}:S_4", um_per_px=known["S_4"]["um_per_px"], spots=str(tmp_path/"spots.csv"))
    table = predict_slides(finished_run, [asked], tmp_path/"out", FEW, maps=1, **QUIET)
    assert table.why.tolist() == [""]
    values = pd.read_parquet(tmp_path/"out"/asked.name/"spots.parquet").iloc[:, 5:].to_numpy()
    submitted = RunFolder(finished_run).table("submission.csv").sort_values("ID").iloc[:, 1:].to_numpy()
    assert np.abs(values / submitted - 1).max() < 1e-4
    assert "given the look of the training slides" in (tmp_path/"out"/asked.name/"report.html").read_text()


def test_the_chunk_changes_no_number(trained, mine, tmp_path):
    found = []
    for chunk in (40, 512):
        predict_slides(trained, [NewSlide(str(mine))], tmp_path/str(chunk), NewSlideSettings(chunk=chunk), maps=1)
        found.append(pd.read_parquet(tmp_path/str(chunk)/"mine"/"spots.parquet").iloc[:, 5:].to_numpy())
    assert np.abs(found[0] / found[1] - 1).max() < 1e-6


# --- stopped and started again ----------------------------------------------------------------

class Stop(BaseException): pass


def stops_at_the_second_part(monkeypatch):
    "Encoding is stopped once, at the second part; the sizes of the parts that were begun."
    encode, calls = Predictor.encode, []
    def stopping(self, dataset):
        calls.append(len(dataset))
        if len(calls) == 2: raise Stop
        return encode(self, dataset)
    monkeypatch.setattr(Predictor, "encode", stopping)
    return calls


def test_a_slide_that_was_stopped_goes_on_and_gives_the_same_bytes(trained, mine, tmp_path, monkeypatch):
    asked = NewSlide(str(mine))
    predict_slides(trained, [asked], tmp_path/"whole", FEW, maps=1)
    calls = stops_at_the_second_part(monkeypatch)
    with pytest.raises(Stop): predict_slides(trained, [asked], tmp_path/"out", FEW, maps=1)
    kept = sorted((tmp_path/"out"/"mine"/"parts").glob("part_*.npy"))
    assert len(kept) == 1 and not (tmp_path/"out"/"mine"/"slide.json").exists()
    predict_slides(trained, [asked], tmp_path/"out", FEW, maps=1)
    n = len(pd.read_parquet(tmp_path/"out"/"mine"/"spots.parquet"))
    assert sum(calls) == n + 64 and calls[:2] == [64, 64]                # only the part it was at is done again
    assert results(tmp_path/"out") == results(tmp_path/"whole")
    assert not (tmp_path/"out"/"mine"/"parts").exists()


@pytest.mark.parametrize("changed", ["views", "picture"])
def test_parts_of_something_else_are_not_gone_on_with(trained, mine, tmp_path, monkeypatch, changed):
    asked = NewSlide(str(mine))
    stops_at_the_second_part(monkeypatch)
    with pytest.raises(Stop): predict_slides(trained, [asked], tmp_path/"out", FEW, maps=1)
    settings = replace(FEW, views="dihedral") if changed == "views" else FEW
    if changed == "picture":
        with open_picture(mine) as slide: pixels, um = slide[:, :], slide.um_per_px
        write_picture(mine, as_picture(pixels ^ 2, um_per_px=um))      # the same tissue, other bytes
    predict_slides(trained, [asked], tmp_path/"out", settings, maps=1)
    predict_slides(trained, [asked], tmp_path/"whole", settings, maps=1)
    assert results(tmp_path/"out") == results(tmp_path/"whole")


def test_what_changed_is_done_again_and_nothing_else(trained, mine, tmp_path, monkeypatch):
    asked, calls, encode = NewSlide(str(mine)), [], Predictor.encode
    monkeypatch.setattr(Predictor, "encode", lambda self, data: calls.append(1) or encode(self, data))
    settings = dict(device="cpu")
    def predict(**more):
        calls.clear()
        predict_slides(trained, [asked], tmp_path/"out", NewSlideSettings(**settings | more), maps=1)
        return bool(calls)
    assert predict(spacing_um=200.) and predict() and not predict()
    (tmp_path/"out"/"mine"/"spots.h5ad").unlink()
    assert predict()
    write_picture(mine, as_picture(np.roll(open_picture(mine)[:, :], 9, 1), um_per_px=open_picture(mine).um_per_px))
    assert predict()


def test_a_full_disk_says_so_and_keeps_what_was_encoded(trained, mine, tmp_path, monkeypatch):
    save, calls = np.save, []
    def full(file, value):
        calls.append(1)
        if len(calls) > 1: raise OSError(28, "No space left on device")
        return save(file, value)
    monkeypatch.setattr(new_slide.np, "save", full)
    row = predict_slide(jobs_of(trained, tmp_path/"out"), NewSlide(str(mine)))
    assert row["status"] == "failed" and "the disk is full; free some space" in row["why"]
    parts = sorted((tmp_path/"out"/"mine"/"parts").iterdir())
    assert [p.name for p in parts] == ["part_0000000.npy", "plan.json"]
    monkeypatch.undo()
    assert predict_slide(jobs_of(trained, tmp_path/"out"), NewSlide(str(mine)))["status"] == "predicted"


def test_a_disk_that_fills_while_results_are_written_loses_no_part(trained, mine, tmp_path, monkeypatch):
    def full(*args, **how): raise OSError(28, "No space left on device")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    row = predict_slide(jobs_of(trained, tmp_path/"out"), NewSlide(str(mine)))
    assert "the disk is full" in row["why"] and list((tmp_path/"out"/"mine"/"parts").glob("part_*.npy"))


# --- what is refused --------------------------------------------------------------------------

def typed(*words):
    from histokit import cli_predict  # noqa: F401 (registers the command)
    from histokit.cli import app
    return CliRunner().invoke(app, ["predict", *map(str, words)])


def refused(*words):
    "What the command says last on standard error, having ended with 1."
    done = typed(*words)
    assert done.exit_code == 1 and "Traceback" not in done.output, done.output
    return done.stderr.strip().splitlines()


def test_a_slide_without_resolution(trained, tmp_path, pixels):
    write_picture(tmp_path/"a.png", pixels)
    said = refused(trained, tmp_path/"a.png", "-o", tmp_path/"out")
    assert "does not say how many µm its pixels are wide; give um_per_px (--um-per-px)" in said[0]
    tifffile.imwrite(tmp_path/"b.tif", pixels, resolution=(72, 72), resolutionunit="INCH", photometric="rgb")
    assert "a pixel of 352.8 µm is none of a slide" in refused(trained, tmp_path/"b.tif", "-o", tmp_path/"out")[0]
    assert "353" in refused(trained, tmp_path/"a.png", "--um-per-px", 353, "-o", tmp_path/"out")[0]


def test_pixels_that_are_not_square(trained, tmp_path, pixels):
    tifffile.imwrite(tmp_path/"b.tif", pixels, resolution=(2000, 4000), resolutionunit="CENTIMETER", photometric="rgb")
    assert "which are not square" in refused(trained, tmp_path/"b.tif", "-o", tmp_path/"out")[0]


def test_a_slide_without_tissue(trained, tmp_path):
    write_picture(tmp_path/"blank.png", np.full((400, 300, 3), 243, np.uint8))
    said = refused(trained, tmp_path/"blank.png", "--um-per-px", 4, "-o", tmp_path/"out")
    assert said[0].startswith("blank: blank shows no tissue: 100% of it is glass") and len(said) == 2
    pd.DataFrame(dict(x=[150, 160], y=[200, 210])).to_csv(tmp_path/"at.csv", index=False)
    asked = NewSlide(str(tmp_path/"blank.png"), um_per_px=4., spots=str(tmp_path/"at.csv"))
    assert "no tissue" in predict_slide(jobs_of(trained, tmp_path/"out"), asked)["why"]


@pytest.mark.parametrize("kind", ["tif", "png", "jpg", "svs", "ndpi", "scn", "mrxs", "h5"])
def test_a_slide_that_is_cut_off(trained, tmp_path, kind, pixels):
    path = tmp_path/f"scan.{kind}"
    if kind in scanner_files.WRITERS: scanner_files.WRITERS[kind](path, np.tile(pixels, (3, 3, 1))[:1024, :1280])
    elif kind == "h5":
        with h5py.File(path, "w") as h5: h5["images/Train/S_1"] = pixels
    else: write_picture(path, pixels, tile=64) if kind == "tif" else write_picture(path, pixels)
    file = path.with_suffix("")/"Data0000.dat" if kind == "mrxs" else path
    os.truncate(file, file.stat().st_size * 2 // 3)
    asked = NewSlide(f"{path}:S_1" if kind == "h5" else str(path), name="scan", um_per_px=4.)
    row = predict_slide(jobs_of(trained, tmp_path/"out"), asked)
    assert row["status"] == "failed" and "\n" not in row["why"], row
    assert any(w in row["why"] for w in ("cut off", "damaged", "cannot be read", "copy it again")), row


def test_what_is_no_slide_or_not_there(trained, tmp_path, demo_file):
    (tmp_path/"a.svs").write_text("hello")
    (tmp_path/"b.ndpi").write_bytes(b"II*\0" + bytes(300))
    for path, says in ((tmp_path/"a.svs", "cannot be read as a picture"), (tmp_path/"b.ndpi", "ending .ndpi"),
        (tmp_path/"none.mrxs", "does not exist"), (f"{demo_file}:S_9", "unknown slide 'S_9'"), (tmp_path, "")):
        if says: assert says in refused(trained, path, "--um-per-px", 4, "-o", tmp_path/"out")[0], says


@pytest.mark.parametrize("text, says", [
    ("a,b\n1,2\n", "has no column x"), ("x,y\n1,up\n", "not a number"), ("x,y\n-5,3\n", "outside"),
    ("x,y\n9,9\n9,9\n", "given twice"), ("slide,x,y\na,9,9\nb,8,8\n", "none of mine"), ("x,y\n", "holds no row")])
def test_tables_of_spots_that_cannot_be_used(trained, mine, tmp_path, text, says):
    (tmp_path/"spots.csv").write_text(text)
    assert says in refused(trained, mine, "--spots", tmp_path/"spots.csv", "-o", tmp_path/"out")[0]


def test_a_run_without_models_or_of_a_newer_version(trained, mine, tmp_path):
    (tmp_path/"empty").mkdir()
    assert "holds no models" in refused(tmp_path/"empty", mine, "-o", tmp_path/"out")[0]
    assert not (tmp_path/"out"/"mine").exists()
    copy = Path(shutil.copytree(trained, tmp_path/"newer"))
    kept = next((copy/"predictor").glob("*.json"))
    value = json.loads((copy/"predictor"/"kept.json").read_text()) if (copy/"predictor"/"kept.json").exists() else None
    assert value, kept
    write_json(copy/"predictor"/"kept.json", value | dict(version=value["version"] + 1))
    said = refused(copy, mine, "-o", tmp_path/"out")
    assert len(said) == 1 and "version" in said[0]


def test_a_scheduler_that_does_not_answer(trained, mine, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    over = many_slides.over_cluster
    monkeypatch.setattr(many_slides, "over_cluster", lambda *args, **how: over(*args, **how, patience=1.))
    said = refused(trained, mine, "--dask", "tcp://127.0.0.1:9", "-o", tmp_path/"out")
    assert len(said) == 1 and "no Dask scheduler answers at tcp://127.0.0.1:9" in said[0]
    assert "dask" in refused(trained, mine, "--dask", "nonsense:address", "-o", tmp_path/"out")[0].lower()


def test_another_run_at_work_on_the_slide(trained, mine, tmp_path):
    from histokit.core.runs import run_lock
    with run_lock(tmp_path/"out"/"mine"):
        assert "another run is at work" in predict_slide(jobs_of(trained, tmp_path/"out"), NewSlide(str(mine)))["why"]


# --- many slides ------------------------------------------------------------------------------

def test_one_failure_does_not_stop_the_rest(trained, mine, tmp_path):
    (mine.parent/"broken.tif").write_bytes(b"II*\0" + bytes(40))
    write_picture(mine.parent/"nowhere.png", np.zeros((40, 40, 3), np.uint8))
    said = []
    table = predict_slides(trained, list_slides([mine.parent]), tmp_path/"out", FEW, maps=1, say=said.append)
    assert table.slide.tolist() == ["broken", "mine", "nowhere"] and len(said) == 2
    assert table.status.tolist() == ["failed", "predicted", "failed"]
    kept = pd.read_csv(tmp_path/"out"/"slides.csv")
    assert kept.status.tolist() == table.status.tolist() and "does not say" in kept.why[2]
    page = (tmp_path/"out"/"slides.html").read_text()
    assert "href='mine/report.html'" in page and "href='broken" not in page


def test_a_table_of_slides(mine, tmp_path, demo_file):
    text = f"path,name,um_per_px,patient\nslides/mine.tif,left,2.5,A\n{demo_file}:S_1,right,,B\n"
    (tmp_path/"list.csv").write_text(text)
    left, right = list_slides([tmp_path/"list.csv"], um_per_px=4.)
    assert (left.name, left.um_per_px, left.patient, Path(left.path)) == ("left", 2.5, "A", mine)
    assert (right.name, right.um_per_px, right.path) == ("right", 4., f"{demo_file}:S_1")
    (tmp_path/"list.csv").write_text("path,name\na.tif,x\nb.tif,X\n")
    with pytest.raises(BadInput, match="would be written to one folder"): list_slides([tmp_path/"list.csv"])
    (tmp_path/"list.csv").write_text("file\na.tif\n")
    with pytest.raises(BadInput, match="has no column path"): list_slides([tmp_path/"list.csv"])
    (tmp_path/"list.csv").write_text("path,name\na.tif,../up\n")
    with pytest.raises(BadInput, match="cannot name the folder"): list_slides([tmp_path/"list.csv"])


def three_slides(folder, pixels, um):
    "The slide, the slide mirrored, and one that fails."
    folder.mkdir()
    for name, image in dict(a=pixels, b=pixels[:, ::-1], c=np.full((90, 90, 3), 240, np.uint8)).items():
        write_picture(folder/f"{name}.tif", as_picture(image, um_per_px=(um, um)), tile=64)
    return list_slides([folder])


@pytest.mark.slow
def test_processes_and_a_cluster_give_the_bytes_of_a_serial_run(trained, pixels, um, tmp_path):
    slides, how = three_slides(tmp_path/"slides", pixels, um), dict(maps=1, **QUIET)
    for name, workers in dict(serial=Workers(threads=1), processes=Workers(2, threads=1),
        dask=Workers(2, "local", threads=1)).items():
        table = predict_slides(trained, slides, tmp_path/name, FEW, workers, **how)
        assert table.status.tolist() == ["predicted", "predicted", "failed"], (name, table.why.tolist())
    expected = results(tmp_path/"serial")
    assert len(expected) > 12
    for name in ("processes", "dask"): assert results(tmp_path/name) == expected, name


def workers_of(client):
    return client.run(os.getpid)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_costs_no_finished_slide(trained, pixels, um, tmp_path):
    "A cluster of two; a worker is killed after its first slide, and the other results are the serial ones."
    distributed = pytest.importorskip("distributed")
    slides = three_slides(tmp_path/"slides", pixels, um)
    predict_slides(trained, slides, tmp_path/"serial", FEW, Workers(threads=1), maps=1, **QUIET)
    about = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with distributed.LocalCluster(**about) as cluster, distributed.Client(cluster) as client:
        victim = next(iter(workers_of(client).values()))
        script = f"""
from histokit.spots.many_slides import Workers, list_slides, predict_slides
from histokit.spots.new_slide import NewSlideSettings
import sys
table = predict_slides({str(trained)!r}, list_slides([{str(tmp_path/'slides')!r}]), {str(tmp_path/'out')!r},
    NewSlideSettings(chunk=64, device='cpu'), Workers(1, {cluster.scheduler_address!r}, threads=1), maps=1)
print(table.status.tolist())"""
        asked = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        until = time.monotonic() + 200
        while not list((tmp_path/"out").rglob("part_*.npy")) and time.monotonic() < until:
            assert asked.poll() is None, "the client ended before a worker had begun"
            time.sleep(.02)
        os.kill(victim, signal.SIGKILL)
        said = asked.communicate(timeout=300)[0]
        with pytest.raises(ProcessLookupError): os.kill(victim, 0)
    assert "['predicted', 'predicted', 'failed']" in said
    assert results(tmp_path/"out") == results(tmp_path/"serial")


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(trained, mine, tmp_path):
    predict_slides(trained, [NewSlide(str(mine))], tmp_path/"whole", NewSlideSettings(chunk=16, device="cpu"), maps=1)
    command = [sys.executable, "-m", "histokit.start", "predict"]
    program = "import sys; from histokit.start import begin; sys.argv = ['histokit', *sys.argv[1:]]; begin()"
    command = [sys.executable, "-c", program, "predict", str(trained), str(mine), "-o", str(tmp_path/"out"),
        "--chunk", "16", "--maps", "1", "--device", "cpu"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 200
    while not list((tmp_path/"out").rglob("part_*.npy")) and time.monotonic() < until: time.sleep(.005)
    first.kill()
    first.wait()
    assert not (tmp_path/"out"/"mine"/"slide.json").exists()
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path/"out"/"mine"/"parts").glob("part_*.npy")}
    assert stamps
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mine_bytes, whole = results(tmp_path/"out"/"mine"), results(tmp_path/"whole"/"mine")
    values = [pd.read_parquet(tmp_path/n/"mine"/"spots.parquet").iloc[:, 5:].to_numpy() for n in ("out", "whole")]
    assert set(mine_bytes) == set(whole) and np.abs(values[0] / values[1] - 1).max() < 1e-5


# --- what it leaves ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def left(trained, pixels, um, tmp_path_factory):
    "The folder of a slide that was predicted."
    home = tmp_path_factory.mktemp("left")
    write_picture(home/"mine.tif", as_picture(pixels, um_per_px=(um, um)), tile=64)
    predict_slides(trained, [NewSlide(str(home/"mine.tif"))], home/"out", FEW, maps=2)
    return home/"out"/"mine"


def test_all_files_hold_the_same_numbers(left, pixels, um):
    table, spread = (pd.read_parquet(left/f"{n}.parquet") for n in ("spots", "uncertainty"))
    types = list(table.columns[5:])
    assert list(table.columns) == list(spread.columns) and len(types) == 35
    assert (table.x_um / table.x).std() < 1e-9 and table.tissue.min() >= .5
    with h5py.File(left/"spots.h5ad") as h5:
        assert np.array_equal(h5["X"][:], table[types].to_numpy(np.float32))
        assert np.array_equal(h5["obsm/spatial"][:], table[["x", "y"]].to_numpy())
        assert h5["var/_index"].asstr()[:].tolist() == types
    found = json.loads((left/"spots.geojson").read_text())
    assert found["type"] == "FeatureCollection" and len(found["features"]) == len(table)
    for feature, (_, row) in zip(found["features"], table.iterrows()):
        ring = np.array(feature["geometry"]["coordinates"][0])
        assert np.array_equal(ring[0], ring[-1]) and np.allclose(ring[:-1].mean(0), row[["x", "y"]].tolist(), atol=.1)
        about = feature["properties"]
        assert about["objectType"] == "detection" and list(about["measurements"]) == types
        assert np.allclose(list(about["measurements"].values()), row[types].tolist(), rtol=1e-4)
        assert about["classification"]["name"] == types[int(row[types].to_numpy(float).argmax())]
    assert len(list((left/"maps").glob("*.png"))) == 2


def test_h5ad_is_read_by_anndata(left):
    anndata = pytest.importorskip("anndata", reason="anndata is not installed: pip install anndata")
    data = anndata.read_h5ad(left/"spots.h5ad")
    assert data.shape[1] == 35 and list(data.uns["spatial"]) == ["mine"] and "spread" in data.layers


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1280, "light")])
def test_the_page_of_a_slide_in_a_browser(browser, left, width, scheme):
    tab, said = browser.new_page(viewport=dict(width=width, height=844), color_scheme=scheme), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda problem: said.append(str(problem)))
    for page in (left/"report.html", left.parent/"slides.html"):
        tab.goto(page.as_uri())
        assert not said
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert len((left/"report.html").read_bytes()) < 5e6
    tab.close()


def test_names_that_are_markup_stay_text(trained, mine, tmp_path):
    name = "<i>a & b"
    predict_slides(trained, [NewSlide(str(mine), name=name)], tmp_path/"out", FEW, maps=1)
    page = (tmp_path/"out"/"slides.html").read_text()
    assert "<i>" not in page and "&lt;i&gt;a &amp; b/report.html" in page
    assert "<i>" not in (tmp_path/"out"/name/"report.html").read_text()


# --- size -------------------------------------------------------------------------------------

def large_slide(path, side, um, tile_of, patch=512):
    "A pyramid of any size that never is in memory: a disc of tissue on glass."
    def read(ys, xs):
        y, x = np.ogrid[ys, xs]
        tissue = np.hypot(y - side / 2, x - side / 2) < .3 * side
        rows, cols = np.arange(ys.start, ys.stop) % len(tile_of), np.arange(xs.start, xs.stop) % tile_of.shape[1]
        return np.where(tissue[..., None], tile_of[np.ix_(rows, cols)], np.uint8(243))
    picture = as_picture(np.zeros((1, 1, 3), np.uint8))
    from dataclasses import replace
    picture = replace(picture, shape=(side, side, 3), read=read, um_per_px=(um, um), pyramid=True, compression="jpeg")
    return write_picture(path, picture, tile=patch)


class Colours:
    "In place of a run: the mean colour of patches."
    um_per_px, pitch_um, lattice, sizes_um, input_px = 2., 200., "hex", [200.], 32
    stain, cell_types = None, ["r", "g", "b"]

    def encode(self, dataset): return dataset.images(np.arange(len(dataset))).float().mean((1, 3, 4)).numpy()[None]

    def answer(self, spots, encoded, pitch_px, size):
        from histokit.spots.predictor import SlideAnswer
        return SlideAnswer(encoded[0], encoded[0] * np.nan, encoded[0], encoded[0])


def tissue_tile(demo_file):
    with open_new_slide(NewSlide(f"{demo_file}:S_1")) as slide: image, found = slide.picture[:, :], find_tissue(slide)
    y, x = np.argwhere(found.mask).mean(0) * found.factor
    return image[int(y) - 48:int(y) + 48, int(x) - 48:int(x) + 48]


def test_memory_does_not_grow_with_the_slide(tmp_path, demo_file, monkeypatch):
    monkeypatch.setattr(new_slide, "familiar", lambda *args: dict(verdict="inside", reasons=[]))
    path = large_slide(tmp_path/"large.tif", 8000, .5, tissue_tile(demo_file).repeat(4, 0).repeat(4, 1))
    settings = NewSlideSettings(tile_mb=16, chunk=32)
    tracemalloc.start()
    found = new_slide.predict_new_slide(Colours(), NewSlide(str(path)), tmp_path/"parts", settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.spots) > 80 and found.read_um == pytest.approx(2) and peak < 90e6          # of 192 MB of pixels
    assert .5 < found.tissue.mm2 / (np.pi * (.3 * 4) ** 2) < 1.02                   # glands have holes


@pytest.mark.slow
def test_a_pyramid_of_40000_pixels_a_side_within_2_gb(trained, tmp_path, demo_file, um):
    from histokit.core.compute import KERNEL_ENVIRONMENT  # noqa: F401
    large_slide(tmp_path/"large.tif", 40_000, .25, tissue_tile(demo_file).repeat(8, 0).repeat(8, 1))
    program = """
import resource, sys
from histokit.spots.many_slides import Workers, list_slides, predict_slides
from histokit.spots.new_slide import NewSlideSettings
table = predict_slides(sys.argv[1], list_slides([sys.argv[2]]), sys.argv[3], NewSlideSettings(device='cpu'), maps=2)
print(table.status[0], table.spots[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"""
    said = subprocess.run([sys.executable, "-c", program, str(trained), str(tmp_path/"large.tif"), str(tmp_path/"out")],
        capture_output=True, text=True)
    status, spots, megabytes = said.stdout.split()[-3:]
    print(said.stdout, json.loads((tmp_path/"out"/"large"/"seconds.json").read_text()))
    assert status == "predicted" and int(spots) > 2000 and int(megabytes) < 2000, said.stdout + said.stderr


@pytest.mark.slow
def test_most_of_the_time_is_the_networks(tmp_path, demo_file, monkeypatch):
    "At least four fifths on a processor, with a network of the usual size."
    from histokit.spots.predictor import FrozenNetwork
    run = train(tmp_path/"run", demo_file, backbone="resnet18", input_px=224)
    path = large_slide(tmp_path/"large.tif", 12_000, .5, tissue_tile(demo_file).repeat(8, 0).repeat(8, 1))
    see, spent = FrozenNetwork.see, []
    def timed(self, inputs, context):
        start = time.monotonic()
        try: return see(self, inputs, context)
        finally: spent.append(time.monotonic() - start)
    monkeypatch.setattr(FrozenNetwork, "see", timed)
    start = time.monotonic()
    table = predict_slides(run, [NewSlide(str(path))], tmp_path/"out", NewSlideSettings(device="cpu"), maps=6)
    whole = time.monotonic() - start
    print(f"{sum(spent):.1f} of {whole:.1f} s for {table.spots[0]} spots")
    assert sum(spent) > .8 * whole


def test_an_opened_slide_is_closed_where_it_fails(tmp_path):
    write_picture(tmp_path/"a.tif", np.full((200, 200, 3), 243, np.uint8), tile=64)
    closed = []
    with pytest.raises(BadInput), OpenedSlide("a", as_picture(np.full((99, 99, 3), 243, np.uint8),
        close=lambda: closed.append(1)), 4., "given") as slide: find_tissue(slide)
    assert closed == [1]

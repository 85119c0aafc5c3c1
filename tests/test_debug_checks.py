"""The checks on files of every kind, on damaged files, on large ones, and on run folders in which something was broken afterwards."""
import shutil
import time

import h5py
import numpy as np
import pandas as pd
import pytest

from histokit.core.text import BadInput
from histokit.core.files import write_json
from histokit.spots.slides import DataFactory
from histokit.spots.patches import HESpotDataset, patch_size
from histokit.spots.cache import SlideCache
from histokit.spots.targets import TargetTransform
from histokit.spots.splits import assign_folds, slide_blocks
from histokit.spots.lattice import neighbour_labels
from histokit.core.checks import Finding, format_findings, from_error, raise_errors
from histokit.spots.check_file import check_file
from histokit.spots.check_patches import check_images
from histokit.learn.checks import check_improves
from histokit.spots.check_predictions import check_predictions, check_smoothing
from histokit.spots.check_run import check_run, check_split_honesty
from histokit.spots.check_slides import summarise_pixels
from histokit.spots.check_page import write_report


def errors(findings): return [str(f) for f in findings if f.level == "error"]
def says(findings, text, level="error"): return any(text in str(f) and f.level == level for f in findings)


def hexes(n=10, pitch=25., start=40):
    i, j = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n)))
    return start + (i + j % 2 / 2) * pitch, start + j * pitch * 3 ** .5 / 2


def write(path, slides=3, shape=(340, 330), dtype="f4", n_targets=5, seed=0, **spots):
    "A small file: purple tissue under the spots, glass around it."
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as h:
        for k in range(1, slides + 1):
            part = "Test" if k == slides else "Train"
            x, y = hexes(**spots)
            image = np.full((*shape, 3), .95)
            image[:int(y.max()) + 10, :int(x.max()) + 10] = rng.uniform(.3, .8, (int(y.max()) + 10, int(x.max()) + 10, 3))[:shape[0], :shape[1]] * [1, .7, 1]
            scale = dict(f=1., u=np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1)[np.dtype(dtype).kind]
            h[f"images/{part}/S_{k}"] = (image * scale).astype(dtype)
            columns = dict(x=x.round().astype(int), y=y.round().astype(int)) | ({f"C{i + 1}": rng.lognormal(i, 1, len(x)) for i in range(n_targets)} if part == "Train" else dict(Test_Set=np.ones(len(x), int)))
            h[f"spots/{part}/S_{k}"] = np.rec.fromarrays(list(columns.values()), names=list(columns))
    return path


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u1", "u2"])
def test_good_files_of_every_type(tmp_path, dtype):
    findings = check_file(write(tmp_path/"a.h5", dtype=dtype))
    assert all(f.level == "note" for f in findings), format_findings(findings)
    assert says(findings, "constant answer", "note") and says(findings, "hex lattice of 25.0 px, 3.99 µm/px", "note")


def test_findings_sort_and_split():
    f = from_error(BadInput("spots/Train/S_1: x of row 1 is nan; drop it"), "spots/Train/S_1")
    assert (f.what, f.mend, f.where) == ("x of row 1 is nan", "drop it", "spots/Train/S_1") and f.to_dict()["level"] == "error"
    assert format_findings([Finding("note", "a"), f, Finding("warning", "b\nc"), f]).splitlines() == ["error   spots/Train/S_1: x of row 1 is nan; drop it", "warning b c", "note    a"]
    with pytest.raises(BadInput): Finding("eror", "a")


def test_contradictions_between_slides(tmp_path):
    path = write(tmp_path/"a.h5", slides=4)
    with h5py.File(path, "r+") as h:
        image = h["images/Train/S_1"][:]
        del h["images/Train/S_2"]
        h["images/Train/S_2"] = image[::-1]                                     # the same picture, mirrored
        h["images/Train/S_3"].attrs["um_per_px"] = 2.                           # spots would be 50 µm apart
        for n in (1, 2): h[f"images/Train/S_{n}"].attrs["patient"] = "A"
    findings = check_file(path)
    assert says(findings, "S_1 and S_2 are the same picture") and says(findings, "50 µm apart", "warning") and says(findings, "several sections: A (2)", "note")
    assert says(findings, "scales from 2 to", "warning")


def test_swapped_on_a_nearly_square_slide(tmp_path):
    path = write(tmp_path/"a.h5", slides=4)
    with h5py.File(path, "r+") as h:
        rec = h["spots/Train/S_2"][:]
        rec["x"], rec["y"] = rec["y"].copy(), rec["x"].copy()
        del h["spots/Train/S_2"]
        h["spots/Train/S_2"] = rec
    findings = [f for f in check_file(path) if f.level == "warning"]
    assert says(findings, "S_2: the rows of its lattice are turned by 30°", "warning"), format_findings(findings)
    assert not any("S_1" in str(f) or "S_3" in str(f) for f in findings)


def test_one_slide_cannot_be_validated(tmp_path):
    assert says(check_file(write(tmp_path/"a.h5", slides=2)), "none can be held out")


def test_no_test_slide_and_unknown_scale(tmp_path):
    path = write(tmp_path/"a.h5", n=4)
    with h5py.File(path, "r+") as h:
        del h["images/Test"], h["spots/Test"]
        rec = h["spots/Train/S_1"][:]
        rec["x"], rec["y"] = np.random.default_rng(0).integers(20, 150, (2, len(rec)))
        del h["spots/Train/S_1"]
        h["spots/Train/S_1"] = rec
    findings = check_file(path)
    assert says(findings, "no test slide", "warning") and says(findings, "scale of S_1 is not known", "warning") and says(findings, "holds 16 spots only", "warning")


@pytest.mark.parametrize("chunks", [None, (256, 256, 3), (64, 6000, 3)])
def test_large_slides_are_sampled(tmp_path, chunks):
    "A slide of 108 million values is judged in seconds from a part of it, and a wrong scale is seen."
    with h5py.File(tmp_path/"a.h5", "w") as h:
        d = h.create_dataset("images", (6000, 6000, 3), "f4", chunks=chunks, fillvalue=.9)
        d[::400, ::400] = 1 if chunks else 200
        start = time.time()
        look = summarise_pixels(d, budget=1 << 23)
    assert time.time() - start < 8 and look.share < .3 and max(look.thumb.shape) <= 1200 and look.high == (1 if chunks else 200)


def test_claimed_sizes_do_not_take_memory(tmp_path):
    with h5py.File(tmp_path/"a.h5", "w") as h:
        h.create_dataset("images/Train/S_1", (10 ** 6, 10 ** 6, 3), "u1", chunks=(64, 64, 3))
        h.create_dataset("spots/Train/S_1", (10 ** 11,), [("x", "i8"), ("y", "i8"), ("C1", "f8")], chunks=(1024,))
    found = errors(check_file(tmp_path/"a.h5"))
    assert any("pixels" in e for e in found) and any("claims" in e and "spots" in e for e in found)


# --- the page ------------------------------------------------------------------------------------------------------------------------------------------

def test_page_of_a_good_file(tmp_path):
    path = write(tmp_path/"a.h5", slides=4)
    page = write_report(tmp_path/"page.html", path).read_text()
    assert page.count("<figure>") == 4 and page.count("data:image/jpeg") == 4 and "data:image/png" in page and len(page) < 1_500_000
    for text in ("0 errors", "25", "lattice", "What a constant scores", "ΔE to the others", "mean rank"): assert text in page, text
    assert "not to be shown" not in page and "http" not in page and "<script" not in page
    assert write_report(tmp_path/"given.html", path, [Finding("error", "told before", "mend it", "S_9")]).read_text().count("told before") == 1


def spoil(h):
    rec = h["spots/Train/S_1"][:]
    rec["x"][3], rec["C2"][5] = 10 ** 6, np.nan
    swap_in(h, "spots/Train/S_1", rec)
    del h["images/Train/S_2"]
    h["images/Test/S_3"].attrs["um_per_px"] = "text"


def test_page_of_broken_files(tmp_path):
    path = write(tmp_path/"a.h5")
    with h5py.File(path, "r+") as h: spoil(h)
    page = write_report(tmp_path/"page.html", path).read_text()
    assert page.count("<figure>") == 2 and "C2 of row 5 is nan" in page and "images/Train/S_2 is missing" in page and "not to be shown" not in page
    (tmp_path/"text.h5").write_text("nothing")
    for bad in (tmp_path/"text.h5", tmp_path/"nowhere.h5", tmp_path): assert "1 error" in write_report(tmp_path/"b.html", bad).read_text()
    (tmp_path/"file").write_text("")
    with pytest.raises(BadInput): write_report(tmp_path/"file"/"page.html", path)


def test_page_escapes_all_text(tmp_path):
    path, bad = write(tmp_path/"a <i>&.h5"), "<script>alert(1)</script>"
    with h5py.File(path, "r+") as h:
        for top in ("spots", "images"): h.move(f"{top}/Train/S_1", f"{top}/Train/" + bad.replace("/", "|"))
        h["images/Train/S_2"].attrs["patient"] = bad + "'\""
        for top in ("spots", "images"): h[f"{top}/Train"][b"\xff<i>"] = h[f"{top}/Test/S_3"][:]                # a name that is no text
    findings = check_file(path) + [Finding("warning", bad, bad, bad)]
    page = write_report(tmp_path/"page.html", path, findings).read_text()
    assert "<script" not in page and "<i>" not in page and "&lt;script&gt;" in page and "xff&lt;i&gt;" in page and "not to be shown" not in page
    assert Finding("note", "\udcff").what == "\\udcff"


def test_targets_scales_and_colours_are_told(tmp_path):
    path = write(tmp_path/"a.h5", slides=4)
    with h5py.File(path, "r+") as h:
        for n, share in (("S_1", .9), ("S_2", .8)):
            rec = h[f"spots/Train/{n}"][:]
            for c in rec.dtype.names[2:]: rec[c][np.random.default_rng(0).random(len(rec)) < share] = 0
            swap_in(h, f"spots/Train/{n}", rec)
        swap_in(h, "images/Train/S_3", h["images/Train/S_3"][:] * np.float32([.7, 1, 1]))
        h["images/Train/S_1"].attrs["um_per_px"] = 1e-7
    findings = check_file(path)
    assert says(findings, "um_per_px is 1e-07") and says(findings, "zeros tie", "warning")
    assert says(findings, "ΔE", "note") and says(findings, "no slide names its patient", "note") and says(findings, "stored as float32", "note") and says(findings, "targets float64", "note")


def test_page_in_seconds(tmp_path):
    "75 MB of pixels."
    path = write(tmp_path/"a.h5", slides=3, shape=(2900, 2900), dtype="u1", pitch=250.)
    start = time.time()
    page = write_report(tmp_path/"page.html", path).read_text()
    assert time.time() - start < 15 and len(page) < 1_500_000


# --- damaged files -----------------------------------------------------------------------------------------------------------------------------------------

def any_slide(rng, h, top=None):
    names = [f"{t}/{p}/{n}" for t in ([top] if top else h) for p in h[t] for n in h[t][p]]
    return names[rng.integers(len(names))]


def swap_in(h, where, value):
    del h[where]
    h[where] = value


def change_structure(rng, h):
    kind, where = rng.integers(6), any_slide(rng, h)
    if kind == 0: del h[where]
    elif kind == 1: del h[["spots", "images", "spots/Train", "images/Test"][rng.integers(4)]]
    elif kind == 2: h.move(where, where + "_renamed")
    elif kind == 3: swap_in(h, where, [h5py.SoftLink("/nowhere"), h5py.SoftLink("/" + where), h5py.ExternalLink("gone.h5", "/x"), h5py.SoftLink("/spots")][rng.integers(4)])
    elif kind == 4: swap_in(h, where, [np.float64(3), np.zeros((0, 0, 3)), np.zeros((5, 5, 4), np.uint8), h5py.Empty("f4"), "text", np.zeros(3)][rng.integers(6)])
    else: h[["/", "images", where][rng.integers(3)]].attrs[["um_per_px", "patient", "cell_types"][rng.integers(3)]] = [0, -1., np.nan, np.inf, 1e-9, 1e9, "text", [1, 2], h5py.Empty("f4"), b"\xff"][rng.integers(10)]


def change_spots(rng, h):
    where = any_slide(rng, h, "spots")
    rec, kind = h[where][:], rng.integers(4)
    names = list(rec.dtype.names)
    i = rng.integers(len(names))
    if kind == 0:
        odd = [[-1, 10 ** 9, 0], [0, 0, 0], [5, 6, 7]] if rec.dtype[i].kind == "i" else [[np.nan, np.inf, -1e300], [0, 0, 0], [1e300] * 3, [1e-320] * 3, [-0., 1e38, 4e38]]
        rec[names[i]][rng.integers(len(rec), size=3)] = odd[rng.integers(len(odd))]
    elif kind == 1: rec.dtype.names = [["c1", "X", "ID", "C0", "C01", "é"][rng.integers(6)] if j == i else n for j, n in enumerate(names)]
    elif kind == 2: rec = rec[:rng.integers(4)]
    else:
        new = np.zeros(len(rec), [(n, ["S4", h5py.string_dtype(), "c8", "i1", "(2,)f4", "bool"][rng.integers(6)] if j == i else rec.dtype[n]) for j, n in enumerate(names)])
        for j, n in enumerate(names):
            if j != i: new[n] = rec[n]
        rec = new
    swap_in(h, where, rec)


def change_pixels(rng, h):
    where = any_slide(rng, h, "images")
    a = h[where][:]
    ways = [lambda: a * 255, lambda: a / 255, lambda: a.astype("u1"), lambda: a.astype("i4"), lambda: np.where(rng.random(a.shape) < 1e-5, np.nan, a), lambda: a.astype(complex), lambda: a[:2, :1], lambda: a[..., 0]]
    swap_in(h, where, ways[rng.integers(len(ways))]())


def mutate(rng, source, path):
    "A damaged copy: a changed structure, changed values, changed bytes, or cut off."
    data = bytearray(source.read_bytes())
    kind = rng.integers(4)
    if kind == 0: data = data[:rng.integers(len(data))]
    elif kind == 1:
        for _ in range(rng.integers(1, 60)): data[rng.integers(min(9000, len(data)))] = rng.integers(256)
    path.write_bytes(data)
    if kind < 2: return
    with h5py.File(path, "r+") as h:
        for _ in range(rng.integers(1, 3)):
            try: (change_structure, change_spots, change_pixels)[rng.integers(3)](rng, h)
            except (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError): continue      # the second change may meet what the first one removed


def exercise(path):
    "What the stages do with a file: every pixel, spot, target, fold and patch."
    factory, cache = DataFactory(path), SlideCache(path)
    for name in factory.slides: factory.read_slide(name)
    spots = factory.spots.assign(fold=assign_folds(factory.spots))
    train = spots[spots.split.eq("Train")].reset_index(drop=True)
    values = train[factory.targets].to_numpy()
    assert train.fold.ge(0).all() and len(slide_blocks(train)) == len(train) and np.isfinite(neighbour_labels(train, values)).all()
    for kind in TargetTransform.kinds:
        t = TargetTransform(kind, standardise=True).fit(values)
        assert np.isfinite(t.transform(values).astype(np.float32)).all() and np.isfinite(t.inverse(t.transform(values))).all()
    px = {n: patch_size(200, s.um_per_px) if np.isfinite(s.um_per_px) else 56 for n, s in factory.slides.items()}
    dataset = HESpotDataset(spots, cache, px, 24, target=spots[factory.targets].to_numpy())
    for i in np.unique(np.linspace(0, len(spots) - 1, 12).astype(int)):
        inputs, target = dataset[i]
        assert inputs["image"].shape == (3, 24, 24) and np.isfinite(inputs["coords"]).all() and (np.isfinite(target).all() or spots.split[i] == "Test")


def fuzz(source, path, seeds):
    "Never raises, never long; a file without an error goes through everything that the stages do with it. Every tenth file gets its page."
    clean = 0
    for seed in seeds:
        mutate(np.random.default_rng(seed), source, path)
        start = time.time()
        found = errors(check_file(path))
        assert time.time() - start < 20, seed
        if seed % 10 == 0: assert "</html>" in write_report(path.with_suffix(".html"), path).read_text(), seed
        if found: continue
        clean += 1
        try: exercise(path)
        except Exception as e: raise AssertionError(f"the file of seed {seed} has no error, but fails later") from e
    return clean


@pytest.mark.filterwarnings("ignore")
def test_fuzz_some(tmp_path):
    source = write(tmp_path/"a.h5", n=6, shape=(200, 210), start=20)
    assert errors(check_file(source)) == []
    assert fuzz(source, tmp_path/"b.h5", range(120)) < 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_fuzz_many(tmp_path):
    fuzz(write(tmp_path/"a.h5", n=6, shape=(200, 210), start=20), tmp_path/"b.h5", range(1000, 3000))


# --- parts -------------------------------------------------------------------------------------------------------------------------------------------------

def test_images():
    rng = np.random.default_rng(0)
    good = rng.integers(0, 256, (8, 3, 20, 20), dtype=np.uint8)
    for batch in (good, good / 255, (good / 255).astype(np.float32), good[:1]): assert check_images(batch) == []
    for batch in (good * 1., good / 255 / 255, (good / 255).astype(np.uint8), good.transpose(0, 2, 3, 1), good[0], good.astype(int), np.where(good > 9, good / 255, np.nan), good / 127.5 - 1): assert errors(check_images(batch))


def test_predictions():
    rng = np.random.default_rng(0)
    good = rng.lognormal(np.arange(6), 1, (40, 6))
    assert errors(check_predictions(good)) == [] and errors(check_predictions(np.log(good + 1))) == []
    assert errors(check_predictions(good[:1])) == []                                           # one test spot is no constant
    for bad in ((good - good.mean(0)) / good.std(0), good[:1].repeat(9, 0), good * np.nan, np.ones((5, 4)), good[:, 0]): assert errors(check_predictions(bad))
    assert says(check_predictions(good - 2), "negative", "warning") and says(check_predictions(good[np.arange(40) % 4]), "only 4 of 40 rows differ", "warning")


def test_patients_across_folds():
    x, y = hexes()
    spots = pd.DataFrame(dict(slide=np.repeat(["a", "b", "c"], 100), patient=np.repeat(["p", "p", "q"], 100), x=np.tile(x, 3), y=np.tile(y, 3)))
    assert says(check_split_honesty(spots, np.repeat([0, 1, 2], 100)), "patients p are on both sides", "warning")
    assert check_split_honesty(spots, np.repeat([0, 0, 1], 100)) == [] and errors(check_split_honesty(spots, np.zeros(300)))
    assert says(check_split_honesty(spots, np.arange(300) % 3), "split at random")


def test_smoothing_that_sorts_or_sums():
    assert check_smoothing(lambda v, s: v) == []
    assert says(check_smoothing(lambda v, s: v[:-1]), "rows go in") and says(check_smoothing(lambda v, s: v * 7), "a constant of 1 becomes 7.00")


def test_histories():
    assert check_improves(pd.DataFrame(dict(penalty=[1.], metric=[.5]))) == []
    assert errors(check_improves(pd.DataFrame(dict(metric=[np.nan])))) and errors(check_improves(pd.DataFrame()))
    assert says(check_improves(pd.DataFrame(dict(metric=[.5, .4, .3, .2]))), "first epoch is the best", "warning")


# --- a run folder ------------------------------------------------------------------------------------------------------------------------------------------

def test_finished_run_has_no_error(finished_run, demo_file):
    rooms, dataset = check_run(finished_run, demo_file)
    assert set(rooms) == {"file", "slides", "patches", "split", "training", "predictions"} and len(dataset) > 100
    raise_errors(rooms)


def broken_run(finished_run, folder, change):
    run = folder/"run"
    shutil.copytree(finished_run, run)
    change(run)
    return run


def constant_submission(run):
    t = pd.read_csv(run/"submission.csv")
    t.assign(**{c: t[c].iloc[0] for c in t.columns[1:]}).to_csv(run/"submission.csv", index=False)


def chosen_on_reported(run):
    k = next((run/"folds").glob("0"))
    rows = np.flatnonzero(pd.read_parquet(run/"spots.parquet").query("split == 'Train'").fold.to_numpy() == 0)
    t = pd.read_parquet(k/"inner.parquet")
    t.iloc[np.arange(len(rows)) % len(t)].assign(row=rows).to_parquet(k/"inner.parquet")


def random_folds(run):
    t = pd.read_parquet(run/"spots.parquet")
    t.assign(fold=np.where(t.split.eq("Train"), np.random.default_rng(0).integers(0, t.fold.max() + 1, len(t)), -1)).to_parquet(run/"spots.parquet")


def other_slides(run):
    with h5py.File(run/"slides.h5", "r+") as h: swap_in(h, "images/Train/S_1", h["images/Train/S_1"][:-9])


def flat_history(run):
    pd.DataFrame(dict(epoch=[1, 2, 3], loss=[3., 2, 1], metric=[.5, .5, .5])).to_csv(run/"folds"/"0"/"history.csv", index=False)


def torn_weights(run): (run/"folds"/"0"/"model.safetensors").write_bytes(b"torn")
def lost_fold(run): shutil.rmtree(run/"folds"/"1")
def shorter(run): pd.read_csv(run/"submission.csv").iloc[:-3].to_csv(run/"submission.csv", index=False)
def reversed_rows(run): pd.read_csv(run/"submission.csv").iloc[::-1].to_csv(run/"submission.csv", index=False)


def z_scored_oof(run):
    t = pd.read_parquet(run/"oof.parquet")
    c = [n for n in t if n.startswith("C")]
    v = np.random.default_rng(0).normal(size=(len(t), len(c)))
    t.assign(**dict(zip(c, v.T))).to_parquet(run/"oof.parquet")


@pytest.mark.parametrize("change,room,words", [(constant_submission, "predictions", "same prediction"), (shorter, "predictions", "rows for"), (reversed_rows, "predictions", "row 0 has ID"), (z_scored_oof, "predictions", "z-scores"),
    (chosen_on_reported, "split", "what it is scored on"), (random_folds, "split", "split at random"), (other_slides, "slides", "not the slide of the data file"), (flat_history, "training", "in every epoch"),
    (torn_weights, "training", "broken or of another model"), (lost_fold, "training", "models of folds")])
def test_broken_run_is_noticed(change, room, words, finished_run, demo_file, tmp_path):
    rooms, _ = check_run(broken_run(finished_run, tmp_path, change), demo_file)
    assert says(rooms[room], words), "\n".join(format_findings(f) for f in rooms.values())
    with pytest.raises(BadInput, match="checks? failed; first: "): raise_errors(rooms)


def test_bad_scores_are_told(finished_run, demo_file, tmp_path):
    def change(run): write_json(run/"metrics.json", dict(oof=[dict(name="constant: mean", per_spot=.6), dict(name="this model", per_spot=.5)]))
    rooms, _ = check_run(broken_run(finished_run, tmp_path, change), demo_file)
    assert says(rooms["predictions"], "adds nothing yet", "warning")

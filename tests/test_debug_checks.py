"""The checks on files of every kind, damaged ones, large ones, and on run folders in which something was broken."""
import shutil
import time

import h5py
import numpy as np
import pandas as pd
import pytest

from histokit.core.checks import Finding, format_findings, from_error, raise_errors
from histokit.core.files import write_json
from histokit.core.text import BadInput
from histokit.learn.check_batches import check_images
from histokit.learn.checks import check_improves
from histokit.spots.cache import SlideCache
from histokit.spots.check_file import check_file
from histokit.spots.check_page import write_report
from histokit.spots.check_predictions import check_predictions, check_smoothing
from histokit.spots.check_run import check_run, check_split_honesty
from histokit.spots.check_slides import summarise_pixels
from histokit.spots.lattice import neighbour_labels
from histokit.spots.mistakes import replace_dataset, swap_xy
from histokit.spots.patches import HESpotDataset, patch_size
from histokit.spots.slides import DataFactory
from histokit.spots.splits import assign_folds, slide_blocks
from histokit.spots.targets import TargetTransform


def errors(findings): return [str(f) for f in findings if f.level == "error"]
def says(findings, text, level="error"): return any(text in str(f) and f.level == level for f in findings)


def hexagonal(n=10, pitch=25., start=40):
    "x and y of n x n spots on a hexagonal lattice."
    i, j = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n)))
    return start + (i + j % 2 / 2) * pitch, start + j * pitch * 3 ** .5 / 2


def purple(rng, shape, x, y):
    "A picture in 0-1: purple tissue under the spots, glass around it."
    image = np.full((*shape, 3), .95)
    h, w = int(y.max()) + 10, int(x.max()) + 10
    tissue = rng.uniform(.3, .8, (h, w, 3)) * [1, .7, 1]
    image[:h, :w] = tissue[:shape[0], :shape[1]]
    return image


def stored(image, dtype):
    "A picture in 0-1 as this type."
    kind = np.dtype(dtype)
    return (image * (np.iinfo(kind).max if kind.kind == "u" else 1)).astype(kind)


def write(path, slides=3, shape=(340, 330), dtype="f4", n_targets=5, seed=0, **spots):
    "A small file, its last slide a test slide; spots: as `hexagonal` takes them."
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as h5:
        for k in range(1, slides + 1):
            part, (x, y) = "Test" if k == slides else "Train", hexagonal(**spots)
            h5[f"images/{part}/S_{k}"] = stored(purple(rng, shape, x, y), dtype)
            columns = dict(x=x.round().astype(int), y=y.round().astype(int))
            if part == "Test": columns["Test_Set"] = np.ones(len(x), int)
            else: columns |= {f"C{i + 1}": rng.lognormal(i, 1, len(x)) for i in range(n_targets)}
            h5[f"spots/{part}/S_{k}"] = np.rec.fromarrays(list(columns.values()), names=list(columns))
    return path


# --- files ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u1", "u2"])
def test_good_files_of_every_type(tmp_path, dtype):
    findings = check_file(write(tmp_path/"a.h5", dtype=dtype))
    assert all(f.level == "note" for f in findings), format_findings(findings)
    assert says(findings, "constant answer", "note")
    assert says(findings, "hex lattice of 25.0 px, 3.99 µm/px", "note")


def test_findings_sort_and_split():
    f = from_error(BadInput("spots/Train/S_1: x of row 1 is nan; drop it"), "spots/Train/S_1")
    assert (f.what, f.mend, f.where) == ("x of row 1 is nan", "drop it", "spots/Train/S_1")
    assert f.to_dict()["level"] == "error"
    lines = format_findings([Finding("note", "a"), f, Finding("warning", "b\nc"), f]).splitlines()
    assert lines == ["error   spots/Train/S_1: x of row 1 is nan; drop it", "warning b c", "note    a"]
    with pytest.raises(BadInput): Finding("eror", "a")


def test_contradictions_between_slides(tmp_path):
    path = write(tmp_path/"a.h5", slides=4)
    with h5py.File(path, "r+") as h5:
        replace_dataset(h5, "images/Train/S_2", h5["images/Train/S_1"][:][::-1])    # the same picture, mirrored
        h5["images/Train/S_3"].attrs["um_per_px"] = 2.                              # spots would be 50 µm apart
        for n in (1, 2): h5[f"images/Train/S_{n}"].attrs["patient"] = "A"
    findings = check_file(path)
    assert says(findings, "S_1 and S_2 are the same picture")
    assert says(findings, "50 µm apart", "warning") and says(findings, "scales from 2 to", "warning")
    assert says(findings, "several sections: A (2)", "note")


def test_swapped_on_a_nearly_square_slide(tmp_path):
    path = write(tmp_path/"a.h5", slides=4)
    with h5py.File(path, "r+") as h5: swap_xy(h5, "S_2")
    findings = [f for f in check_file(path) if f.level == "warning"]
    turned = "S_2: the rows of its lattice are turned by 30°"
    assert says(findings, turned, "warning"), format_findings(findings)
    assert not any("S_1" in str(f) or "S_3" in str(f) for f in findings)


def test_one_slide_is_divided_and_that_is_said(tmp_path):
    assert says(check_file(write(tmp_path/"a.h5", slides=2)), "one training slide", "warning")


def test_no_test_slide_and_unknown_scale(tmp_path):
    path = write(tmp_path/"a.h5", n=4)
    with h5py.File(path, "r+") as h5:
        del h5["images/Test"], h5["spots/Test"]
        spots = h5["spots/Train/S_1"][:]
        spots["x"], spots["y"] = np.random.default_rng(0).integers(20, 150, (2, len(spots)))
        replace_dataset(h5, "spots/Train/S_1", spots)
    findings = check_file(path)
    for text in ("no test slide", "scale of S_1 is not known", "holds 16 spots only"):
        assert says(findings, text, "warning"), text


@pytest.mark.parametrize("chunks", [None, (256, 256, 3), (64, 6000, 3)])
def test_large_slides_are_sampled(tmp_path, chunks):
    "A slide of 108 million values is judged in seconds from a part of it, and a wrong scale is seen."
    with h5py.File(tmp_path/"a.h5", "w") as h5:
        image = h5.create_dataset("images", (6000, 6000, 3), "f4", chunks=chunks, fillvalue=.9)
        image[::400, ::400] = 1 if chunks else 200
        start = time.time()
        pixels = summarise_pixels(image, budget=1 << 23)
    assert time.time() - start < 8 and pixels.share < .3 and max(pixels.thumb.shape) <= 1200
    assert pixels.high == (1 if chunks else 200)


def test_claimed_sizes_do_not_take_memory(tmp_path):
    columns = [("x", "i8"), ("y", "i8"), ("C1", "f8")]
    with h5py.File(tmp_path/"a.h5", "w") as h5:
        h5.create_dataset("images/Train/S_1", (10 ** 6, 10 ** 6, 3), "u1", chunks=(64, 64, 3))
        h5.create_dataset("spots/Train/S_1", (10 ** 11,), columns, chunks=(1024,))
    found = errors(check_file(tmp_path/"a.h5"))
    assert any("pixels" in e for e in found) and any("claims" in e and "spots" in e for e in found)


def test_an_empty_dataset_is_no_picture(tmp_path):
    path = write(tmp_path/"a.h5")
    with h5py.File(path, "r+") as h5: replace_dataset(h5, "images/Train/S_1", h5py.Empty("f4"))
    assert says(check_file(path), "images/Train/S_1: has shape None")
    with pytest.raises(BadInput, match="has shape None"): DataFactory(path)


# --- the page -------------------------------------------------------------------------------------------------------

def test_page_of_a_good_file(tmp_path):
    path = write(tmp_path/"a.h5", slides=4)
    page = write_report(tmp_path/"page.html", path).read_text()
    assert page.count("<figure>") == 4 and page.count("data:image/jpeg") == 4 and "data:image/png" in page
    for text in ("0 errors", "25", "lattice", "What a constant scores", "ΔE to the others", "mean rank"):
        assert text in page, text
    for text in ("not to be shown", "http", "<script"): assert text not in page, text
    assert len(page) < 1_500_000
    given = [Finding("error", "said before", "mend it", "S_9")]
    assert write_report(tmp_path/"given.html", path, given).read_text().count("said before") == 1


def spoil(h5):
    "A position outside, a missing value, a picture lost, and a scale that is no number."
    spots = h5["spots/Train/S_1"][:]
    spots["x"][3], spots["C2"][5] = 10 ** 6, np.nan
    replace_dataset(h5, "spots/Train/S_1", spots)
    del h5["images/Train/S_2"]
    h5["images/Test/S_3"].attrs["um_per_px"] = "text"


def test_page_of_broken_files(tmp_path):
    path = write(tmp_path/"a.h5")
    with h5py.File(path, "r+") as h5: spoil(h5)
    page = write_report(tmp_path/"page.html", path).read_text()
    assert page.count("<figure>") == 2 and "C2 of row 5 is nan" in page
    assert "images/Train/S_2 is missing" in page and "not to be shown" not in page
    (tmp_path/"text.h5").write_text("nothing")
    for bad in (tmp_path/"text.h5", tmp_path/"nowhere.h5", tmp_path):
        assert "1 error" in write_report(tmp_path/"b.html", bad).read_text()
    (tmp_path/"file").write_text("")
    with pytest.raises(BadInput): write_report(tmp_path/"file"/"page.html", path)


def test_page_escapes_all_text(tmp_path):
    path, bad = write(tmp_path/"a <i>&.h5"), "<script>alert(1)</script>"
    with h5py.File(path, "r+") as h5:
        for top in ("spots", "images"):
            h5.move(f"{top}/Train/S_1", f"{top}/Train/" + bad.replace("/", "|"))
            h5[f"{top}/Train"][b"\xff<i>"] = h5[f"{top}/Test/S_3"][:]               # a name that is no text
        h5["images/Train/S_2"].attrs["patient"] = bad + "'\""
    findings = [*check_file(path), Finding("warning", bad, bad, bad)]
    page = write_report(tmp_path/"page.html", path, findings).read_text()
    for text in ("<script", "<i>", "not to be shown"): assert text not in page, text
    for text in ("&lt;script&gt;", "xff&lt;i&gt;"): assert text in page, text
    assert Finding("note", "\udcff").what == "\\udcff"


def sparse(h5, slide, share):
    "Set a share of a slide's targets to zero."
    spots = h5[f"spots/Train/{slide}"][:]
    for c in spots.dtype.names[2:]: spots[c][np.random.default_rng(0).random(len(spots)) < share] = 0
    replace_dataset(h5, f"spots/Train/{slide}", spots)


def test_targets_scales_and_colours_are_reported(tmp_path):
    path = write(tmp_path/"a.h5", slides=4)
    with h5py.File(path, "r+") as h5:
        sparse(h5, "S_1", .9)
        sparse(h5, "S_2", .8)
        replace_dataset(h5, "images/Train/S_3", h5["images/Train/S_3"][:] * np.float32([.7, 1, 1]))
        h5["images/Train/S_1"].attrs["um_per_px"] = 1e-7
    findings = check_file(path)
    assert says(findings, "um_per_px is 1e-07") and says(findings, "zeros tie", "warning")
    for text in ("ΔE", "no slide names its patient", "stored as float32", "targets float64"):
        assert says(findings, text, "note"), text


def test_page_in_seconds(tmp_path):
    "75 MB of pixels."
    path = write(tmp_path/"a.h5", slides=3, shape=(2900, 2900), dtype="u1", pitch=250.)
    start = time.time()
    page = write_report(tmp_path/"page.html", path).read_text()
    assert time.time() - start < 15 and len(page) < 1_500_000


# --- damaged files --------------------------------------------------------------------------------------------------

NO_LINKS = [h5py.SoftLink("/nowhere"), h5py.SoftLink("/spots"), h5py.ExternalLink("gone.h5", "/x")]
NO_SLIDES = [np.float64(3), "text", h5py.Empty("f4"),
             *(np.zeros(shape, np.uint8) for shape in (3, (0, 0, 3), (5, 5, 4)))]
ODD_ATTRIBUTES = [0, -1., np.nan, np.inf, 1e-9, 1e9, "text", [1, 2], h5py.Empty("f4"), b"\xff"]
ODD_INTEGERS = [[-1, 10 ** 9, 0], [0, 0, 0], [5, 6, 7]]
ODD_FLOATS = [[np.nan, np.inf, -1e300], [-0., 1e38, 4e38],
              [0] * 3, [1e300] * 3, [1e-320] * 3]
ODD_NAMES = ["c1", "X", "ID", "C0", "C01", "é"]
ODD_TYPES = ["S4", h5py.string_dtype(), "c8", "i1", "(2,)f4", "bool"]


def one_of(rng, choices): return choices[rng.integers(len(choices))]


def any_slide(rng, h5, top=None):
    return one_of(rng, [f"{t}/{p}/{n}" for t in ([top] if top else h5) for p in h5[t] for n in h5[t][p]])


def change_structure(rng, h5):
    kind, where = rng.integers(6), any_slide(rng, h5)
    if kind == 0: del h5[where]
    elif kind == 1: del h5[one_of(rng, ["spots", "images", "spots/Train", "images/Test"])]
    elif kind == 2: h5.move(where, where + "_renamed")
    elif kind == 3: replace_dataset(h5, where, one_of(rng, [*NO_LINKS, h5py.SoftLink("/" + where)]))
    elif kind == 4: replace_dataset(h5, where, one_of(rng, NO_SLIDES))
    else:
        attrs = h5[one_of(rng, ["/", "images", where])].attrs
        attrs[one_of(rng, ["um_per_px", "patient", "cell_types"])] = one_of(rng, ODD_ATTRIBUTES)


def retyped(rng, spots, i):
    "The spots with column i of another type, and empty."
    names = spots.dtype.names
    types = {n: spots.dtype[n] for n in names} | {names[i]: one_of(rng, ODD_TYPES)}
    new = np.zeros(len(spots), list(types.items()))
    for n in names[:i] + names[i + 1:]: new[n] = spots[n]
    return new


def change_spots(rng, h5):
    where = any_slide(rng, h5, "spots")
    spots, kind = h5[where][:], rng.integers(4)
    names = list(spots.dtype.names)
    i = rng.integers(len(names))
    if kind == 0:
        odd = one_of(rng, ODD_INTEGERS if spots.dtype[i].kind == "i" else ODD_FLOATS)
        spots[names[i]][rng.integers(len(spots), size=3)] = odd
    elif kind == 1: spots.dtype.names = [one_of(rng, ODD_NAMES) if j == i else n for j, n in enumerate(names)]
    elif kind == 2: spots = spots[:rng.integers(4)]
    else: spots = retyped(rng, spots, i)
    replace_dataset(h5, where, spots)


def change_pixels(rng, h5):
    where = any_slide(rng, h5, "images")
    a = h5[where][:]
    ways = [lambda: a * 255, lambda: a / 255, lambda: a.astype("u1"), lambda: a.astype("i4"),
            lambda: np.where(rng.random(a.shape) < 1e-5, np.nan, a), lambda: a.astype(complex),
            lambda: a[:2, :1], lambda: a[..., 0]]
    replace_dataset(h5, where, one_of(rng, ways)())


CHANGES = (change_structure, change_spots, change_pixels)
GONE = (KeyError, ValueError, TypeError, AttributeError, OSError, RuntimeError)


def mutate(rng, source, path):
    "A damaged copy: a changed structure, changed values, changed bytes, or cut off."
    data = bytearray(source.read_bytes())
    kind = rng.integers(4)
    if kind == 0: data = data[:rng.integers(len(data))]
    elif kind == 1:
        for _ in range(rng.integers(1, 60)): data[rng.integers(min(9000, len(data)))] = rng.integers(256)
    path.write_bytes(data)
    if kind < 2: return
    with h5py.File(path, "r+") as h5:
        for _ in range(rng.integers(1, 3)):
            try: one_of(rng, CHANGES)(rng, h5)
            except GONE: continue                     # the second change may meet what the first one removed


def exercise(path):
    "What the stages do with a file: every pixel, spot, target, fold and patch."
    factory, cache = DataFactory(path), SlideCache(path)
    for name in factory.slides: factory.read_slide(name)
    spots = factory.spots.assign(fold=assign_folds(factory.spots))
    train = spots[spots.split.eq("Train")].reset_index(drop=True)
    values = train[factory.targets].to_numpy()
    assert train.fold.ge(0).all() and len(slide_blocks(train)) == len(train)
    assert np.isfinite(neighbour_labels(train, values)).all()
    for kind in TargetTransform.kinds:
        t = TargetTransform(kind, standardise=True).fit(values)
        scaled = t.transform(values)
        assert np.isfinite(scaled.astype(np.float32)).all() and np.isfinite(t.inverse(scaled)).all()
    exercise_patches(factory, cache, spots)


def exercise_patches(factory, cache, spots):
    sides = {n: patch_size(200, s.um_per_px) if np.isfinite(s.um_per_px) else 56 for n, s in factory.slides.items()}
    dataset = HESpotDataset(spots, cache, sides, 24, target=spots[factory.targets].to_numpy())
    for i in np.unique(np.linspace(0, len(spots) - 1, 12).astype(int)):
        inputs, target = dataset[i]
        assert inputs["image"].shape == (3, 24, 24) and np.isfinite(inputs["coords"]).all()
        assert np.isfinite(target).all() or spots.split[i] == "Test"


def fuzz(source, path, seeds):
    """Never raises, never long; a file without an error goes through everything that the stages do with it.
    Every tenth file gets its page."""
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


# --- parts ----------------------------------------------------------------------------------------------------------

def test_images():
    rng = np.random.default_rng(0)
    good = rng.integers(0, 256, (8, 3, 20, 20), dtype=np.uint8)
    for batch in (good, good / 255, (good / 255).astype(np.float32), good[:1]): assert check_images(batch) == []
    scaled = good / 255
    wrong = [good * 1., scaled / 255, scaled.astype(np.uint8), scaled * 2 - 1,
             np.where(good > 9, scaled, np.nan), good.transpose(0, 2, 3, 1), good[0], good.astype(int)]
    for batch in wrong: assert errors(check_images(batch))


def test_predictions():
    rng = np.random.default_rng(0)
    good = rng.lognormal(np.arange(6), 1, (40, 6))
    for values in (good, np.log(good + 1), good[:1]): assert errors(check_predictions(values)) == []
    z_scores = (good - good.mean(0)) / good.std(0)
    constant = good[:1].repeat(9, 0)
    for bad in (z_scores, good * np.nan, good[:, 0]): assert errors(check_predictions(bad))
    for poor in (constant, constant * 0):                                            # an answer all the same
        assert not errors(check_predictions(poor)) and says(check_predictions(poor), "same prediction", "warning")
    assert says(check_predictions(good - 2), "negative", "warning")
    assert says(check_predictions(good[np.arange(40) % 4]), "only 4 of 40 rows differ", "warning")


def test_patients_across_folds():
    x, y = hexagonal()
    slide, patient = (np.repeat(list(names), 100) for names in ("abc", "ppq"))
    spots = pd.DataFrame(dict(slide=slide, patient=patient, x=np.tile(x, 3), y=np.tile(y, 3)))
    apart = check_split_honesty(spots, np.repeat([0, 1, 2], 100))
    assert says(apart, "patients p are on both sides", "warning")
    assert check_split_honesty(spots, np.repeat([0, 0, 1], 100)) == []
    assert errors(check_split_honesty(spots, np.zeros(300)))
    assert says(check_split_honesty(spots, np.arange(300) % 3), "split at random")


def test_smoothing_that_sorts_or_sums():
    assert check_smoothing(lambda v, s: v) == []
    assert says(check_smoothing(lambda v, s: v[:-1]), "rows go in")
    assert says(check_smoothing(lambda v, s: v * 7), "a constant of 1 becomes 7.00")


def test_histories():
    assert check_improves(pd.DataFrame(dict(penalty=[1.], metric=[.5]))) == []
    assert errors(check_improves(pd.DataFrame(dict(metric=[np.nan])))) and errors(check_improves(pd.DataFrame()))
    assert says(check_improves(pd.DataFrame(dict(metric=[.5, .4, .3, .2]))), "first epoch is the best", "warning")


# --- a run folder ---------------------------------------------------------------------------------------------------

PARTS = {"file", "slides", "patches", "split", "training", "predictions"}


def test_finished_run_has_no_error(finished_run, demo_file):
    parts, dataset = check_run(finished_run, demo_file)
    assert set(parts) == PARTS and len(dataset) > 100
    raise_errors(parts)


def broken_run(finished_run, folder, change):
    run = folder/"run"
    shutil.copytree(finished_run, run)
    change(run)
    return run


def change_table(path, change):
    "Write a table of a run anew."
    table = change(pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path))
    if path.suffix == ".csv": table.to_csv(path, index=False)
    else: table.to_parquet(path)


def constant_submission(run):
    change_table(run/"submission.csv", lambda t: t.assign(**{c: t[c].iloc[0] for c in t.columns[1:]}))


def chosen_on_reported(run):
    held_out = np.flatnonzero(pd.read_parquet(run/"spots.parquet").query("split == 'Train'").fold.to_numpy() == 0)
    again = lambda t: t.iloc[np.arange(len(held_out)) % len(t)].assign(row=held_out)
    change_table(run/"folds"/"0"/"inner.parquet", again)


def random_folds(run):
    def deal(t):
        fold = np.random.default_rng(0).integers(0, t.fold.max() + 1, len(t))
        return t.assign(fold=np.where(t.split.eq("Train"), fold, -1))
    change_table(run/"spots.parquet", deal)


def other_slides(run):
    with h5py.File(run/"slides.h5", "r+") as h5: replace_dataset(h5, "images/Train/S_1", h5["images/Train/S_1"][:-9])


def flat_history(run):
    history = pd.DataFrame(dict(epoch=[1, 2, 3], loss=[3., 2, 1], metric=[.5, .5, .5]))
    history.to_csv(run/"folds"/"0"/"history.csv", index=False)


def torn_weights(run): (run/"folds"/"0"/"model.safetensors").write_bytes(b"torn")
def lost_fold(run): shutil.rmtree(run/"folds"/"1")
def shorter(run): change_table(run/"submission.csv", lambda t: t.iloc[:-3])
def reversed_rows(run): change_table(run/"submission.csv", lambda t: t.iloc[::-1])


def z_scored_oof(run):
    def z_scores(t):
        names = [n for n in t if n.startswith("C")]
        return t.assign(**dict(zip(names, np.random.default_rng(0).normal(size=(len(names), len(t))))))
    change_table(run/"oof.parquet", z_scores)


@pytest.mark.parametrize("change, part, words", [
    (shorter, "predictions", "rows for"),
    (reversed_rows, "predictions", "row 0 has ID"),
    (z_scored_oof, "predictions", "z-scores"),
    (chosen_on_reported, "split", "what it is scored on"),
    (random_folds, "split", "split at random"),
    (other_slides, "slides", "not the slide of the data file"),
    (flat_history, "training", "in every epoch"),
    (torn_weights, "training", "broken or of another model"),
    (lost_fold, "training", "models of folds"),
])
def test_broken_run_is_noticed(change, part, words, finished_run, demo_file, tmp_path):
    parts, _ = check_run(broken_run(finished_run, tmp_path, change), demo_file)
    assert says(parts[part], words), "\n".join(format_findings(f) for f in parts.values())
    with pytest.raises(BadInput, match="checks? failed; first: "): raise_errors(parts)


def test_a_constant_answer_is_a_warning(finished_run, demo_file, tmp_path):
    parts, _ = check_run(broken_run(finished_run, tmp_path, constant_submission), demo_file)
    assert says(parts["predictions"], "same prediction", "warning") and errors(parts["predictions"]) == []


def test_bad_scores_are_reported(finished_run, demo_file, tmp_path):
    scores = [dict(name="constant: mean", per_spot=.6), dict(name="this model", per_spot=.5)]
    run = broken_run(finished_run, tmp_path, lambda run: write_json(run/"metrics.json", dict(oof=scores)))
    parts, _ = check_run(run, demo_file)
    assert says(parts["predictions"], "adds nothing yet", "warning")

"What the stain pages cannot say about themselves: staintools as the oracle, pictures without a stain, files."
import importlib.util
import json
import pickle
import sys

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy import ndimage
from scipy.optimize import nnls

from histokit.core.files import plain
from histokit.core.text import BadInput
from histokit.spots.layout import slide_paths
from histokit.spots.stain_files import normalise_file, stain_image_file
from histokit.tissue.colour import DENSITY_OF_BYTE, rgb_to_lab, rgb_to_od
from histokit.tissue.dyes import concentrations, degrees_between, import_staintools, unit_rows
from histokit.tissue.jitter import RandomReference, StainJitter, batch_concentrations
from histokit.tissue.mask import pixel_kinds, tissue_mask
from histokit.tissue.measure import STAIN_METHODS, measure_stain
from histokit.tissue.normalise import StainNormalizer
from histokit.tissue.repaint import compiled_repaint, ink_share, paint_plan, repaint, repaint_threads
from histokit.tissue.toy import TOY_DYES, toy_slide, unusable_pictures
from histokit.tissue.transfer import standardise_luminosity

OTHER = unit_rows([[.50, .72, .48], [.33, .88, .34]])
# the engines of our own that are here
FAST = ["numpy", "torch"] + ["numba"] * bool(importlib.util.find_spec("numba"))


def painted(dyes=TOY_DYES, glass=255, strength=(1.2, .8), seed=0):
    "A slide of 200 pixels without ink, and where its tissue is."
    toy = toy_slide(200, seed, dyes=dyes, strength=strength, glass=np.broadcast_to(glass, 3), ink=False)
    return toy.image, toy.tissue


SLIDE, TISSUE = painted()
SECOND, _ = painted(OTHER, strength=(.8, 1.), seed=3)


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("staintools")
    pytest.importorskip("spams")
    import staintools
    from staintools.miscellaneous.get_concentrations import get_concentrations
    return staintools, get_concentrations


def staintools_with(image, source, target, scale, get_concentrations):
    "What staintools' transform gives with these matrices and strengths."
    c = get_concentrations(image.copy(), source) * scale
    return (255 * np.exp(-c @ target)).reshape(image.shape).astype(np.uint8)


# staintools as the oracle

@pytest.mark.parametrize("image", [SLIDE, SECOND], ids=["first", "second"])
@pytest.mark.parametrize("method", ["vahadane", "macenko"])
def test_vectors_are_those_of_staintools(theirs, method, image):
    expected = import_staintools()[0][method].get_stain_matrix(image.copy())
    got = StainNormalizer(method).fit(image).stain_matrix_
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert degrees_between(got, expected).max() < 2


@pytest.mark.parametrize("engine", [*FAST, "staintools"])
def test_pixels_are_those_of_staintools(theirs, engine):
    noise = np.random.default_rng(0).integers(0, 256, (101, 60, 3), np.uint8)      # any colour at all
    image = np.concatenate([SECOND[:101, :97], noise], 1)
    image[:2] = 0
    image[2:4] = 255
    n = StainNormalizer(engine=engine).set_reference(dict(stain_matrix=TOY_DYES, max_concentration=[1.3, .9]))
    got = n.transform(image, dict(stain_matrix=OTHER, max_concentration=[1., 1.2]))
    expected = staintools_with(image, OTHER, TOY_DYES, np.array([1.3, .9]) / [1., 1.2], theirs[1])
    off = np.abs(got.astype(int) - expected)
    assert off.max() <= 1 and off.mean() < .01
    assert n.engine_ == engine


def test_engines_agree_on_tinted_glass(theirs):
    source, reference = painted(OTHER, (238, 230, 236), seed=4)[0], painted(glass=(245, 243, 244))[0]
    results = {}
    for engine in (*FAST, "staintools"):
        n = StainNormalizer(engine=engine).set_reference(measure_stain(reference))
        results[engine] = n.transform(source, measure_stain(source)).astype(int)
    for engine in results: assert np.abs(results[engine] - results["numpy"]).max() <= 1, engine


LEVELS = np.r_[0:6, 7:250:7, 250:256]                                             # the ends among them
ANY_COLOUR = np.stack(np.meshgrid(LEVELS, LEVELS, LEVELS), -1).reshape(-1, 47, 3).astype(np.uint8)


@pytest.mark.parametrize("keep_ink", [False, True])
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_engines_agree_on_every_colour(keep_ink, seed, tinted):
    rng = np.random.default_rng(seed)
    v, t = (unit_rows(rng.uniform(.02, 1, (2, 3))) for _ in range(2))
    if degrees_between(*v) < 5: return
    whites = rng.uniform(190, 255, (2, 3)) if tinted else (255, 255)
    plan = paint_plan(v, t, rng.uniform(.3, 3, 2), *whites)
    expected = repaint(ANY_COLOUR, plan, "numpy", keep_ink=keep_ink).astype(int)
    for engine in FAST:
        off = np.abs(repaint(ANY_COLOUR, plan, engine, keep_ink=keep_ink) - expected)
        assert off.max() <= 1 and off.mean() < (.02 if keep_ink else .001), engine


def test_auto_is_numba_where_it_is_installed(monkeypatch):
    assert StainNormalizer().fit(SLIDE).engine_ == ("numba" if "numba" in FAST else "torch")
    compiled_repaint.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    assert StainNormalizer().fit(SLIDE).engine_ == "torch"
    with pytest.raises(BadInput, match="install the extra 'fast'"): StainNormalizer(engine="numba").fit(SLIDE)


def test_numba_works_in_as_many_threads_as_it_was_told():
    numba = pytest.importorskip("numba")
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try: assert repaint_threads("numba", "cpu") == 1
    finally: numba.set_num_threads(before)
    plan = paint_plan(OTHER, TOY_DYES, (1.1, .9), 240, 250)
    one = repaint(SECOND, plan, "numba", threads=1, pixels=999)
    assert np.array_equal(one, repaint(SECOND, plan, "numba", threads=3, pixels=2048))


def test_the_staintools_engine_runs_when_asked_for(theirs):
    n = StainNormalizer(engine="staintools").fit(SLIDE)
    assert n.engine_ == "staintools" and n.report_["engine"] == "staintools" and n.report_["ok"]
    wrong = StainNormalizer("reinhard", engine="staintools")
    with pytest.raises(BadInput, match="has no method reinhard"): wrong.fit(SLIDE)


def test_missing_staintools_says_how_to_install_it(monkeypatch):
    import_staintools.cache_clear()
    monkeypatch.setitem(sys.modules, "spams", None)
    wanted = StainNormalizer(engine="staintools")
    with pytest.raises(BadInput, match=r"pip install 'histokit\[staintools\]'"): wanted.fit(SLIDE)


def test_luminosity_standardisation_is_that_of_staintools(theirs):
    dark = (SLIDE * .75).astype(np.uint8)
    expected = theirs[0].LuminosityStandardizer.standardize(dark.copy())
    off = np.abs(standardise_luminosity(dark).astype(int) - expected)
    assert off.mean() < 1.5 and np.percentile(off, 99) <= 5                # theirs goes through 8-bit CIELAB


# arithmetic

def matrices():
    numbers = st.lists(st.floats(.02, 1), min_size=6, max_size=6)
    return numbers.map(lambda v: unit_rows(np.reshape(v, (2, 3))))


@settings(max_examples=60, deadline=None)
@given(matrices(), st.integers(0, 10**6), st.sampled_from([0., .01, .1]))
def test_closed_form_is_the_lasso(v, seed, penalty):
    if degrees_between(v[0], v[1]) < 2: return
    od = np.random.default_rng(seed).normal(.3, .6, (20, 3)).clip(0)
    lower = np.linalg.cholesky(v @ v.T)
    expected = np.array([nnls(lower.T, np.linalg.solve(lower, v @ x - penalty))[0] for x in od])
    np.testing.assert_allclose(concentrations(od, v, penalty), expected, atol=2e-3)


@pytest.mark.parametrize("method", ["vahadane", "macenko"])
def test_known_vectors_are_recovered(method):
    got = StainNormalizer(method).fit(SLIDE).stain_matrix_
    assert degrees_between(got, TOY_DYES).max() < 6
    assert np.array_equal(got, StainNormalizer(method).fit(SLIDE).stain_matrix_)


@pytest.mark.parametrize("keep_ink", [False, True])
@pytest.mark.parametrize("engine", FAST)
def test_sizes_that_are_no_multiple_of_the_block_give_the_same_pixels(engine, keep_ink):
    plan, image = paint_plan(OTHER, TOY_DYES, (1.1, .9), 240, 250), SECOND.copy()
    def again(image, **kw): return repaint(image, plan, engine, keep_ink=keep_ink, **kw)
    image[40:60, 40:60] = 60, 58, 60
    whole = again(image)
    for h, w in ((1, 1), (1, 7), (3, 5), (13, 11)):
        assert np.array_equal(again(image[:h, :w]), whole[:h, :w])
    assert np.array_equal(again(image, pixels=4096), whole)
    assert np.array_equal(again(image[::2, ::2]), whole[::2, ::2])
    frozen = image.copy()
    frozen.flags.writeable = False
    assert np.array_equal(again(frozen), whole)
    assert np.array_equal(again(image, out=image), whole)                              # onto itself


@pytest.mark.parametrize("engine", FAST)
def test_the_picture_given_is_never_changed(engine):
    image, zeros = SECOND.copy(), np.zeros((30, 30, 3), np.uint8)
    n = StainNormalizer(engine=engine, keep_ink=True).fit(SLIDE)
    n.transform(image)
    n.transform(zeros)
    assert np.array_equal(image, SECOND) and not zeros.any()


def test_lab_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    rgb = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    expected = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    np.testing.assert_allclose(rgb_to_lab(rgb), expected, atol=.6)                # OpenCV interpolates in a table


# glass and what else is no tissue

# colour transfer has one engine
METHOD_ENGINES = [(m, e) for m in STAIN_METHODS for e in (FAST[:1] if "reinhard" in m else FAST)]


@pytest.mark.parametrize("method, engine", METHOD_ENGINES)
@pytest.mark.parametrize("glass", [(255, 255, 255), (243, 241, 244), (226, 205, 222)])
def test_glass_is_not_tinted(method, engine, glass):
    source, tissue = painted(OTHER, glass, seed=5)
    n = StainNormalizer(method, engine=engine).fit(SLIDE)
    after = n.transform(source)
    assert n.report_["done"], n.report_["reason"]
    inside = ndimage.binary_erosion(~tissue, iterations=3)
    before, now = (im[inside].astype(float).mean(0) for im in (source, after))
    assert np.ptp(now) <= np.ptp(before) + 1 and now.min() >= before.min() - 1


BOXES = dict(
    pen=(slice(2, 14), slice(2, 40), (40, 60, 190)),
    green=(slice(2, 14), slice(160, 198), (30, 140, 60)),
    cut=(slice(180, 200), slice(0, 20), (0, 0, 0)),
    dot=(slice(186, 194), slice(186, 194), (60, 58, 60)),
    blood=(slice(95, 105), slice(95, 105), (215, 40, 50)))


def with_boxes(*args, **kw):
    "A painted slide with pen, a black cut-out, a printed dot and blood on it, and where its tissue is."
    image, tissue = painted(*args, **kw)
    for rows, cols, colour in BOXES.values(): image[rows, cols] = colour
    return image, tissue


@pytest.mark.parametrize("method, engine", METHOD_ENGINES + [("macenko", "staintools")])
def test_ink_keeps_its_colour_when_asked_and_tissue_does_not(method, engine, request):
    if engine == "staintools": request.getfixturevalue("theirs")
    image, tissue = with_boxes(OTHER, strength=(.8, 1.))
    fitted = [StainNormalizer(method, engine=engine, keep_ink=k).fit(SLIDE) for k in (True, False)]
    kept, all_painted = (n.transform(image) for n in fitted)
    off = np.abs(kept.astype(int) - image).max(-1)
    for name, (rows, cols, _) in BOXES.items(): assert name == "blood" or off[rows, cols].max() <= 1, name
    tissue = tissue & (pixel_kinds(image) == 1)
    assert (kept != all_painted).any(-1)[tissue].mean() < .001 and np.median(off[tissue]) > 3


def test_ink_is_a_smooth_function_of_the_colour():
    share = ink_share(*DENSITY_OF_BYTE[ANY_COLOUR.transpose(2, 0, 1)])
    assert share.dtype == np.float32 and (share.min(), share.max()) == (0, 1)
    assert not share[(ANY_COLOUR > 171).all(-1)].any()
    line = np.linspace([120, 118, 122], [120, 60, 150], 60).round().astype(np.uint8)            # from grey to violet
    share = ink_share(*DENSITY_OF_BYTE[line.T])
    assert share[0] > .9 and share[-1] == 0 and np.abs(np.diff(share)).max() < .25


def test_mask_leaves_out_what_is_no_tissue():
    image, tissue = with_boxes(glass=(243, 241, 244))
    mask = tissue_mask(image)
    for name, (rows, cols, _) in BOXES.items(): assert not mask[rows, cols].any(), name
    tissue[95:105, 95:105] = False
    assert (mask & tissue).sum() / (mask | tissue).sum() > .95


def test_mask_of_a_large_picture_has_its_shape():
    big = np.tile(SLIDE, (4, 5, 1))[:-3, :-7]
    mask = tissue_mask(big)
    assert mask.shape == big.shape[:2] and mask.dtype == bool and .4 < mask.mean() < .7


# pictures that cannot be normalised

def hard_pictures():
    "The toy's unusable pictures, and more: a row, a grey RGB, eosin alone, grass, hardly any dye, a speck."
    rng = np.random.default_rng(0)
    near = np.hypot(*np.mgrid[-1:1:200j, -1:1:200j])[..., None]
    grey = SLIDE.mean(-1, keepdims=True).round().astype(np.uint8)
    grass = rng.random((64, 64, 1)) * [90, 200, 60] + [10, 40, 5]
    faint = np.clip(255 - rng.random((64, 64, 3)) * 10, 0, 255)
    speck, eosin = np.where(near < .03, SLIDE, 255), painted(TOY_DYES[[1, 1]])[0]
    more = dict(thin=SLIDE[:1], grey3=grey.repeat(3, -1), only_E=eosin, grass=grass, faint=faint, speck=speck)
    return unusable_pictures() | {name: image.astype(np.uint8) for name, image in more.items()}


HARD = hard_pictures()


@pytest.mark.parametrize("method, engine", METHOD_ENGINES)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.filterwarnings("error")
def test_hard_pictures_are_left_as_they_are_and_reported(name, method, engine):
    image, n = HARD[name], StainNormalizer(method, engine=engine).fit(SLIDE)
    assert np.array_equal(n.transform(image), image)
    assert n.report_["ok"] is False and n.report_["done"] is False and n.report_["reason"]
    assert "NaN" not in json.dumps(plain(n.report_))
    bad = StainNormalizer(method, engine=engine).fit(image)
    assert bad.report_["ok"] is False
    assert np.array_equal(bad.transform(SLIDE), SLIDE) and "reference" in bad.report_["reason"]


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.filterwarnings("error")
def test_a_second_pass_changes_nothing(engine):
    n = StainNormalizer(engine=engine).fit(SLIDE)
    once = n.transform(SECOND)
    assert n.report_["done"] and not np.array_equal(once, SECOND)
    assert np.array_equal(n.transform(once), once) and n.report_["reason"] == "already looks like the reference"
    assert np.array_equal(n.transform(SLIDE), SLIDE)


ALPHA = np.full((*SECOND.shape[:2], 1), 255, np.uint8)
KINDS_OF_PICTURE = dict(uint8=SECOND, uint16=SECOND.astype(np.uint16) * 257, float32=(SECOND / 255).astype(np.float32),
    rgba=np.concatenate([SECOND, ALPHA], -1), list=np.asarray(SECOND.tolist(), np.uint8))


@pytest.mark.parametrize("kind", KINDS_OF_PICTURE)
@pytest.mark.parametrize("engine", FAST)
def test_every_kind_of_picture(kind, engine):
    n, image = StainNormalizer(engine=engine).fit(SLIDE), KINDS_OF_PICTURE[kind]
    expected, got = n.transform(SECOND), n.transform(image)
    assert got.dtype == np.uint8 and got.shape == image.shape and np.array_equal(got[..., :3], expected)


NO_PICTURES = [
    "slide.png", None, 3, np.array([["a"]]),
    np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8),
    np.zeros((2, 4, 4, 3), np.uint8),
    *(np.full((4, 4, 3), value) for value in (200., np.nan)),
    *(np.zeros((4, 4, 3), dtype) for dtype in (complex, np.int64))]


@pytest.mark.parametrize("bad", NO_PICTURES, ids=repr)
def test_what_is_no_picture_is_refused(bad):
    n = StainNormalizer().fit(SLIDE)
    for call in (n.transform, StainNormalizer().fit, tissue_mask):
        with pytest.raises(BadInput) as e: call(bad)
        assert "\n" not in str(e.value)


# scikit-learn habits

@pytest.mark.parametrize("method", STAIN_METHODS)
def test_parameters_pickling_and_json(tmp_path, method):
    n = StainNormalizer(method, engine="numpy", keep_ink=True, penalty=.02).fit(SLIDE)
    expected, params, file = n.transform(SECOND), n.get_params(), tmp_path/"n.json"
    assert params["method"] == method and params["keep_ink"] is True
    assert StainNormalizer().set_params(**params).get_params() == StainNormalizer(**params).get_params() == params
    text = n.to_json(file)
    for again in (pickle.loads(pickle.dumps(n)), StainNormalizer.from_json(text), StainNormalizer.from_json(file)):
        assert again.get_params() == params and np.array_equal(again.transform(SECOND), expected)


def test_bad_parameters_and_bad_json_are_refused(tmp_path):
    for text in ("{", "{}", str(tmp_path/"gone.json")):
        with pytest.raises(BadInput): StainNormalizer.from_json(text)
    for kw in (dict(method="vahadan"), dict(engine="cupy")):
        with pytest.raises(BadInput, match="unknown"): StainNormalizer(**kw).fit(SLIDE)


# files

@pytest.fixture
def data(tmp_path):
    path, test_slide = tmp_path/"data.h5", painted(OTHER, seed=9)[0]
    spots = np.rec.fromarrays([[1, 2], [3, 4], [.5, .6]], names="x,y,C1")
    with h5py.File(path, "w") as f:
        f.attrs["um_per_px"] = 4.
        for name, image in dict(S_2=SECOND, S_1=SLIDE, S_10=HARD["white"]).items():
            f.create_dataset(f"images/Train/{name}", data=image).attrs["patient"] = "A"
        f.create_dataset("images/Test/S_3", data=(test_slide / 255).astype(np.float32))
        f.create_dataset("spots/Train/S_1", data=spots).attrs["note"] = "kept"
        f["images"].attrs["scanner"] = "B"
    return path


def test_a_file_keeps_its_layout(data, tmp_path):
    reports = normalise_file(data, tmp_path/"out.h5", tile=64)
    n = StainNormalizer().fit(SLIDE)
    with h5py.File(data) as a, h5py.File(tmp_path/"out.h5") as b:
        assert list(slide_paths(b, spots=False)) == ["S_1", "S_2", "S_10", "S_3"]
        spots, train = b["spots/Train/S_1"], b["images/Train"]
        assert b.attrs["um_per_px"] == 4 and b["images"].attrs["scanner"] == "B" and spots.attrs["note"] == "kept"
        assert (spots[:] == a["spots/Train/S_1"][:]).all()
        assert np.array_equal(train["S_2"][:], n.transform(SECOND))                    # one matrix, whatever the tiles
        assert np.array_equal(train["S_1"][:], SLIDE) and np.array_equal(train["S_10"][:], HARD["white"])
        d = b["images/Test/S_3"]
        assert d.dtype == np.uint8 and d.chunks == (200, 200, 3) and d.attrs["stain_ok"]
        assert d.attrs["stain_matrix"].shape == (2, 3) and d.attrs["engine"] == n.engine_
        assert train["S_2"].attrs["patient"] == "A" and not train["S_10"].attrs["stain_ok"]
    assert reports["S_10"]["reason"].startswith("too little tissue") and reports["S_2"]["done"]


def test_none_copies(data, tmp_path):
    reports = normalise_file(data, tmp_path/"out.h5", "none")
    with h5py.File(tmp_path/"out.h5") as f:
        d = f["images/Train/S_2"]
        assert np.array_equal(d[:], SECOND) and d.attrs["stain_method"] == "none"
    assert not any(r["done"] for r in reports.values())


def test_a_reference_that_is_a_picture_or_saved(data, tmp_path):
    Image.fromarray(SLIDE).save(tmp_path/"ref.png")
    StainNormalizer().fit(SLIDE).to_json(tmp_path/"ref.json")
    first = normalise_file(data, tmp_path/"a.h5", reference="S_1")
    for name in ("ref.png", "ref.json"):
        got = normalise_file(data, tmp_path/"b.h5", reference=tmp_path/name)
        np.testing.assert_allclose(got["S_2"]["stain_matrix"], first["S_2"]["stain_matrix"])
        with h5py.File(tmp_path/"a.h5") as a, h5py.File(tmp_path/"b.h5") as b:
            assert np.array_equal(a["images/Train/S_2"][:], b["images/Train/S_2"][:])


def test_bad_files_leave_earlier_results_alone(data, tmp_path):
    out = tmp_path/"out.h5"
    out.write_text("earlier")
    (tmp_path/"text.h5").write_text("no HDF5")
    with h5py.File(tmp_path/"empty.h5", "w") as f: f.create_group("image")
    with h5py.File(tmp_path/"wrong.h5", "w") as f: f["images/Train/S_1"] = np.full((20, 20, 3), 200.)
    said = dict(gone="does not exist", text="not a readable HDF5", empty="is it 'image'", wrong="scale them to 0-1")
    for name, words in said.items():
        with pytest.raises(BadInput, match=words): normalise_file(tmp_path/f"{name}.h5", out)
    with pytest.raises(BadInput, match="no reference slide 'S_9'"): normalise_file(data, out, reference="S_9")
    with pytest.raises(BadInput, match="did you mean 'macenko'"): normalise_file(data, out, "macenco")
    assert out.read_text() == "earlier" and not list(tmp_path.glob(".*tmp*"))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_picture_files(tmp_path, suffix):
    Image.fromarray(SECOND).save(tmp_path/"in.png")
    Image.fromarray(SLIDE).save(tmp_path/"ref.png")
    report = stain_image_file(tmp_path/"in.png", tmp_path/"ref.png", tmp_path/f"out{suffix}")
    expected = StainNormalizer().fit(SLIDE).transform(SECOND)
    got = np.asarray(Image.open(tmp_path/f"out{suffix}")).astype(int)
    assert report["done"] and np.abs(got - expected).mean() < (0.01 if suffix != ".jpg" else 3)


def test_picture_files_that_are_none(tmp_path):
    (tmp_path/"in.png").write_text("no picture")
    Image.fromarray(SLIDE).save(tmp_path/"ref.png")
    wrong = {"in.png ref.png o.png": "cannot be read as a picture", "gone.png ref.png o.png": "does not exist",
        "ref.png in.png o.png": "cannot be read", "ref.png ref.png o.bmp": "format of the result"}
    for names, words in wrong.items():
        with pytest.raises(BadInput, match=words): stain_image_file(*(tmp_path/n for n in names.split()))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "I;16"])
def test_picture_files_of_every_mode(tmp_path, mode):
    Image.fromarray(SLIDE).save(tmp_path/"ref.png")
    image, name = Image.fromarray(SLIDE), "m.tif" if mode in ("CMYK", "I;16") else "m.png"
    if mode == "I;16": image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image.convert(mode).save(tmp_path/name)
    stain_image_file(tmp_path/name, tmp_path/"ref.png", tmp_path/"o.png")
    assert Image.open(tmp_path/"o.png").size == image.size


# augmentation

@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_keeps_type_and_glass(dtype):
    torch.manual_seed(0)
    batch = torch.from_numpy(np.stack([SLIDE, SECOND]).transpose(0, 3, 1, 2).copy())
    batch[..., 0, 0] = 255
    batch = batch if dtype == torch.uint8 else batch.float() / 255
    reports = [measure_stain(SLIDE), measure_stain(SECOND)]
    for augment in (StainJitter(TOY_DYES), RandomReference(reports, reports[0])):
        out = augment(batch)
        assert out.dtype == dtype and out.shape == batch.shape and not torch.equal(out, batch)
        assert torch.equal(out[..., 0, 0], batch[..., 0, 0])
    assert torch.allclose(StainJitter(TOY_DYES, 0, 0)(batch).float(), batch.float(), atol=1e-5)
    with pytest.raises(BadInput, match="no slide has a usable stain"): RandomReference([dict(ok=False)], reports[0])


def test_batch_concentrations_are_the_closed_form():
    x = torch.from_numpy(SLIDE.transpose(2, 0, 1)[None].copy()).float() / 255
    got = batch_concentrations(x, TOY_DYES)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, concentrations(rgb_to_od(SLIDE), TOY_DYES), atol=1e-4)

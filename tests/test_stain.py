"What the stain notebook cannot say about itself: staintools as the oracle, pictures that cannot be normalised, files."
import importlib.util, json, pickle

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy import ndimage
from scipy.optimize import nnls

from histokit.core.files import plain
from histokit.tissue import transfer
from histokit.spots.layout import slide_paths
from histokit.stain import normalise_file, stain_image_file
from histokit.tissue.colour import DENSITY_OF_BYTE, rgb_to_lab, rgb_to_od
from histokit.tissue.dyes import concentrations, degrees_between
from histokit.tissue.jitter import RandomReference, StainJitter, batch_concentrations
from histokit.tissue.mask import pixel_kinds, tissue_mask
from histokit.tissue.measure import METHODS, measure
from histokit.tissue.normalise import StainNormalizer
from histokit.tissue.repaint import _threads, compiled_repaint, ink_share, paint_plan, repaint
from histokit.tissue.transfer import standardise_luminosity
from histokit.core.text import BadInput

KNOWN = np.array([[.62, .70, .35], [.22, .92, .32]]) / np.linalg.norm([[.62, .70, .35], [.22, .92, .32]], axis=1, keepdims=True)
OTHER = np.array([[.50, .72, .48], [.33, .88, .34]]) / np.linalg.norm([[.50, .72, .48], [.33, .88, .34]], axis=1, keepdims=True)


def paint(vectors=KNOWN, size=200, glass=255, strength=(1.2, .8), seed=0):
    "Nuclei on stroma in a disc on glass: the slide and where tissue is."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    tissue = np.hypot(x, y) < .85
    nuclei = ndimage.gaussian_filter((ndimage.gaussian_filter(rng.random((size, size)), 2) > .525).astype(float), .8)
    stroma = .35 + .65 * (np.clip(ndimage.gaussian_filter(rng.standard_normal((size, size)), 4) * 7, -1, 1) + 1) / 2
    amount = np.stack([nuclei * strength[0], stroma * (1 - .9 * nuclei) * strength[1]], -1) * tissue[..., None]
    slide = glass * np.exp(-amount @ vectors) + rng.normal(0, 1.5, (size, size, 3)) * tissue[..., None]
    return slide.clip(0, 255).round().astype(np.uint8), tissue


FAST = ["numpy", "torch"] + ["numba"] * bool(importlib.util.find_spec("numba"))        # the engines of our own that are here
SLIDE, TISSUE = paint()
SECOND, _ = paint(OTHER, strength=(.8, 1.), seed=3)


@pytest.fixture(scope="module")
def theirs():
    pytest.importorskip("staintools"); pytest.importorskip("spams")
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
    extractor = getattr(theirs[0], f"{method.title()}StainExtractor", None)
    if extractor is None:
        module = __import__(f"staintools.stain_extraction.{method}_stain_extractor", fromlist=["x"])
        extractor = getattr(module, f"{method.title()}StainExtractor")
    expected = extractor.get_stain_matrix(image.copy())
    got = StainNormalizer(method).fit(image).stain_matrix_
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert degrees_between(got, expected).max() < 2


@pytest.mark.parametrize("engine", [*FAST, "staintools"])
def test_pixels_are_those_of_staintools(theirs, engine):
    rng = np.random.default_rng(0)
    image = np.concatenate([SECOND[:101, :97], rng.integers(0, 256, (101, 60, 3), np.uint8)], 1)      # any colour at all, black and white too
    image[:2] = 0; image[2:4] = 255
    n = StainNormalizer(engine=engine).set_reference(dict(stain_matrix=KNOWN, max_concentration=[1.3, .9]))
    got = n.transform(image, dict(stain_matrix=OTHER, max_concentration=[1., 1.2]))
    expected = staintools_with(image, OTHER, KNOWN, np.array([1.3, .9]) / [1., 1.2], theirs[1])
    off = np.abs(got.astype(int) - expected)
    assert off.max() <= 1 and off.mean() < .01
    assert n.engine_ == engine


def test_engines_agree_on_tinted_glass(theirs):
    source, reference = paint(OTHER, glass=np.array([238, 230, 236]), seed=4)[0], paint(glass=np.array([245, 243, 244]))[0]
    results = {}
    for engine in (*FAST, "staintools"):
        n = StainNormalizer(engine=engine).set_reference(measure(reference))
        results[engine] = n.transform(source, measure(source)).astype(int)
    for engine in results: assert np.abs(results[engine] - results["numpy"]).max() <= 1, engine


ANY_COLOUR = np.stack(np.meshgrid(*[np.r_[0:6, 7:250:7, 250:256]] * 3), -1).reshape(-1, 47, 3).astype(np.uint8)       # 47^3 colours, among them the ends


@pytest.mark.parametrize("keep_ink", [False, True])
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_engines_agree_on_every_colour(keep_ink, seed, tinted):
    rng = np.random.default_rng(seed)
    v, t = (rng.uniform(.02, 1, (2, 3)) for _ in range(2))
    v, t = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (v, t))
    if degrees_between(*v) < 5: return
    whites = rng.uniform(190, 255, (2, 3)) if tinted else (255, 255)
    plan = paint_plan(v, t, rng.uniform(.3, 3, 2), *whites)
    expected = repaint(ANY_COLOUR, plan, "numpy", keep_ink=keep_ink).astype(int)
    for engine in FAST:
        off = np.abs(repaint(ANY_COLOUR, plan, engine, keep_ink=keep_ink) - expected)
        assert off.max() <= 1 and off.mean() < (.02 if keep_ink else .001), engine


def test_auto_is_numba_where_it_is_installed(monkeypatch):
    assert StainNormalizer().fit(SLIDE).engine_ == ("numba" if "numba" in FAST else "torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert StainNormalizer().fit(SLIDE).engine_ == "torch"
    compiled_repaint.cache_clear(); monkeypatch.setitem(__import__("sys").modules, "numba", None)
    with pytest.raises(BadInput, match="install the extra 'fast'"): StainNormalizer(engine="numba").fit(SLIDE)


def test_numba_works_in_as_many_threads_as_it_was_told():
    numba = pytest.importorskip("numba")
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try: assert _threads("numba", "cpu") == 1
    finally: numba.set_num_threads(before)
    plan = paint_plan(OTHER, KNOWN, (1.1, .9), 240, 250)
    assert np.array_equal(repaint(SECOND, plan, "numba", threads=1, pixels=999), repaint(SECOND, plan, "numba", threads=3, pixels=2048))


def test_the_staintools_engine_runs_when_asked_for(theirs):
    n = StainNormalizer(engine="staintools").fit(SLIDE)
    assert n.engine_ == "staintools" and n.report_["engine"] == "staintools" and n.report_["ok"]
    with pytest.raises(BadInput, match="has no method reinhard"): StainNormalizer("reinhard", engine="staintools").fit(SLIDE)


def test_missing_staintools_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(transfer, "_oracle", [])
    monkeypatch.setitem(__import__("sys").modules, "spams", None)
    with pytest.raises(BadInput, match=r"pip install 'histokit\[staintools\]'"): StainNormalizer(engine="staintools").fit(SLIDE)


def test_luminosity_standardisation_is_that_of_staintools(theirs):
    dark = (SLIDE * .75).astype(np.uint8)
    expected = theirs[0].LuminosityStandardizer.standardize(dark.copy())
    off = np.abs(standardise_luminosity(dark).astype(int) - expected)
    assert off.mean() < 1.5 and np.percentile(off, 99) <= 5                # theirs goes through 8-bit CIELAB


# arithmetic

def vectors(): return st.lists(st.floats(.02, 1), min_size=6, max_size=6).map(lambda v: np.reshape(v, (2, 3)) / np.linalg.norm(np.reshape(v, (2, 3)), axis=1, keepdims=True))


@settings(max_examples=60, deadline=None)
@given(vectors(), st.integers(0, 10**6), st.sampled_from([0., .01, .1]))
def test_closed_form_is_the_lasso(v, seed, penalty):
    if degrees_between(v[0], v[1]) < 2: return
    od = np.random.default_rng(seed).normal(.3, .6, (20, 3)).clip(0)
    lower = np.linalg.cholesky(v @ v.T)
    expected = np.array([nnls(lower.T, np.linalg.solve(lower, v @ x - penalty))[0] for x in od])
    np.testing.assert_allclose(concentrations(od, v, penalty), expected, atol=2e-3)


@pytest.mark.parametrize("method", ["vahadane", "macenko"])
def test_known_vectors_are_recovered(method):
    got = StainNormalizer(method).fit(SLIDE).stain_matrix_
    assert degrees_between(got, KNOWN).max() < 6
    assert np.array_equal(got, StainNormalizer(method).fit(SLIDE).stain_matrix_)


@pytest.mark.parametrize("keep_ink", [False, True])
@pytest.mark.parametrize("engine", FAST)
def test_sizes_that_are_no_multiple_of_the_block_give_the_same_pixels(engine, keep_ink):
    plan = paint_plan(OTHER, KNOWN, (1.1, .9), 240, 250)
    again = lambda image, **kw: repaint(image, plan, engine, keep_ink=keep_ink, **kw)
    image = SECOND.copy(); image[40:60, 40:60] = 60, 58, 60
    whole = again(image)
    for shape in ((1, 1), (1, 7), (3, 5), (13, 11)): assert np.array_equal(again(image[:shape[0], :shape[1]]), whole[:shape[0], :shape[1]])
    assert np.array_equal(again(image, pixels=4096), whole)
    assert np.array_equal(again(image[::2, ::2]), whole[::2, ::2])
    frozen = image.copy(); frozen.flags.writeable = False
    assert np.array_equal(again(frozen), whole)
    assert np.array_equal(again(image, out=image), whole)                              # onto itself


@pytest.mark.parametrize("engine", FAST)
def test_the_picture_given_is_never_changed(engine):
    image, zeros = SECOND.copy(), np.zeros((30, 30, 3), np.uint8)
    n = StainNormalizer(engine=engine, keep_ink=True).fit(SLIDE); n.transform(image); n.transform(zeros)
    assert np.array_equal(image, SECOND) and not zeros.any()


def test_lab_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    rgb = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    expected = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    np.testing.assert_allclose(rgb_to_lab(rgb), expected, atol=.6)                # OpenCV interpolates in a table


# glass and what else is no tissue

METHOD_ENGINES = [(m, e) for m in METHODS for e in (FAST if "reinhard" not in m else FAST[:1])]       # colour transfer has one engine


@pytest.mark.parametrize("method, engine", METHOD_ENGINES)
@pytest.mark.parametrize("glass", [(255, 255, 255), (243, 241, 244), (226, 205, 222)])
def test_glass_is_not_tinted(method, engine, glass):
    source, tissue = paint(OTHER, glass=np.array(glass), seed=5)
    n = StainNormalizer(method, engine=engine).fit(SLIDE)
    after = n.transform(source)
    assert n.report_["done"], n.report_["reason"]
    inside = ndimage.binary_erosion(~tissue, iterations=3)
    before, now = (im[inside].astype(float).mean(0) for im in (source, after))
    assert np.ptp(now) <= np.ptp(before) + 1 and now.min() >= before.min() - 1


BOXES = dict(pen=(slice(2, 14), slice(2, 40), (40, 60, 190)), green=(slice(2, 14), slice(160, 198), (30, 140, 60)), cut=(slice(180, 200), slice(0, 20), (0, 0, 0)),
    dot=(slice(186, 194), slice(186, 194), (60, 58, 60)), blood=(slice(95, 105), slice(95, 105), (215, 40, 50)))


def with_boxes(*args, **kw):
    "A painted slide with pen, a black cut-out, a printed dot and blood on it, and where its tissue is."
    image, tissue = paint(*args, **kw)
    for rows, cols, colour in BOXES.values(): image[rows, cols] = colour
    return image, tissue


@pytest.mark.parametrize("method, engine", METHOD_ENGINES + [("macenko", "staintools")])
def test_ink_keeps_its_colour_when_asked_and_tissue_does_not(method, engine, request):
    if engine == "staintools": request.getfixturevalue("theirs")
    image, tissue = with_boxes(OTHER, strength=(.8, 1.))
    kept, painted = (StainNormalizer(method, engine=engine, keep_ink=k).fit(SLIDE).transform(image) for k in (True, False))
    off = np.abs(kept.astype(int) - image).max(-1)
    for name, (rows, cols, _) in BOXES.items(): assert name == "blood" or off[rows, cols].max() <= 1, name
    tissue = tissue & (pixel_kinds(image) == 1)
    assert (kept != painted).any(-1)[tissue].mean() < .001 and np.median(off[tissue]) > 3


def test_ink_is_a_smooth_function_of_the_colour():
    share = ink_share(*DENSITY_OF_BYTE[ANY_COLOUR.transpose(2, 0, 1)])
    assert share.dtype == np.float32 and share.min() == 0 and share.max() == 1 and not share[(ANY_COLOUR > 171).all(-1)].any()
    line = np.linspace([120, 118, 122], [120, 60, 150], 60).round().astype(np.uint8)            # from grey to violet
    share = ink_share(*DENSITY_OF_BYTE[line.T])
    assert share[0] > .9 and share[-1] == 0 and np.abs(np.diff(share)).max() < .25


def test_mask_leaves_out_what_is_no_tissue():
    image, tissue = with_boxes(glass=np.array([243, 241, 244]))
    mask = tissue_mask(image)
    for name, (rows, cols, _) in BOXES.items(): assert not mask[rows, cols].any(), name
    tissue[95:105, 95:105] = False
    assert (mask & tissue).sum() / (mask | tissue).sum() > .95


def test_mask_of_a_large_picture_has_its_shape():
    big = np.tile(SLIDE, (4, 5, 1))[:-3, :-7]
    mask = tissue_mask(big)
    assert mask.shape == big.shape[:2] and mask.dtype == bool and .4 < mask.mean() < .7


# honest failure

RNG = np.random.default_rng(0)
HARD = dict(
    white=np.full((64, 64, 3), 255, np.uint8), black=np.zeros((64, 64, 3), np.uint8), one_colour=np.full((64, 64, 3), (180, 90, 150), np.uint8), one_pixel=SLIDE[100:101, 100:101],
    thin=SLIDE[:1], grey=SLIDE.mean(-1).round().astype(np.uint8), grey3=SLIDE.mean(-1, keepdims=True).round().astype(np.uint8).repeat(3, -1), only_h=paint(KNOWN[[0, 0]])[0], only_e=paint(KNOWN[[1, 1]])[0],
    dab=paint(np.array([[.65, .70, .29], [.27, .57, .78]]))[0], photo=RNG.integers(0, 256, (64, 64, 3), np.uint8), grass=(RNG.random((64, 64, 1)) * [90, 200, 60] + [10, 40, 5]).astype(np.uint8),
    faint=np.clip(255 - RNG.random((64, 64, 3)) * 10, 0, 255).astype(np.uint8), speck=np.where(np.hypot(*np.mgrid[-1:1:200j, -1:1:200j])[..., None] < .03, SLIDE, 255).astype(np.uint8))


@pytest.mark.parametrize("method, engine", METHOD_ENGINES)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.filterwarnings("error")
def test_hard_pictures_are_left_as_they_are_and_reported(name, method, engine):
    image, n = HARD[name], StainNormalizer(method, engine=engine).fit(SLIDE)
    assert np.array_equal(n.transform(image), image)
    assert n.report_["ok"] is False and n.report_["done"] is False and n.report_["reason"]
    text = json.dumps(plain(n.report_)); assert "NaN" not in text
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


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "rgba", "list"])
@pytest.mark.parametrize("engine", FAST)
def test_every_kind_of_picture(kind, engine):
    n = StainNormalizer(engine=engine).fit(SLIDE); expected = n.transform(SECOND)
    alpha = np.full((*SECOND.shape[:2], 1), 255, np.uint8)
    image = dict(uint8=SECOND, uint16=SECOND.astype(np.uint16) * 257, float32=(SECOND / 255).astype(np.float32), rgba=np.concatenate([SECOND, alpha], -1), list=SECOND.tolist())[kind]
    if kind == "list": image = np.asarray(image, np.uint8)
    got = n.transform(image)
    assert got.dtype == np.uint8 and got.shape == image.shape and np.array_equal(got[..., :3], expected)


@pytest.mark.parametrize("bad", ["slide.png", None, 3, np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8), np.full((4, 4, 3), 200.), np.full((4, 4, 3), np.nan),
    np.zeros((4, 4, 3), complex), np.zeros((4, 4, 3), np.int64), np.array([["a"]])], ids=repr)
def test_what_is_no_picture_is_refused(bad):
    n = StainNormalizer().fit(SLIDE)
    for call in (n.transform, StainNormalizer().fit, tissue_mask):
        with pytest.raises(BadInput) as e: call(bad)
        assert "\n" not in str(e.value)


# scikit-learn habits

@pytest.mark.parametrize("method", METHODS)
def test_parameters_pickling_and_json(tmp_path, method):
    n = StainNormalizer(method, engine="numpy", keep_ink=True, penalty=.02).fit(SLIDE); expected = n.transform(SECOND)
    assert n.get_params()["method"] == method and n.get_params()["keep_ink"] is True and StainNormalizer().set_params(**n.get_params()).get_params() == n.get_params()
    for again in (pickle.loads(pickle.dumps(n)), StainNormalizer.from_json(n.to_json()), StainNormalizer.from_json((n.to_json(tmp_path/"n.json"), tmp_path/"n.json")[1])):
        assert again.get_params() == n.get_params() and np.array_equal(again.transform(SECOND), expected)
    assert StainNormalizer(**n.get_params()).get_params() == n.get_params()
    for text in ("{", "[]", "{}"):
        with pytest.raises(BadInput): StainNormalizer.from_json(text if text != "[]" else str(tmp_path/"gone.json"))
    for kw in (dict(method="vahadan"), dict(engine="cupy")):
        with pytest.raises(BadInput, match="unknown"): StainNormalizer(**kw).fit(SLIDE)


# files

@pytest.fixture
def data(tmp_path):
    path = tmp_path/"data.h5"
    with h5py.File(path, "w") as f:
        f.attrs["um_per_px"] = 4.
        for name, image in dict(S_2=SECOND, S_1=SLIDE, S_10=HARD["white"]).items(): f.create_dataset(f"images/Train/{name}", data=image).attrs["patient"] = "A"
        f.create_dataset("images/Test/S_3", data=(paint(OTHER, seed=9)[0] / 255).astype(np.float32))
        f.create_dataset("spots/Train/S_1", data=np.rec.fromarrays([[1, 2], [3, 4], [.5, .6]], names="x,y,C1")).attrs["note"] = "kept"
        f["images"].attrs["scanner"] = "B"
    return path


def test_a_file_keeps_its_layout(data, tmp_path):
    reports = normalise_file(data, tmp_path/"out.h5", tile=64)
    n = StainNormalizer().fit(SLIDE)
    with h5py.File(data) as a, h5py.File(tmp_path/"out.h5") as b:
        assert list(slide_paths(b, spots=False)) == ["S_1", "S_2", "S_10", "S_3"]
        assert b.attrs["um_per_px"] == 4 and b["images"].attrs["scanner"] == "B" and b["spots/Train/S_1"].attrs["note"] == "kept"
        assert (b["spots/Train/S_1"][:] == a["spots/Train/S_1"][:]).all()
        assert np.array_equal(b["images/Train/S_2"][:], n.transform(SECOND))                    # one matrix, whatever the tiles
        assert np.array_equal(b["images/Train/S_1"][:], SLIDE) and np.array_equal(b["images/Train/S_10"][:], HARD["white"])
        d = b["images/Test/S_3"]
        assert d.dtype == np.uint8 and d.chunks == (200, 200, 3) and d.attrs["stain_ok"] and d.attrs["stain_matrix"].shape == (2, 3) and d.attrs["engine"] == n.engine_
        assert b["images/Train/S_2"].attrs["patient"] == "A" and not b["images/Train/S_10"].attrs["stain_ok"]
    assert reports["S_10"]["reason"].startswith("too little tissue") and reports["S_2"]["done"]


def test_none_copies(data, tmp_path):
    reports = normalise_file(data, tmp_path/"out.h5", "none")
    with h5py.File(tmp_path/"out.h5") as f: assert np.array_equal(f["images/Train/S_2"][:], SECOND) and f["images/Train/S_2"].attrs["stain_method"] == "none"
    assert not any(r["done"] for r in reports.values())


def test_a_reference_that_is_a_picture_or_saved(data, tmp_path):
    Image.fromarray(SLIDE).save(tmp_path/"ref.png"); StainNormalizer().fit(SLIDE).to_json(tmp_path/"ref.json")
    first = normalise_file(data, tmp_path/"a.h5", reference="S_1")
    for name in ("ref.png", "ref.json"):
        got = normalise_file(data, tmp_path/"b.h5", reference=tmp_path/name)
        np.testing.assert_allclose(got["S_2"]["stain_matrix"], first["S_2"]["stain_matrix"])
        with h5py.File(tmp_path/"a.h5") as a, h5py.File(tmp_path/"b.h5") as b: assert np.array_equal(a["images/Train/S_2"][:], b["images/Train/S_2"][:])


def test_bad_files_leave_earlier_results_alone(data, tmp_path):
    out = tmp_path/"out.h5"; out.write_text("earlier")
    (tmp_path/"text.h5").write_text("no HDF5")
    with h5py.File(tmp_path/"empty.h5", "w") as f: f.create_group("image")
    with h5py.File(tmp_path/"wrong.h5", "w") as f: f.create_dataset("images/Train/S_1", data=np.full((20, 20, 3), 200.))
    for path, words in ((tmp_path/"gone.h5", "does not exist"), (tmp_path/"text.h5", "not a readable HDF5"), (tmp_path/"empty.h5", "is it 'image'"), (tmp_path/"wrong.h5", "scale them to 0-1")):
        with pytest.raises(BadInput, match=words): normalise_file(path, out)
    with pytest.raises(BadInput, match="no reference slide 'S_9'"): normalise_file(data, out, reference="S_9")
    with pytest.raises(BadInput, match="did you mean 'macenko'"): normalise_file(data, out, "macenco")
    assert out.read_text() == "earlier" and not list(tmp_path.glob(".*tmp*"))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_picture_files(tmp_path, suffix):
    Image.fromarray(SECOND).save(tmp_path/"in.png"); Image.fromarray(SLIDE).save(tmp_path/"ref.png")
    report = stain_image_file(tmp_path/"in.png", tmp_path/"ref.png", tmp_path/f"out{suffix}")
    expected = StainNormalizer().fit(SLIDE).transform(SECOND)
    got = np.asarray(Image.open(tmp_path/f"out{suffix}")).astype(int)
    assert report["done"] and np.abs(got - expected).mean() < (0.01 if suffix != ".jpg" else 3)


def test_picture_files_that_are_none(tmp_path):
    (tmp_path/"in.png").write_text("no picture"); Image.fromarray(SLIDE).save(tmp_path/"ref.png")
    for a, b, c, words in (("in.png", "ref.png", "o.png", "cannot be read as a picture"), ("gone.png", "ref.png", "o.png", "does not exist"), ("ref.png", "in.png", "o.png", "cannot be read"),
            ("ref.png", "ref.png", "o.bmp", "format of the result")):
        with pytest.raises(BadInput, match=words): stain_image_file(tmp_path/a, tmp_path/b, tmp_path/c)
    for mode in ("L", "P", "RGBA", "1", "CMYK", "I;16"):
        im = Image.fromarray(SLIDE).convert("L").convert("I").convert("I;16") if mode == "I;16" else Image.fromarray(SLIDE).convert(mode)
        name = "m.tif" if mode in ("CMYK", "I;16") else "m.png"
        im.save(tmp_path/name); stain_image_file(tmp_path/name, tmp_path/"ref.png", tmp_path/"o.png")


# augmentation

@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_keeps_type_and_glass(dtype):
    torch.manual_seed(0)
    batch = torch.from_numpy(np.stack([SLIDE, SECOND]).transpose(0, 3, 1, 2).copy())
    batch = batch if dtype == torch.uint8 else batch.float() / 255
    reports = [measure(SLIDE), measure(SECOND)]
    for augment in (StainJitter(KNOWN), RandomReference(reports, reports[0])):
        out = augment(batch)
        assert out.dtype == dtype and out.shape == batch.shape and not torch.equal(out, batch)
        assert torch.equal(out[..., 0, 0], batch[..., 0, 0])
    assert torch.allclose(StainJitter(KNOWN, 0, 0)(batch).float(), batch.float(), atol=1e-5)
    with pytest.raises(BadInput, match="no slide has a usable stain"): RandomReference([dict(ok=False)], reports[0])


def test_batch_concentrations_are_the_closed_form():
    x = torch.from_numpy(SLIDE.transpose(2, 0, 1)[None].copy()).float() / 255
    got = batch_concentrations(x, KNOWN)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(got, concentrations(rgb_to_od(SLIDE), KNOWN), atol=1e-4)

"""Registration: exact where there is evidence, silent where there is none, and never a crash or a NaN."""
import json

import numpy as np
import pytest

from histokit.spots import demo, painting
from histokit.spots.painting import geometry
from histokit.core.text import BadInput
from histokit.spots.painting import fiducials, visium_lattice, stamp
from histokit.spots.demo import make_slide
from histokit.spots.register import Registration, register, show_registration
from histokit.spots.frame import fit_lattice


def moved(true, scale, shift): return np.round((true - shift)/scale)


def error(r, given, slide, true=None): return float(np.hypot(*(r.apply(given) - (slide.xy
    if true is None else true)).T).mean()*slide.geo.um/100)


def sane(r):
    "Finite numbers, the identity unless confident, and evidence that a JSON file can hold."
    assert np.isfinite([r.scale, r.dx, r.dy]).all() and r.evidence["reasons"] and (r.confident or r.identity)
    json.dumps(r.to_dict(), allow_nan=False)
    return r


@pytest.fixture(scope="module")
def slide(): return make_slide(5, 900, 4.5, .3)


@pytest.fixture(scope="module")
def given(slide): return moved(slide.xy, .94, [40, -60])


def unframed(seed, size, um, coverage, monkeypatch):
    "A slide whose frame was never printed."
    monkeypatch.setattr(demo, "fiducials", lambda geo: np.array([[-999., -999.]]))
    return make_slide(seed, size, um, coverage)


def printed(slide, places, radius, rng):
    "The slide with dots printed at (n, 2) places."
    full = np.full(len(places), radius)
    return np.clip(slide.image*np.exp(-stamp(slide.image.shape[:2], *places.T, full, full, 0*full,
        rng.uniform(.6, 1.3, len(places))))[..., None], 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size, um, coverage, scale, shift",
    [(512, 5, .5, .9, (80, -80)), (800, 4, .15, 1.05, (-80, 80)), (1000, 6, .9, .97, (13, 71)),
    (700, 8, .25, .931, (0, 0)),
    (1100, 5, .07, .9, (-80, -80))])
def test_exact(size, um, coverage, scale, shift):
    s = make_slide(size, size, um, coverage)
    given = moved(s.xy, scale, shift)
    r = sane(register(s.image, given))
    assert r.confident and error(r, given,
        s) < .05 and abs(r.scale/scale - 1) < 3e-3 and r.evidence["method"] == "frame"
    assert r.evidence["array"] == [s.geo.cols, s.geo.rows] and abs(r.evidence["um_per_px"]/s.geo.um - 1) < 1e-3


def test_stated_error_is_honest(slide):
    off = []
    for i in range(6):
        rng = np.random.default_rng(i)
        scale, shift = rng.uniform(.9, 1.05), rng.uniform(-80, 80, 2)
        r = register(slide.image, moved(slide.xy, scale, shift))
        off_px = np.hypot(*(r.apply((slide.xy - shift)/scale) - slide.xy).T).mean()
        off.append(off_px/r.evidence["standard_errors"]["position_px"])
    assert np.median(off) < 3


def test_identity_stays_identity(slide):
    r = sane(register(slide.image, slide.xy.round()))
    assert r.confident and r.identity and np.array_equal(r.apply(slide.xy), slide.xy)


def test_targets_are_heard(slide, given):
    values = np.log(slide.latents.clip(1e-3))
    content = register(slide.image, given, values).evidence["content"]
    assert content["after"] > content["before"] + 3*content["error"]
    # noise has no veto
    assert register(slide.image, given, np.random.default_rng(0).random((len(given), 5))).confident
    assert register(slide.image, given, np.full((len(given), 2), np.nan)).evidence["content"] == {}


@pytest.mark.parametrize("turn", ["mirrored", "upside down", "exchanged"])
def test_pictures_the_other_way_round(slide, turn):
    h, w = slide.image.shape[:2]
    image, xy = {"mirrored": (slide.image[:, ::-1], [w - 1, 0] + slide.xy*[-1, 1]),
        "upside down": (slide.image[::-1, ::-1], [w - 1, h - 1] - slide.xy),
        "exchanged": (slide.image.transpose(1, 0, 2), slide.xy[:, ::-1])}[turn]
    given = moved(xy, .96, [20, 50])
    r = sane(register(np.ascontiguousarray(image), given))
    assert r.confident and error(r, given, slide, xy) < .05
    corners = np.array(r.evidence["frame"]["corners"])[:4]
    assert np.abs(corners.mean(0) - np.array(image.shape[1::-1])/2).max() < 60


@pytest.mark.parametrize("radius, distance", [(45, 130), (35, 145), (45, 100)])
def test_frames_printed_otherwise(radius, distance, monkeypatch):
    "The real frame's proportions suffice: larger dots at another distance, a fifth of them lost, no corner figures."
    s = unframed([3, radius], 1000, 8., .2, monkeypatch)
    fx, fy = s.geo.frame
    assert (s.geo.cols, s.geo.rows) == (64, 78)
    rng = np.random.default_rng(0)
    x, y = (np.linspace(-f/2, f/2, round(f/distance) + 1) for f in (fx, fy))
    um = np.concatenate([np.stack([x, 0*x + v], 1) for v in (-fy/2, fy/2)]
        + [np.stack([0*y + v, y], 1)[1:-1] for v in (-fx/2, fx/2)])
    image = printed(s, s.geo.to_px(um[rng.random(len(um)) < .8]), radius/s.geo.um, rng)
    given = moved(s.xy, .95, [-30, 22])
    r = sane(register(image, given))
    assert r.confident and error(r, given, s) < .06


def test_rows_at_the_exact_hexagonal_distance(monkeypatch):
    "The same frame, with rows 86.6 and not 87 µm apart, as the given spots tell."
    monkeypatch.setattr(painting, "VISIUM_ROW_UM", 75**.5*10)
    monkeypatch.setattr(painting, "VISIUM_MARGIN_UM", np.array([537.5, (7540 - 77*75**.5*10)/2]))
    s = make_slide(4, 2000, 4., .3)
    given = moved(s.xy, .93, [9, -40])
    r = sane(register(s.image, given))
    assert r.confident and error(r, given, s) < .03


def test_abstains_without_frame(monkeypatch):
    for seed, coverage in enumerate((.07, .3, .6)):
        s = unframed([8, seed], 900, 4.5, coverage, monkeypatch)
        for xy in (s.xy.round(), moved(s.xy, .95, [40, 10])): assert not sane(register(s.image, xy)).confident


def test_abstains_where_picture_and_spots_do_not_belong_together(slide, given):
    other = make_slide(6, 900, 4.5, .3)
    for image in (other.image, slide.image[:, ::-1], slide.image[::-1],
        slide.image[::-1, ::-1]): assert not sane(register(np.ascontiguousarray(image), given)).confident


def test_abstains_on_little(slide, given):
    rng = np.random.default_rng(0)
    for xy in (given[:0], given[:1], given[:2], given[:3], given[:6], np.repeat(given[:1], 50, 0), given[:, :1]*[1, 0],
        rng.random((200, 2))*800, given*1e4, given*1e-3, -given):
        assert not sane(register(slide.image, xy)).confident
    for image in (np.full((900, 900, 3), 255, np.uint8), np.zeros((900, 900, 3), np.uint8),
        rng.integers(0, 256, (700, 800, 3)).astype(np.uint8), np.full((5, 7, 3), 9, np.uint8),
            np.zeros((1, 1, 3), np.uint8), np.tile(slide.image[:300, :300],
            (3, 3, 1))): assert not sane(register(image, given)).confident


def test_rows_of_dots_are_not_always_a_frame(slide, given, monkeypatch):
    "A rectangle of a size that no array has is seen and not believed."
    s = unframed(5, 900, 4.5, .3, monkeypatch)
    x, y = np.arange(120, 800, 22.), np.arange(100, 700, 22.)
    dots = np.concatenate([np.stack([x, 0*x + v], 1) for v in (100., 694.)]
        + [np.stack([0*y + v, y], 1) for v in (120., 780.)])
    assert not sane(register(printed(s, dots, 6., np.random.default_rng(0)), moved(s.xy, .94, [40, -60]))).confident


def test_modes(slide, given):
    assert register(slide.image, given, mode="off").identity
    r = register(slide.image, given, mode="0.9, 1, -2")
    assert (r.scale, r.dx, r.dy, r.confident) == (.9, 1., -2., True)
    for mode in ("on", "1", "1,2", "nan,0,0", "-1,0,0", "a,b,c", None, 3):
        with pytest.raises(BadInput, match="use auto, off, or scale,dx,dy"): register(slide.image, given, mode=mode)
    for image, xy in ((slide.image[..., :2], given), (slide.image.astype(float), given), (slide.image, given.ravel()),
        (slide.image, given + np.nan), (None, given)):
        with pytest.raises(BadInput): register(image, xy)


def test_inputs_are_left_alone(slide, given):
    image, xy = slide.image.copy(), given.copy()
    a, b = register(image, xy), register(image, xy)
    assert np.array_equal(image, slide.image) and np.array_equal(xy, given) and a.to_dict() == b.to_dict()
    assert show_registration(image, xy, a) and show_registration(image, xy, Registration.none())


def test_lattice_of_every_demo_array():
    for size, um in ((480, 5.), (900, 4.), (2000, 4.)):
        geo = geometry(np.random.default_rng(size), size, um)
        xy = visium_lattice(geo).round()
        found = fit_lattice(np.random.default_rng(0).permutation(xy))
        assert found.kind == "hex" and found.rms < .5
        assert abs(found.pitch*geo.um/100 - 1) < 2e-3 and abs(found.angle - geo.angle) < 2e-3
        assert len(np.unique(found.index, axis=0)) == len(xy) and len(fiducials(geo)) > 40


@pytest.mark.slow
def test_many():
    "Slides of all kinds and full size: never surely wrong, seldom silent."
    silent = 0
    for i in range(24):
        rng = np.random.default_rng([1, i])
        s = make_slide([1, i], int(rng.integers(480, 2001)), float(rng.choice([4., 5., 7.])),
            float(rng.choice([.05, .15, .45, .95])))
        given = moved(s.xy, rng.uniform(.9, 1.05), rng.uniform(-80, 80, 2))
        r = sane(register(s.image, given))
        silent += not r.confident
        assert not r.confident or error(r, given, s) < .1, i
    assert silent <= 4

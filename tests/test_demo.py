"The demo's file keeps the competition's layout, says the truth about itself, and its pictures matter."
import multiprocessing as mp
import os

import h5py
import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from scipy.stats import rankdata

from histokit.spots.demo import _FACTS, demo_paths, make_demo, make_slide, show, smoke_demo
from histokit.spots.painting import draw_stain, fiducials, visium_lattice
from histokit.core.text import BadInput
from histokit.core.files import read_json

matplotlib.use("Agg")
C = [f"C{j + 1}" for j in range(35)]
SMALL = dict(n_train=2, n_test=1, size=480, um_per_px=5.)


def read(path):
    "Images and spots, slide by slide, training first."
    with h5py.File(path) as f:
        return [{n: f[k][s][n][:] for s in ("Train", "Test") for n in f[k][s]} for k in ("images", "spots")]


def table(records):
    return np.stack([records[c] for c in C], 1)


def score(predicted, true):
    a, b = (rankdata(np.broadcast_to(v, true.shape), axis=1) - (true.shape[1] + 1)/2 for v in (predicted, true))
    return ((a*b).sum(1)/np.sqrt((a**2).sum(1)*(b**2).sum(1))).mean()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo")/"a.h5", **SMALL)


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    made = make_demo(tmp_path_factory.mktemp("demo")/"demo.h5")
    images, spots = read(made.path)
    truth = pd.read_csv(made.truth)[C].to_numpy()
    return made, images, spots, {n: table(r) if "C1" in r.dtype.names else truth for n, r in spots.items()}


def test_layout(small):
    with h5py.File(small.path) as f:
        assert sorted(f) == ["images", "spots"] and sorted(f["images"]) == sorted(f["spots"]) == ["Test", "Train"]
        assert list(f["images/Train"]) == list(f["spots/Train"]) == ["S_1", "S_2"]
        assert list(f["images/Test"]) == list(f["spots/Test"]) == ["S_3"]
        assert not f.attrs and not any(o.attrs for k in ("images", "spots") for s in f[k] for o in f[k][s].values())
        image, train, test = f["images/Train/S_1"], f["spots/Train/S_1"], f["spots/Test/S_3"]
        assert image.dtype == np.float32 and image.shape[2] == 3 and max(image.shape) == 480
        assert 0 <= image[:].min() and .8 < image[:].max() <= 1
        assert train.dtype.names == ("x", "y", *C) and test.dtype.names == ("x", "y", "Test_Set")
        assert train.dtype["x"] == train.dtype["y"] == np.int64 and all(train.dtype[c] == np.float64 for c in C)


def test_spots_lie_on_the_picture_and_on_tissue(small):
    images, spots = read(small.path)
    for name, image in images.items():
        x, y = spots[name]["x"], spots[name]["y"]
        assert len(set(zip(x, y))) == len(x) and x.min() >= 0 and y.min() >= 0
        assert x.max() < image.shape[1] and y.max() < image.shape[0]
        brightness = ndimage.uniform_filter(image.mean(2), 11)
        assert np.mean(brightness[y, x] < .97*np.median(brightness[:20])) > .9
        assert (np.diff(y) < 0).mean() > .3                                   # barcode order, not row by row


def test_truth_is_a_submission(small):
    truth, expected = pd.read_csv(small.truth), pd.read_csv(small.expected)
    n = len(read(small.path)[1]["S_3"])
    for t in (truth, expected):
        assert list(t) == ["ID", *C] and t.ID.tolist() == list(range(n)) and (t[C] > 0).all(axis=None)
    assert score(expected[C].to_numpy(), truth[C].to_numpy()) > .8


def test_ids_run_through_all_test_slides(tmp_path):
    made = make_demo(tmp_path/"two.h5", n_train=1, n_test=2, size=480, um_per_px=5.)
    spots = read(made.path)[1]
    assert len(pd.read_csv(made.truth)) == len(spots["S_2"]) + len(spots["S_3"])


def test_a_seed_writes_the_same_bytes(small, tmp_path):
    again, other = make_demo(tmp_path/"b.h5", **SMALL), make_demo(tmp_path/"c.h5", **SMALL, seed=1)
    assert again.path.read_bytes() == small.path.read_bytes()
    for a, b in zip(again[1:], small[1:]):
        assert a.read_bytes() == b.read_bytes()
    assert read(other.path)[0]["S_1"].tobytes() != read(small.path)[0]["S_1"].tobytes()


@pytest.mark.parametrize("dtype,top", [("uint8", 255), ("uint16", 65535), ("float64", 1)])
def test_dtypes_hold_the_same_picture(small, tmp_path, dtype, top):
    path = make_demo(tmp_path/"d.h5", **SMALL, dtype=dtype).path
    show(path).savefig(tmp_path/"d.png")
    image = read(path)[0]["S_2"]
    assert image.dtype == dtype and np.allclose(image/top, read(small.path)[0]["S_2"], atol=1e-6)


def test_coordinate_scale(small, tmp_path):
    made = make_demo(tmp_path/"e.h5", **SMALL, coord_scale="competition", coord_shift=[(9, -4), (0, 0), (-20, 3)])
    slides, spots, plain = read_json(made.slides), pd.read_parquet(made.spots), pd.read_parquet(small.spots)
    assert [s["coord_scale"] for s in slides] == [.950, .931, .989]
    for s in slides:
        t = spots[spots.slide == s["name"]]
        given = read(made.path)[1][s["name"]]
        assert (t.x == given["x"]).all() and (t.y == given["y"]).all()
        for k, d in zip("xy", s["coord_shift"]):
            assert np.abs(s["coord_scale"]*t[k] + d - t[f"{k}_true"]).max() < .51
    assert np.allclose(spots.x_true, plain.x_true) and np.abs(plain.x - plain.x_true).max() <= .5
    assert made.truth.read_bytes() == small.truth.read_bytes()


def test_full_size_has_the_real_geometry():
    slide = make_slide(0, size=2000)
    g, dots = slide.geo, fiducials(slide.geo)
    assert g.span.tolist() == [6350, 6699] and g.frame.tolist() == [7425, 7540]
    assert abs(len(slide.xy) - .44*4992) < .05*4992 and slide.image.shape == (g.height, g.width,
        3) and slide.image.dtype == np.uint8
    assert dots.min() > 8 and (dots.max(0) < [g.width - 8, g.height - 8]).all()
    x, y = np.round(dots).astype(int).T
    assert np.median(slide.image[y, x].mean(1)) < 100                          # the dots are where they are said to be
    nodes = visium_lattice(g)
    assert np.abs((nodes.max(0) + nodes.min(0))/2 - (dots.max(0) + dots.min(0))/2).max() < 8


def test_heavy_tails_and_known_marginals(default):
    _, _, _, Y = default
    v = np.concatenate(list(Y.values()))
    assert 6e-10 < v.min() and v.max() < 29.5 and v.max() > 10 and v.min() < 1e-6
    assert np.abs(np.log10(np.median(v, 0)/_FACTS[:, 2])).max() < .5
    assert np.median(v.mean(0)/np.median(v, 0)) > 3
    assert np.corrcoef(rankdata(v, axis=1).mean(0), _FACTS[:, 5])[0, 1] > .95


def features(image, xy):
    od = -np.log(np.clip(image/np.quantile(image, .98, axis=(0, 1)), 1/255, 1))
    od = od/od[od.mean(2) > .15].mean(0)
    maps = [*od.transpose(2, 0, 1), *(od**2).transpose(2, 0, 1), (od[..., 0] > 1.6)*1.,
        np.abs(ndimage.sobel(od.mean(2)))]
    return np.stack([ndimage.uniform_filter(m, w)[xy[1], xy[0]] for m in maps for w in (25, 49)], 1)


def ridge(X, Y, fold):
    train = [n for n in Y if n != fold]
    A, B = np.concatenate([X[n] for n in train]), np.concatenate([rankdata(Y[n], axis=1) for n in train])
    m, s = A.mean(0), A.std(0)
    A = (A - m)/s
    return (X[fold] - m)/s @ np.linalg.solve(A.T @ A + 30*np.eye(A.shape[1]), A.T @ (B - B.mean(0))) + B.mean(0)


def test_the_picture_matters_and_a_shuffled_one_does_not(default):
    _, images, spots, Y = default
    X = {n: features(images[n], (r["x"], r["y"])) for n, r in spots.items()}
    rng = np.random.default_rng(0)
    mixed = {n: rng.permutation(v) for n, v in X.items()}
    constant = np.mean([score(rankdata(np.concatenate([Y[k] for k in Y if k != n]), axis=1).mean(0), Y[n]) for n in Y])
    picture, shuffled = (np.mean([score(ridge(x, Y, n), Y[n]) for n in Y]) for x in (X, mixed))
    assert .5 < constant < .72 and picture > constant + .05 and shuffled < constant + .01


def test_every_slide_has_its_own_stain(default):
    m = np.array([s["stain_matrix"] for s in read_json(default[0].slides)])
    assert np.allclose(np.linalg.norm(m, axis=-1), 1) and m.std(0).max() > .01
    same = [draw_stain(np.random.default_rng(i), 0).matrix for i in range(2)]
    assert np.array_equal(*same)


@pytest.mark.parametrize("bad",
    [dict(dtype="int8"), dict(coord_scale="nonsense"), dict(coord_scale=[1, 2]), dict(coord_scale=-1),
    dict(coord_shift=3),
    dict(size=200), dict(n_train=0, n_test=0)])
def test_bad_arguments_write_nothing(tmp_path, bad):
    with pytest.raises(BadInput) as error:
        make_demo(tmp_path/"x.h5", **{**SMALL, **bad})
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def _smoke(cache):
    os.environ["HISTOKIT_CACHE"] = str(cache)
    return smoke_demo()


def test_smoke_demo_is_made_once_and_by_two_at_once(tmp_path):
    with mp.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_smoke, [tmp_path]*2, chunksize=1)
    assert first == second and all(p.exists() for p in demo_paths(first)) and not list(tmp_path.rglob(".*"))
    images, spots = read(first)
    assert len(images) == 4 and all(20 < len(r) < 250 for r in spots.values())

"""Patches: positions, borders, engines, windows and batches, against plain references."""
import importlib.util
import math
import pickle

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import map_coordinates

from histokit.core.text import BadInput
from histokit.spots.cache import SlideCache
from histokit.spots.patches import cut_patch, mirror
from histokit.spots.sampling import Atlas, aim, colour_mix, fold, halve, pack_rgb, sample_torch, unpack_rgb
from histokit.spots.patches import Augmentation, PatchDataset, PatchSampler
from histokit.learn.trainer import Trainer
from histokit.learn.views import dihedral

ENGINES = ["numpy", pytest.param("numba", marks=pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed"))]
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (90, 131, 3), dtype=np.uint8)
SLIDES = {"a": NOISE, "b": np.ascontiguousarray(NOISE[:40, :50][::-1])}


def drawn(n, seed=0, **kw): return Augmentation(**(dict(scale=(.5, 2.), shift_px=9) | kw)).draw(n, seed)


def places(n, beyond=0, seed=1):
    "Spots on both slides, as far as asked beyond their borders."
    rng = np.random.default_rng(seed)
    name = np.array(list(SLIDES))[rng.integers(2, size=n)]
    size = np.array([SLIDES[s].shape[1::-1] for s in name])
    return name, rng.random((n, 2)) * (size - 1 + 2 * beyond) - beyond


def slow_patch(slide, x, y, side, out_px, angle=0., scale=1., flip=False, shift=(0, 0)):
    "Every pixel by itself: where it lies, mirrored at the border, and the mean of four neighbours."
    out, c, s = np.empty((3, out_px, out_px)), math.cos(math.radians(angle)), math.sin(math.radians(angle))
    for i in range(out_px):
        for j in range(out_px):
            dx, dy = ((k - (out_px - 1) / 2) * side * scale / out_px for k in (j, i))
            px, py = x + shift[0] + (-1 if flip else 1) * (c * dx - s * dy), y + shift[1] + s * dx + c * dy
            for channel in range(3): out[channel, i, j] = 0
            x0, y0 = math.floor(px), math.floor(py)
            for qx, wx in ((x0, 1 - px + x0), (x0 + 1, px - x0)):
                for qy, wy in ((y0, 1 - py + y0), (y0 + 1, py - y0)):
                    out[:, i, j] += wx * wy * slide[mirror(np.array(qy), slide.shape[0]), mirror(np.array(qx), slide.shape[1])]
    return out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beyond", [0, 60])
def test_against_a_plain_loop(engine, beyond):
    "Any angle, scale, flip and shift, inside and far beyond the border, on noise: within the rounding of weights to 1/256."
    name, xy = places(30, beyond)
    what = Augmentation(scale=(.4, .99), shift_px=5, colour=0, stain=0).draw(30, 3)
    got = PatchSampler(SLIDES, (17,), 17, whole=False, engine=engine).sample(name, xy, **what)[:, 0].numpy()
    for i in range(30):
        want = slow_patch(SLIDES[name[i]], *xy[i], 17, 17, what["angle"][i], what["scale"][i], what["flip"][i], what["shift"][i])
        assert abs(got[i] - want).max() < 2.6 and abs(got[i] - want).mean() < .5


@pytest.mark.parametrize("engine", ENGINES)
def test_ramp_tells_the_position(engine):
    "On a linear ramp each patch's pixels say where they were taken."
    ramp = np.zeros((250, 250, 3), np.uint8); ramp[..., 0] = np.arange(250); ramp[..., 1] = np.arange(250)[:, None]
    xy = RNG.uniform(60, 190, (50, 2)); what = Augmentation(scale=(.5, 1.9), colour=0, stain=0).draw(50, 1)
    got = PatchSampler({"r": ramp}, (40,), 64, whole=False, engine=engine).sample(["r"] * 50, xy, **what)[:, 0, :2].numpy()
    assert abs(got.mean((2, 3)) - xy).max() < .03
    t = (np.arange(64) - 31.5) * 40 / 64
    for i in range(50):
        c, s, z = math.cos(math.radians(what["angle"][i])), math.sin(math.radians(what["angle"][i])), what["scale"][i]
        x = xy[i, 0] + (-1 if what["flip"][i] else 1) * z * (c * t[None] - s * t[:, None]); y = xy[i, 1] + z * (s * t[None] + c * t[:, None])
        assert abs(got[i] - np.stack([x, y])).max() < .6                   # half a grey level is half a pixel: the rounding


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 150])
def test_identity_is_cut_patch_and_dihedral(engine, size):
    name, xy = places(24)
    sampler = PatchSampler(SLIDES, (size,), engine=engine)
    cut = torch.from_numpy(np.stack([cut_patch(SLIDES, n, *p, size) for n, p in zip(name, xy)])).permute(0, 3, 1, 2)
    for k in range(8): assert torch.equal(sampler.sample(name, xy, angle=90 * (k % 4), flip=k >= 4)[:, 0], dihedral(cut, k))


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree(engine):
    name, xy = places(40, 30)
    sampler = PatchSampler(SLIDES, (9, 40, 200), 24, whole=False, engine=engine)
    for what in (drawn(40, colour=0, stain=0), drawn(40, colour=.1, stain=.3)):
        got = sampler.sample(name, xy, **what)
        want = sample_torch(sampler.device_atlas(sampler.plan(name, xy, **what)), sampler.atlas, sampler.plan(name, xy, **what)).view_as(got)
        off = (got.int() - want.int()).abs()
        assert off.max() <= (0 if what["mix"] is None else 1) and off.float().mean() < .01


@pytest.mark.parametrize("engine", ENGINES)
def test_colour_is_optical_density(engine):
    "Against the formula in float64; glass stays white, and the identity changes nothing."
    mix = colour_mix(RNG.uniform(.7, 1.3, (1, 3)), RNG.uniform(.6, 1.4, (1, 2)))
    sampler = PatchSampler({"a": NOISE}, (80,), engine=engine)
    plain, got = (sampler.sample(["a"], [[60, 45]], mix=m)[0, 0].numpy().astype(float) for m in (None, mix))
    od = -np.log((plain + .5) / 255.5)
    want = np.minimum(255.5 * np.exp(-np.einsum("cd,dij->cij", mix[0].astype(float), od)), 255)
    assert abs(got - np.floor(want)).max() <= 1 and (got != np.floor(want)).mean() < .01
    same = sampler.sample(["a"], [[60, 45]], mix=colour_mix(np.ones((1, 3)), np.ones((1, 2))))[0, 0].numpy()
    assert abs(same - plain).max() <= 1
    white = PatchSampler({"w": np.full((50, 50, 3), 255, np.uint8)}, (20,), engine=engine)
    assert (white.sample(["w"], [[25, 25]], mix=mix) == 255).all()


def test_levels_are_means_and_borders_fold():
    atlas = Atlas(SLIDES)
    pixels = NOISE.astype(int)
    assert np.array_equal(unpack_rgb(atlas.level(0, 1))[:45, :65], (pixels[:90, :130].reshape(45, 2, 65, 2, 3).sum((1, 3)) + 2) // 4)
    assert np.array_equal(atlas.level(1, 0), pack_rgb(SLIDES["b"])) and halve(np.zeros((1, 1), np.uint32)).shape == (1, 1)
    for n in (1, 2, 3, 10):
        at = np.arange(-100, 100, dtype=np.int32) * 256; fold(at, n, n, 0)
        assert np.array_equal(at // 256, mirror(np.arange(-100, 100), n))
    one = PatchSampler({"dot": np.full((1, 1, 3), 7, np.uint8)}, (5,))
    assert (one.sample(["dot"], [[0, 0]], angle=30.) == 7).all()
    assert all(v.dtype == np.int32 for v in aim(np.zeros((1, 2)), np.ones(1), np.zeros(1), np.zeros(1, bool), np.zeros(1, int), 4))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("patches")/"d.h5"
    with h5py.File(path, "w") as h:
        for i, (slide, kw) in enumerate([(NOISE, dict(chunks=(16, 16, 3), compression="gzip")), ((NOISE[::-1] / 255).astype(np.float32), {}), (NOISE[:, ::-1], dict(chunks=(90, 1, 3)))]):
            h.create_dataset(f"images/Train/S_{i}", data=slide, **kw)
            xy = np.random.default_rng(i).integers(0, 90, (30, 2))
            h[f"spots/Train/S_{i}"] = np.rec.fromarrays([xy[:, 0], xy[:, 1], np.random.default_rng(9 + i).random(30)], names="x,y,C1")
    return path


def test_tiles_are_the_slide_within_the_budget(file):
    whole, tiles = SlideCache(file), SlideCache(file, 60_000, tile_px=32)
    for name in whole:
        assert tiles.shape(name) == whole[name].shape
        for _ in range(60):
            (a, b), (c, d) = np.sort(RNG.integers(0, 91, 2)), np.sort(RNG.integers(0, 132, 2))
            assert np.array_equal(tiles.crop(name, slice(a, b), slice(c, d)), whole[name][a:b, c:d])
            assert tiles.n_bytes <= tiles.max_bytes and tiles._memory().block.nbytes <= tiles.max_bytes
        assert np.array_equal(tiles[name], whole[name])
    assert tiles.hits and tiles.misses
    with pytest.raises(BadInput, match="did you mean 'S_1'"): tiles.crop("s_1", slice(0, 1), slice(0, 1))
    with pytest.raises(BadInput, match="raise max_bytes"): SlideCache(file, 100)
    assert pickle.loads(pickle.dumps(tiles)).crop("S_0", slice(3, 9), slice(4, 8)).shape == (6, 4, 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_windows_give_the_same_bytes(file, engine):
    slides = {n: SlideCache(file)[n] for n in SlideCache(file)}
    name = np.repeat(list(slides), 20); xy = RNG.uniform(-20, 110, (60, 2)); what = drawn(60)
    kw = dict(sizes=(20, 70, 160), out_px=20, whole=False, engine=engine)
    memory = PatchSampler(slides, **kw).sample(name, xy, **what)
    for other in (PatchSampler(SlideCache(file, 60_000, 32), **kw), PatchSampler(slides, max_bytes=0, **kw)):
        assert not other.resident and torch.equal(other.sample(name, xy, **what), memory)


def table(n=45):
    name, xy = places(n)
    return pd.DataFrame(dict(slide=name, x=xy[:, 0], y=xy[:, 1]))


def test_a_batch_does_not_depend_on_how_it_is_cut():
    spots = table(); target = np.arange(45.)[:, None]
    data = PatchDataset(spots, PatchSampler(SLIDES, dict(spot=14, region=60), 16), target, augment=Augmentation(shift_px=3))
    def epoch(size, seed, workers=0):
        parts = list(data.batches(size, True, seed, workers))
        return torch.cat([torch.cat([x["spot"], x["region"]], 1) for x, _ in parts]), torch.cat([t for _, t in parts])
    pictures, order = epoch(45, 5)
    for size, workers in ((7, 0), (10, 0), (16, 2)):
        again, same = epoch(size, 5, workers)
        assert torch.equal(pictures, again) and torch.equal(order, same)
    assert sorted(order[:, 0].tolist()) == list(range(45)) and not torch.equal(epoch(45, 6)[1], order)
    assert len(epoch(11, 5)[0]) == 44 and len(data.batches(11, True, 5)) == 4            # a lone last row is left out
    item = data.epoch(5)[int(order[3, 0])]
    assert torch.equal(item[0]["spot"], pictures[3, :3]) and item[1].item() == order[3, 0]
    one, two = (PatchSampler(SLIDES, (30,), 16, threads=t).sample(spots.slide, spots[["x", "y"]], **drawn(45)) for t in (1, 3))
    assert torch.equal(one, two)


def test_trains_with_the_trainer():
    "As items of a plain dataset the batches already fit the trainer."
    class Net(torch.nn.Module):
        def __init__(self): super().__init__(); self.head = torch.nn.Linear(3, 1)
        def forward(self, image, coords): return self.head(image.float().mean((2, 3)) / 255)
    data = PatchDataset(table(), PatchSampler(SLIDES, (20,), 12), np.random.default_rng(0).random((45, 1)), augment=Augmentation())
    history = Trainer(Net(), torch.nn.functional.mse_loss, lambda p, t: -float(((p - t) ** 2).mean()), epochs=2, batch_size=16, device="cpu").fit(data, data)
    assert np.isfinite(history.metric).all()


@pytest.mark.parametrize("make, says", [
    (lambda: PatchSampler(SLIDES, (10, 20)), "give out_px"),
    (lambda: PatchSampler(SLIDES, (10,), unit="mm"), "unknown unit"),
    (lambda: PatchSampler(SLIDES, (10,), unit="spot"), "need spot_px"),
    (lambda: PatchSampler(SLIDES, (100,), unit="um", um_per_px=dict(a=1., b=float("nan"))), "has no size in pixels on b"),
    (lambda: PatchSampler(SLIDES, (10,), engine="nunba"), "did you mean 'numba'"),
    (lambda: PatchDataset(table().assign(slide="A"), PatchSampler(SLIDES, (10,))), "unknown slide"),
    (lambda: PatchDataset(table(), PatchSampler(SLIDES, (10,)), np.zeros((3, 1))), "45 spots but 3 rows"),
])
def test_bad_input_is_one_line(make, says):
    with pytest.raises(BadInput, match=says) as e: make()
    assert "\n" not in str(e.value)


def test_against_scipy_at_full_size():
    "400 px with rotation, as scipy would sample it."
    slide = RNG.integers(0, 256, (700, 700, 3), dtype=np.uint8)
    got = PatchSampler({"a": slide}, (400,), whole=False).sample(["a"], [[351.25, 347.5]], angle=33.)[0, 0].numpy()
    t = np.arange(400) - 199.5; c, s = math.cos(math.radians(33)), math.sin(math.radians(33))
    want = np.stack([map_coordinates(slide[..., k].astype(float), [347.5 + s * t[None] + c * t[:, None], 351.25 + c * t[None] - s * t[:, None]], order=1) for k in range(3)])
    assert abs(got - want).max() < 2.6 and abs(got - want).mean() < .4


def test_gpu_gives_the_same_bytes():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    name, xy = places(40, 30)
    cpu, gpu = (PatchSampler(SLIDES, (9, 40, 200), 24, whole=False, device=d).sample(name, xy, **drawn(40)).cpu() for d in ("cpu", "cuda"))
    assert (cpu.int() - gpu.int()).abs().max() <= 1

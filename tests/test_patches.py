"""Patches: positions, borders, engines, windows, memory and batches, against plain references."""
import importlib.util
import math
import os
import pickle
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import map_coordinates, uniform_filter
from torchvision.transforms.v2.functional import resize

from histokit.core.hdf5 import open_h5
from histokit.core.text import BadInput
from histokit.learn.trainer import Trainer
from histokit.learn.views import dihedral
from histokit.spots.cache import SlideCache
from histokit.spots.layout import slide_paths
from histokit.spots.patches import Augmentation, HESpotDataset, PatchSampler, cut_patch, mirror
from histokit.spots.sampling import Atlas, aim, colour_mix, fold, halve, pack_rgb, sample_torch, unpack_rgb

NO_NUMBA = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="numba is not installed")
ENGINES = ["numpy", pytest.param("numba", marks=NO_NUMBA)]
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (90, 131, 3), dtype=np.uint8)
SLIDES = {"a": NOISE, "b": np.ascontiguousarray(NOISE[:40, :50][::-1])}


def drawn(n, **kw): return Augmentation(**(dict(scale=(.5, 2.), shift_px=9) | kw)).draw(n, 0)


def places(n, beyond=0, seed=1):
    "Spots on both slides, as far as asked beyond their borders."
    rng = np.random.default_rng(seed)
    name = np.array(list(SLIDES))[rng.integers(2, size=n)]
    size = np.array([SLIDES[s].shape[1::-1] for s in name])
    return name, rng.random((n, 2)) * (size - 1 + 2 * beyond) - beyond


def slow_pixel(slide, x, y):
    "The mean of four neighbours, mirrored at the border."
    x0, y0, out = math.floor(x), math.floor(y), np.zeros(3)
    for qx, wx in ((x0, 1 - x + x0), (x0 + 1, x - x0)):
        for qy, wy in ((y0, 1 - y + y0), (y0 + 1, y - y0)):
            row, column = (mirror(np.array(q), n) for q, n in zip((qy, qx), slide.shape))
            out += wx * wy * slide[row, column]
    return out


def slow_patch(slide, xy, what, i, o):
    "Patch i of `what` by itself, one pixel after the other."
    out, angle = np.empty((3, o, o)), math.radians(what["angle"][i])
    c, s, sign = math.cos(angle), math.sin(angle), -1 if what["flip"][i] else 1
    for row, column in np.ndindex(o, o):
        dx, dy = ((k - (o - 1) / 2) * what["scale"][i] for k in (column, row))
        x, y = xy + what["shift"][i] + (sign * (c * dx - s * dy), s * dx + c * dy)
        out[:, row, column] = slow_pixel(slide, x, y)
    return out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("beyond", [0, 60])
def test_against_a_plain_loop(engine, beyond):
    "Any angle, scale, flip and shift, inside and far beyond the border, on noise: within the rounding of weights."
    name, xy = places(30, beyond)
    what = Augmentation(scale=(.4, .99), shift_px=5, colour=0, stain=0).draw(30, 3)
    sampler = PatchSampler(SLIDES, 17, whole=False, engine=engine)
    got = sampler.sample(name, xy, **what)[:, 0].numpy()
    for i in range(30):
        off = abs(got[i] - slow_patch(SLIDES[name[i]], xy[i], what, i, 17))
        assert off.max() < 2.6 and off.mean() < .5


@pytest.mark.parametrize("engine", ENGINES)
def test_ramp_shows_the_position(engine):
    "On a linear ramp each patch's pixels say where they were taken."
    ramp = np.zeros((250, 250, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(250), np.arange(250)[:, None]
    xy = RNG.uniform(60, 190, (50, 2))
    what = Augmentation(scale=(.5, 1.9), colour=0, stain=0).draw(50, 1)
    sampler = PatchSampler({"r": ramp}, 40, 64, whole=False, engine=engine)
    got = sampler.sample(["r"] * 50, xy, **what)[:, 0, :2].numpy()
    assert abs(got.mean((2, 3)) - xy).max() < .03
    t = (np.arange(64) - 31.5) * 40 / 64
    for i in range(50):
        angle, z = math.radians(what["angle"][i]), what["scale"][i]
        c, s, sign = math.cos(angle), math.sin(angle), -1 if what["flip"][i] else 1
        x = xy[i, 0] + sign * z * (c * t[None] - s * t[:, None])
        y = xy[i, 1] + z * (s * t[None] + c * t[:, None])
        assert abs(got[i] - np.stack([x, y])).max() < .6                   # half a grey level is half a pixel


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [1, 2, 7, 16, 33, 150])
def test_identity_is_cut_patch_and_dihedral(engine, size):
    name, xy = places(24)
    sampler = PatchSampler(SLIDES, size, engine=engine)
    cut = np.stack([cut_patch(SLIDES, n, *p, size) for n, p in zip(name, xy)])
    cut = torch.from_numpy(cut).permute(0, 3, 1, 2)
    for k in range(8):
        turned = sampler.sample(name, xy, angle=90 * (k % 4), flip=k >= 4)[:, 0]
        assert torch.equal(turned, dihedral(cut, k))


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree(engine):
    name, xy = places(40, 30)
    sampler = PatchSampler(SLIDES, (9, 40, 200), 24, whole=False, engine=engine)
    for what in (drawn(40, colour=0, stain=0), drawn(40, colour=.1, stain=.3)):
        got = sampler.sample(name, xy, **what)
        want = sample_torch(sampler.device_atlas(), sampler.atlas, sampler.plan(name, xy, **what)).view_as(got)
        off = (got.int() - want.int()).abs()
        assert off.max() <= (0 if what["mix"] is None else 1) and off.float().mean() < .01


@pytest.mark.parametrize("engine", ENGINES)
def test_colour_is_optical_density(engine):
    "Against the formula in float64; glass stays white, and the identity changes nothing."
    mix = colour_mix(RNG.uniform(.7, 1.3, (1, 3)), RNG.uniform(.6, 1.4, (1, 2)))
    sampler = PatchSampler({"a": NOISE}, 80, engine=engine)
    one = lambda m: sampler.sample(["a"], [[60, 45]], mix=m)[0, 0].numpy().astype(float)
    plain, got = one(None), one(mix)
    od = -np.log((plain + .5) / 255.5)
    want = 255.5 * np.exp(-np.einsum("cd,dij->cij", mix[0].astype(float), od))
    want = np.floor(np.minimum(want, 255))
    assert abs(got - want).max() <= 1 and (got != want).mean() < .01
    assert abs(one(colour_mix(np.ones((1, 3)), np.ones((1, 2)))) - plain).max() <= 1
    white = PatchSampler({"w": np.full((50, 50, 3), 255, np.uint8)}, 20, engine=engine)
    assert (white.sample(["w"], [[25, 25]], mix=mix) == 255).all()


def test_levels_are_means_and_borders_fold():
    atlas, pixels = Atlas(SLIDES), NOISE.astype(int)
    four = pixels[:90, :130].reshape(45, 2, 65, 2, 3).sum((1, 3))
    assert np.array_equal(unpack_rgb(atlas.level(0, 1))[:45, :65], (four + 2) // 4)
    assert np.array_equal(atlas.level(1, 0), pack_rgb(SLIDES["b"]))
    assert halve(np.zeros((1, 1), np.uint32)).shape == (1, 1)
    for n in (1, 2, 3, 10):
        at = np.arange(-100, 100, dtype=np.int32) * 256
        fold(at, n, n, 0)
        assert np.array_equal(at // 256, mirror(np.arange(-100, 100), n))
    one = PatchSampler({"dot": np.full((1, 1, 3), 7, np.uint8)}, 5)
    assert (one.sample(["dot"], [[0, 0]], angle=30.) == 7).all()
    zero = np.zeros(1, int)
    at = aim(np.zeros((1, 2)), np.ones(1), angle=zero, flip=zero > 0, level=zero, out_px=4)
    assert at.dtype == np.int32 and at.shape == (1, 4, 4)


def test_against_scipy_at_full_size():
    "400 px with rotation, as scipy would sample it."
    slide = RNG.integers(0, 256, (700, 700, 3), dtype=np.uint8)
    sampler = PatchSampler({"a": slide}, 400, whole=False)
    got = sampler.sample(["a"], [[351.25, 347.5]], angle=33.)[0, 0].numpy()
    t, c, s = np.arange(400) - 199.5, math.cos(math.radians(33)), math.sin(math.radians(33))
    at = [347.5 + s * t[None] + c * t[:, None], 351.25 + c * t[None] - s * t[:, None]]
    want = np.stack([map_coordinates(slide[..., k].astype(float), at, order=1) for k in range(3)])
    assert abs(got - want).max() < 2.6 and abs(got - want).mean() < .4


def test_gpu_gives_the_same_bytes():
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    name, xy = places(40, 30)
    samplers = [PatchSampler(SLIDES, (9, 40, 200), 24, whole=False, device=d) for d in ("cpu", "cuda")]
    cpu, gpu = (s.sample(name, xy, **drawn(40)).cpu() for s in samplers)
    assert (cpu.int() - gpu.int()).abs().max() <= 1
    with pytest.raises(BadInput, match="sample on the CPU"): PatchSampler(SLIDES, 9, device="cuda", max_bytes=1000)


# --- files, links and the cache ------------------------------------------------------------------------------

def spots_of(seed):
    "Thirty spots with a target."
    rng = np.random.default_rng(seed)
    return np.rec.fromarrays([*rng.integers(0, 90, (2, 30)), rng.random(30)], names="x,y,C1")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "Slides in square chunks, as floats without chunks, and in chunks of a column."
    path = tmp_path_factory.mktemp("patches")/"d.h5"
    kinds = [(NOISE, dict(chunks=(16, 16, 3), compression="gzip"))]
    kinds.append(((NOISE[::-1] / 255).astype(np.float32), {}))
    kinds.append((NOISE[:, ::-1], dict(chunks=(90, 1, 3))))
    with h5py.File(path, "w") as h:
        for i, (slide, kw) in enumerate(kinds):
            h.create_dataset(f"images/Train/S_{i}", data=slide, **kw)
            h[f"spots/Train/S_{i}"] = spots_of(i)
    return path


def random_window(): return [slice(*np.sort(RNG.integers(0, n + 1, 2))) for n in NOISE.shape[:2]]


@pytest.mark.parametrize("budget", [9_000, 60_000, 80_000, 1_000_000])
def test_a_cache_is_the_slides_within_its_budget(file, budget):
    "One tile, tiles only, one slide whole and tiles of the others, all slides whole."
    cache = SlideCache(file, budget, tile_px=32)
    with open_h5(file) as h:
        slides = {name: h[place][()] for name, place in slide_paths(h).items()}
    for name, pixels in slides.items():
        if pixels.dtype != np.uint8: pixels = np.round(pixels * 255).astype(np.uint8)
        assert cache.shape(name) == pixels.shape
        for _ in range(60):
            rows, cols = random_window()
            assert np.array_equal(cache.crop(name, rows, cols), pixels[rows, cols])
            assert cache.n_bytes <= cache.max_bytes
        assert np.array_equal(cache[name], pixels)
    memory = cache._memory()
    whole = sum(w.nbytes for w in memory.whole.values() if w is not None)
    assert whole + (0 if memory.block is None else memory.block.nbytes) <= budget
    assert len(memory.whole) == {9_000: 0, 60_000: 0, 80_000: 1, 1_000_000: 3}[budget]
    assert cache.hits and cache.misses
    again = pickle.loads(pickle.dumps(cache))
    assert again.crop("S_0", slice(3, 9), slice(4, 8)).shape == (6, 4, 3)


def test_whole_slides_are_read_once(file):
    cache = SlideCache(file)
    for name in ("S_0", "S_0", "S_2", "S_2", "S_0"): cache.crop(name, slice(0, 5), slice(0, 5))
    assert (cache.misses, cache.hits, cache.n_bytes) == (2, 3, 2 * NOISE.nbytes)


def test_a_tile_that_cannot_be_read_takes_no_place(file, tmp_path):
    "After a damaged chunk the other tiles are what they were."
    path = tmp_path/"d.h5"
    path.write_bytes(file.read_bytes())
    with h5py.File(path) as h:
        chunk = h["images/Train/S_0"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset:chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(data)
    cache = SlideCache(path, 9_000, tile_px=16)
    for _ in range(3):
        with pytest.raises(BadInput, match="is damaged, copy it again"): cache.crop("S_0", slice(0, 5), slice(0, 5))
        for _ in range(10):
            rows, cols = slice(16, RNG.integers(17, 91)), slice(16, RNG.integers(17, 132))
            assert np.array_equal(cache.crop("S_0", rows, cols), NOISE[rows, cols])


def test_threads_share_a_cache(file):
    from concurrent.futures import ThreadPoolExecutor
    cache, windows = SlideCache(file, 60_000, 32), [random_window() for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda w: cache.crop("S_2", *w), windows))
    assert all(np.array_equal(f, NOISE[:, ::-1][rows, cols]) for f, (rows, cols) in zip(found, windows))


def test_links_are_followed_and_named(file, tmp_path):
    (tmp_path/"slides.h5").write_bytes(file.read_bytes())
    with h5py.File(tmp_path/"links.h5", "w") as h:
        for top in ("images", "spots"):
            h[f"{top}/Train/S_2"] = h5py.ExternalLink("slides.h5", f"{top}/Train/S_2")
            h[f"{top}/Train/S_1"] = h5py.SoftLink(f"/{top}/Train/S_2")
    with open_h5(tmp_path/"links.h5") as h: assert list(slide_paths(h)) == ["S_1", "S_2"]
    cache = SlideCache(tmp_path/"links.h5")
    assert np.array_equal(cache["S_1"], NOISE[:, ::-1]) and np.array_equal(cache["S_2"], cache["S_1"])
    (tmp_path/"slides.h5").rename(tmp_path/"moved.h5")
    with pytest.raises(BadInput, match="S_1 is a link to /images/Train/S_2, which is not there"):
        SlideCache(tmp_path/"links.h5")
    del cache
    with h5py.File(tmp_path/"links.h5", "r+") as h: del h["images/Train/S_1"]
    with pytest.raises(BadInput, match="S_2 is a link to slides.h5:images/Train/S_2, which is not there"):
        SlideCache(tmp_path/"links.h5")


MEMORY = """
    import sys, numpy as np
    from histokit.spots.cache import SlideCache
    path, budget = sys.argv[1], int(sys.argv[2])
    def peak():
        return next(int(line.split()[1]) << 10 for line in open('/proc/self/status') if line.startswith('VmHWM'))
    def look(cache):
        rng = np.random.default_rng(0)
        for _ in range(600):
            y, x = rng.integers(0, 1280, 2)
            cache.crop(f'S_{rng.integers(5)}', slice(y, y + 200), slice(x, x + 200))
    look(SlideCache(path, 1 << 18))
    before, cache = peak(), SlideCache(path, budget)
    look(cache)
    print(peak() - before, cache.n_bytes)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_memory_stays_within_the_budget(tmp_path):
    "A file many times the budget, in random order: the process grows by no more than the budget."
    path, budget = tmp_path/"large.h5", 4 << 20
    with h5py.File(path, "w") as h:
        for i in range(5):
            pixels = RNG.integers(0, 256, (1536, 1536, 3), dtype=np.uint8)
            h.create_dataset(f"images/Train/S_{i}", data=pixels, chunks=(256, 256, 3))
    assert path.stat().st_size > 8 * budget
    run = [sys.executable, "-c", textwrap.dedent(MEMORY), str(path), str(budget)]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert not done.returncode, done.stderr
    growth, held = map(int, done.stdout.split())
    assert growth <= budget and budget // 2 < held <= budget


@pytest.mark.parametrize("engine", ENGINES)
def test_windows_give_the_same_bytes(file, engine):
    slides = {n: SlideCache(file)[n] for n in SlideCache(file)}
    name, xy, what = np.repeat(list(slides), 20), RNG.uniform(-20, 110, (60, 2)), drawn(60)
    kw = dict(sizes=(20, 70, 160), out_px=20, whole=False, engine=engine)
    memory = PatchSampler(slides, **kw).sample(name, xy, **what)
    for other in (PatchSampler(SlideCache(file, 60_000, 32), **kw), PatchSampler(slides, max_bytes=0, **kw)):
        assert not other.resident and torch.equal(other.sample(name, xy, **what), memory)
    roomy = PatchSampler(SlideCache(file), **kw)
    assert roomy.resident and torch.equal(roomy.sample(name, xy, **what), memory)


# --- the dataset ---------------------------------------------------------------------------------------------

def table(n=45):
    name, xy = places(n)
    return pd.DataFrame(dict(slide=name, x=xy[:, 0], y=xy[:, 1]))


def test_slides_or_a_sampler_give_the_same_patches():
    "The short way is the sampler's: what `cut_patch` cuts at the slide's own size, near torchvision's at another."
    spots, sides = table(), dict(a=17, b=30)
    short = HESpotDataset(spots, SLIDES, sides, 16)
    given = HESpotDataset(spots, PatchSampler(SLIDES, (sides,), 16))
    assert torch.equal(short.batch(range(45))[0]["image"], given.batch(range(45))[0]["image"])
    assert short.patch_px == sides and short.slides is SLIDES
    native = HESpotDataset(spots, SLIDES, 17)
    smooth = {n: uniform_filter(s.astype(float), (5, 5, 0)).astype(np.uint8) for n, s in SLIDES.items()}
    resized = HESpotDataset(spots, smooth, 40, 32)
    for i in range(45):
        place = spots.loc[i, ["slide", "x", "y"]]
        assert np.array_equal(native[i][0]["image"].permute(1, 2, 0), cut_patch(SLIDES, *place, 17))
        cut = torch.tensor(cut_patch(smooth, *place, 40))
        theirs = resize(cut.permute(2, 0, 1), [32, 32], antialias=True)
        assert (resized[i][0]["image"].int() - theirs.int()).abs().float().mean() < 4


def test_a_batch_does_not_depend_on_how_it_is_cut():
    spots, target = table(), np.arange(45.)[:, None]
    sampler = PatchSampler(SLIDES, dict(spot=14, region=60), 16)
    data = HESpotDataset(spots, sampler, target=target, augment=Augmentation(shift_px=3))
    def epoch(size, seed, workers=0):
        parts = list(data.batches(size, True, seed, workers))
        images = [torch.cat([x["spot"], x["region"]], 1) for x, _ in parts]
        return torch.cat(images), torch.cat([t for _, t in parts])
    pictures, order = epoch(45, 5)
    for size, workers in ((7, 0), (10, 0), (16, 2)):
        again, same = epoch(size, 5, workers)
        assert torch.equal(pictures, again) and torch.equal(order, same)
    assert sorted(order[:, 0].tolist()) == list(range(45)) and not torch.equal(epoch(45, 6)[1], order)
    assert len(epoch(11, 5)[0]) == 44 and len(data.batches(11, True, 5)) == 4            # a lone last row is left out
    item = data.epoch(5)[int(order[3, 0])]
    assert torch.equal(item[0]["spot"], pictures[3, :3]) and item[1].item() == order[3, 0]


def test_threads_change_nothing():
    spots = table()
    samplers = [PatchSampler(SLIDES, 30, 16, threads=threads) for threads in (1, 3)]
    one, three = (s.sample(spots.slide, spots[["x", "y"]], **drawn(45)) for s in samplers)
    assert torch.equal(one, three)


def test_identity_changes_with_what_features_depend_on(file):
    spots = table()
    def identity(spots=spots, slides=SLIDES, size=20, augment=None, target=None):
        return HESpotDataset(spots, slides, size, 12, augment=augment, target=target).identity()
    base = identity()
    assert identity(target=np.zeros((45, 2))) == base                      # what is learnt from features is not in them
    assert identity(spots.iloc[::-1]) != base and identity(size=21) != base
    assert identity(augment=Augmentation()) != base
    assert identity(slides=SLIDES | dict(b=255 - SLIDES["b"])) != base
    one = spots.assign(slide="S_0")
    tiles, whole = (identity(one, SlideCache(file, budget)) for budget in (40_000, 1 << 20))
    assert tiles == whole != base


def test_trains_with_the_trainer():
    "As items of a plain dataset the batches already fit the trainer."
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 1)

        def forward(self, image, coords): return self.head(image.float().mean((2, 3)) / 255)
    target = np.random.default_rng(0).random((45, 1))
    data = HESpotDataset(table(), SLIDES, 20, 12, target=target, augment=Augmentation())
    score = lambda p, t: -float(((p - t) ** 2).mean())
    trainer = Trainer(Net(), torch.nn.functional.mse_loss, score, epochs=2, batch_size=16, device="cpu")
    assert np.isfinite(trainer.fit(data, data).metric).all()


@pytest.mark.parametrize("make, says", [
    (lambda: PatchSampler(SLIDES, (10, 20)), "give out_px"),
    (lambda: PatchSampler(SLIDES, 10, unit="mm"), "unknown unit"),
    (lambda: PatchSampler(SLIDES, 10, unit="spot"), "need spot_px"),
    (lambda: PatchSampler(SLIDES, 100, unit="um", um_per_px=dict(a=1., b=float("nan"))), "has no size in pixels on b"),
    (lambda: PatchSampler(SLIDES, (dict(a=10),), 8), "has no size in pixels on b"),
    (lambda: PatchSampler(SLIDES, dict(a=10, b=20), 8), "give \\(sizes,\\)"),
    (lambda: PatchSampler(SLIDES, 10, engine="nunba"), "did you mean 'numba'"),
    (lambda: Augmentation(scale=(1.1, .9)), "the smaller first"),
    (lambda: Augmentation(colour=-1), "colour=-1 is negative"),
    (lambda: HESpotDataset(table().assign(slide="A"), SLIDES, 10), "unknown slide"),
    (lambda: HESpotDataset(table(), SLIDES), "patch_px is missing"),
    (lambda: HESpotDataset(table(), PatchSampler(SLIDES, 10), 10), "has sizes of its own"),
    (lambda: HESpotDataset(table(), SLIDES, 10, target=np.zeros((3, 1))), "45 spots but 3 rows of targets"),
    (lambda: HESpotDataset(table(), SLIDES, 10, coords=np.zeros((3, 2))), "45 spots but 3 rows of coordinates"),
])
def test_bad_input_is_one_line(make, says):
    with pytest.raises(BadInput, match=says) as e: make()
    assert "\n" not in str(e.value)


def test_bad_input_of_a_cache(file):
    with pytest.raises(BadInput, match="did you mean 'S_1'"): SlideCache(file).crop("s_1", slice(0, 1), slice(0, 1))
    with pytest.raises(BadInput, match="raise max_bytes"): SlideCache(file, 100)

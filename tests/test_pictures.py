"What the pictures notebook cannot say about itself: every kind of TIFF, faults, memory, and stain tile by tile."
import os, struct, subprocess, sys, zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from histokit.core import pictures as pages
from histokit.core.pictures import Picture, _half, _read_piece, as_picture, as_rgb, as_uint8
from histokit.core.pictures import open_picture, picture_size, read_picture, read_rgb, write_picture
from histokit.core.text import BadInput
from histokit.spots.stain_files import stain_image_file, stain_picture
from histokit.tissue.measure import STAIN_METHODS
from histokit.tissue.normalise import StainNormalizer

tifffile = pytest.importorskip("tifffile")


def paint(vectors, size=200, seed=0):
    "Nuclei on stroma in a disc on glass, smooth, so that it packs well."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j]
    nuclei = ndimage.gaussian_filter((ndimage.gaussian_filter(rng.random((size, size)), 2) > .525).astype(float), .8)
    stroma = .35 + .65 * ndimage.gaussian_filter(rng.random((size, size)), 4)
    disc = (np.hypot(x, y) < .85)[..., None]
    amount = np.stack([nuclei * 1.2, stroma * (1 - .9 * nuclei)], -1) * disc
    return (250 * np.exp(-amount @ np.array(vectors))).round().astype(np.uint8)


SLIDE = paint([[.62, .70, .35], [.22, .92, .32]])
OTHER = paint([[.50, .72, .48], [.33, .88, .34]], seed=3)[:187, :161]
FADE = np.linspace(0, 255, OTHER[..., 0].size).astype(np.uint8)
ALPHA = np.dstack([OTHER, FADE.reshape(OTHER.shape[:2])])
DEEP = OTHER.astype(np.uint16) * 257 + 3
GREY = OTHER[..., 1].copy()
PLANES = dict(photometric="rgb", planarconfig="separate")
ZIP = dict(compression="zlib", predictor=True)
RGBA = dict(extrasamples=["unassalpha"])
TIFFS = {
    "tiled": (OTHER, dict(tile=(32, 48), **ZIP)),
    "strips": (OTHER, dict(rowsperstrip=7, compression="zlib")),
    "one plain strip": (OTHER, {}),
    "plain tiles": (OTHER, dict(tile=(64, 64))),
    "planes in tiles": (OTHER, dict(tile=(32, 32), **PLANES, **ZIP)),
    "planes in strips": (OTHER, dict(rowsperstrip=11, compression="zlib", **PLANES)),
    "plain planes": (OTHER, PLANES),
    "16 bits": (DEEP, dict(tile=(32, 32), **ZIP)),
    "16 bits, plain, big end first": (DEEP, dict(byteorder=">")),
    "grey": (GREY, dict(tile=(32, 32))),
    "alpha": (ALPHA, dict(tile=(32, 32), **RGBA, **ZIP)),
    "alpha in plain planes": (ALPHA, RGBA | PLANES),
    "floats": ((OTHER / 255).astype(np.float32), {}),
    "BigTIFF": (OTHER, dict(bigtiff=True, tile=(32, 32), **ZIP)),
    "LZMA": (OTHER, dict(tile=(64, 64), compression="lzma")),
}
WINDOWS = [np.s_[0:187, 0:161], np.s_[31:33, 47:49], np.s_[100:187, 3:161]]
WINDOWS += [np.s_[186:187, 160:161], np.s_[5:5, 0:9]]


def save(path, image, **how):
    "Write a TIFF by tifffile."
    if how.get("planarconfig") == "separate": image = np.moveaxis(image, -1, 0)
    tifffile.imwrite(path, image, **({"photometric": "rgb"} if image.ndim == 3 else {}) | how)
    return path


def only(folder):
    "What lies in a folder, hidden files too."
    return sorted(p.name for p in folder.iterdir())


# reading

@pytest.mark.parametrize("kind", TIFFS)
def test_windows_are_those_of_the_picture(tmp_path, kind):
    image, how = TIFFS[kind]
    with open_picture(save(tmp_path/"a.tif", image, **how)) as picture:
        assert picture.shape == image.shape and picture.dtype == image.dtype and picture.chunks != (512, 512)
        for window in WINDOWS: assert np.array_equal(picture[window], image[window]), window
        assert np.array_equal(picture[3:90:7, 2:150:5], image[3:90:7, 2:150:5])


def test_window_unpacks_only_what_it_touches(tmp_path, monkeypatch):
    asked, read = [], _read_piece
    monkeypatch.setattr(pages, "_read_piece", lambda page, cut, i: asked.append(i) or read(page, cut, i))
    with open_picture(save(tmp_path/"a.tif", OTHER, tile=(32, 32), **ZIP)) as picture:
        assert not asked
        for window in (np.s_[33:60, 65:100], np.s_[40:50, 70:80]): picture[window]
    assert asked == [8, 9]


@pytest.mark.parametrize("subifds", [True, False])
def test_level_0_of_a_pyramid(tmp_path, subifds):
    with tifffile.TiffWriter(tmp_path/"p.tif") as file:
        how = dict(tile=(32, 32), photometric="rgb")
        file.write(OTHER, subifds=2 if subifds else 0, description="Aperio Fake |MPP = 0.25", **how)
        for k in (2, 4): file.write(OTHER[::k, ::k], subfiletype=1, **how)
        file.write(SLIDE[:20, :20])                                  # a label
    with open_picture(tmp_path/"p.tif") as picture:
        assert picture.pyramid and picture.um_per_px == (.25, .25) and np.array_equal(picture[:, :], OTHER)


def test_um_per_px_as_written(tmp_path):
    size = dict(PhysicalSizeX=.5, PhysicalSizeXUnit="µm", PhysicalSizeY=.25, PhysicalSizeYUnit="µm")
    ome = dict(ome=True, metadata=dict(axes="YXS", **size))
    cm = dict(resolution=(10000, 5000), resolutionunit="CENTIMETER")
    inch = dict(resolution=(25400, 12700), resolutionunit="INCH")
    for how, expected in zip((cm, inch, {}, ome), ((1, 2), (1, 2), None, (.5, .25))):
        with open_picture(save(tmp_path/"a.tif", OTHER, **how)) as picture:
            assert picture.um_per_px == (expected and pytest.approx(expected))


def test_colours_are_as_they_are_seen(tmp_path):
    save(tmp_path/"white_is_zero.tif", 255 - GREY, photometric="miniswhite", tile=(32, 32))
    assert np.array_equal(read_picture(tmp_path/"white_is_zero.tif"), GREY)
    save(tmp_path/"no_alpha.tif", ALPHA, extrasamples=["unspecified"])
    assert np.array_equal(read_picture(tmp_path/"no_alpha.tif"), OTHER)
    half = np.dstack([OTHER // 2, np.full(OTHER.shape[:2], 128, np.uint8)])
    save(tmp_path/"multiplied.tif", half, extrasamples=["assocalpha"])
    assert np.abs(read_picture(tmp_path/"multiplied.tif")[..., :3].astype(int) - OTHER).max() <= 2
    about = dict(shape=(64, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb")
    tifffile.imwrite(tmp_path/"sparse.tif", iter((OTHER[:64, :64], None)), **about)
    got = read_picture(tmp_path/"sparse.tif")
    assert (got[:, 64:] == 255).all() and np.array_equal(got[:, :64], OTHER[:64, :64])


@pytest.mark.parametrize("kind", ["P raw", "1 raw", "CMYK raw", "RGB tiff_lzw", "RGB packbits", "RGB jpeg"])
def test_what_pillow_writes(tmp_path, kind):
    mode, compression = kind.split()
    Image.fromarray(OTHER).convert(mode).save(tmp_path/"a.tif", compression=compression)
    expected = np.array(Image.open(tmp_path/"a.tif").convert("RGB")).astype(int)
    assert np.abs(read_picture(tmp_path/"a.tif") - expected).max() <= 1


def test_too_large_to_be_read_whole_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "_WHOLE", 1000)
    Image.fromarray(OTHER).convert("CMYK").save(tmp_path/"inks.tif")
    words = r"too large to be read whole \(161 x 187 pixels\).*SEPARATED, 4 x 8 bits.*save it as RGB"
    with pytest.raises(BadInput, match=words): open_picture(tmp_path/"inks.tif")
    save(tmp_path/"one.tif", OTHER, rowsperstrip=187, compression="zlib")
    with pytest.raises(BadInput, match="in one piece; save it in tiles"): open_picture(tmp_path/"one.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadInput, match="pip install tifffile"): open_picture(tmp_path/"one.tif")


def test_missing_codec_is_named(tmp_path, monkeypatch):
    Image.fromarray(OTHER).save(tmp_path/"lzw.tif", compression="tiff_lzw")
    monkeypatch.setattr(tifffile.TIFF, "DECOMPRESSORS", {1: None, 8: None})
    assert np.array_equal(read_picture(tmp_path/"lzw.tif"), OTHER)            # small: Pillow knows it
    monkeypatch.setattr(pages, "_WHOLE", 1000)
    words = r"compression \(LZW\).*pip install imagecodecs"
    with pytest.raises(BadInput, match=words): open_picture(tmp_path/"lzw.tif")


def test_without_tifffile(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    write_picture(tmp_path/"a.tif", OTHER)
    assert np.array_equal(read_picture(tmp_path/"a.tif"), OTHER)
    with pytest.raises(BadInput, match="pip install tifffile"): write_picture(tmp_path/"deep.tif", DEEP)
    assert only(tmp_path) == ["a.tif"]


# whole pictures: what a file holds is not yet what is to be seen

def mirrored(a): return a.swapaxes(0, 1)
def half_turn(a): return np.rot90(a, 2)
def right_turn(a): return np.rot90(a, -1)
TURNS = {1: np.asarray, 2: np.fliplr, 3: half_turn, 4: np.flipud, 5: mirrored, 6: right_turn,
    7: lambda a: mirrored(half_turn(a)), 8: np.rot90}                       # as EXIF defines tag 274

@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_orientation(tmp_path, turn, suffix):
    exif, path = Image.Exif(), tmp_path/f"a.{suffix}"
    exif[274] = turn
    Image.fromarray(OTHER).save(path, exif=exif, **dict(lossless=True) if suffix == "webp" else {})
    stored = np.array(Image.open(path)) if suffix == "jpg" else OTHER
    expected = TURNS[turn](stored)
    assert np.array_equal(read_rgb(path), expected) and picture_size(path) == expected.shape[1::-1]


def test_what_a_png_may_hold(tmp_path):
    rgb, path = Image.fromarray(OTHER), tmp_path/"a.png"
    palette = rgb.quantize(32)
    palette.save(path)
    assert np.array_equal(read_rgb(path), np.array(palette.convert("RGB")))
    palette.save(path, transparency=int(np.array(palette)[0, 0]))
    clear = np.array(palette) == np.array(palette)[0, 0]
    assert (read_rgb(path)[clear] == 255).all() and read_picture(path).shape[2] == 4
    rgb.save(path, transparency=tuple(OTHER[0, 0].tolist()))
    clear = (OTHER == OTHER[0, 0]).all(-1)
    assert (read_rgb(path)[clear] == 255).all() and np.array_equal(read_rgb(path)[~clear], OTHER[~clear])
    Image.fromarray(np.dstack([GREY, ALPHA[..., 3]]), "LA").save(path)
    assert np.array_equal(read_picture(path), np.dstack([GREY, GREY, GREY, ALPHA[..., 3]]))
    Image.fromarray(DEEP[..., 0]).save(path)
    assert read_picture(path).dtype == np.uint16 and np.array_equal(read_picture(path), DEEP[..., 0])
    rgb.convert("1").save(path)
    assert set(np.unique(read_rgb(path))) == {0, 255}


def test_four_inks(tmp_path):
    Image.fromarray(OTHER).convert("CMYK").save(tmp_path/"a.jpg", quality=95)
    assert np.abs(read_rgb(tmp_path/"a.jpg").astype(int) - OTHER).mean() < 4


def test_several_pictures_are_refused(tmp_path, monkeypatch):
    frames = [Image.fromarray(np.roll(OTHER, k, 0)) for k in (0, 40)]
    for name, count in (("a.gif", 2), ("a.webp", 2), ("a.png", 2)):
        frames[0].save(tmp_path/name, save_all=True, append_images=frames[1:])
        with pytest.raises(BadInput, match=f"{name} holds {count} pictures; save the one"): read_rgb(tmp_path/name)
    preview = [frames[1].reduce(2)]
    frames[0].save(tmp_path/"phone.jpg", "MPO", save_all=True, append_images=preview)
    assert read_rgb(tmp_path/"phone.jpg").shape == OTHER.shape
    tifffile.imwrite(tmp_path/"stack.tif", np.stack([OTHER, OTHER]), photometric="rgb")
    with pytest.raises(BadInput, match="holds 2 pictures of one size"): read_rgb(tmp_path/"stack.tif")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadInput, match="holds 2 pictures; windows of it need tifffile"): read_rgb(tmp_path/"stack.tif")


def test_the_first_page_is_not_taken_for_the_largest(tmp_path):
    inks = Image.fromarray(OTHER).convert("CMYK")
    inks.reduce(4).save(tmp_path/"a.tif", save_all=True, append_images=[inks])
    for f in (open_picture, picture_size):
        with pytest.raises(BadInput, match="its pictures is not the first, and its pixels"): f(tmp_path/"a.tif")


def test_size_is_that_of_the_slide_not_of_its_label(tmp_path):
    with tifffile.TiffWriter(tmp_path/"a.tif") as file:
        for image in (SLIDE[:20, :30], OTHER): file.write(image, photometric="rgb", tile=(32, 32))
    assert picture_size(tmp_path/"a.tif") == (161, 187) and read_rgb(tmp_path/"a.tif").shape == OTHER.shape


@pytest.mark.parametrize("bad", ["text.jpg", "gone.jpg", "cut.png", "folder"])
def test_size_of_what_is_no_picture(tmp_path, bad):
    (tmp_path/"folder").mkdir()
    (tmp_path/"text.jpg").write_text("no picture")
    (tmp_path/"cut.png").write_bytes(write_picture(tmp_path/"a.png", OTHER).read_bytes()[:20])
    with pytest.raises(BadInput, match=bad) as e: picture_size(tmp_path/bad)
    assert len(str(e.value).splitlines()) == 1


def test_limit_of_pillow_stands_again_after_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for k in range(8): write_picture(tmp_path/f"{k}.png", OTHER)
    with ThreadPoolExecutor(8) as pool: read = list(pool.map(lambda k: read_rgb(tmp_path/f"{k % 8}.png"), range(40)))
    assert all(np.array_equal(a, OTHER) for a in read) and Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(BadInput): read_rgb(tmp_path/"gone.png")
    (tmp_path/"text.png").write_text("no picture")
    with pytest.raises(BadInput): read_rgb(tmp_path/"text.png")
    assert Image.MAX_IMAGE_PIXELS == 100


def test_damaged_pictures_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        Image.fromarray(OTHER).save(tmp_path/f"a.{suffix}")
        whole = (tmp_path/f"a.{suffix}").read_bytes()
        for _ in range(40):
            data = bytearray(whole[:rng.integers(4, len(whole) + 1)])
            for i in rng.integers(0, len(data), 8): data[i] = rng.integers(256)
            (tmp_path/"b").write_bytes(data)
            for f in (read_rgb, picture_size):
                try: f(tmp_path/"b")
                except BadInput as e: assert len(str(e).splitlines()) == 1


# writing

@pytest.mark.parametrize("image", [OTHER, GREY, ALPHA, DEEP], ids=["rgb", "grey", "alpha", "deep"])
@pytest.mark.parametrize("big", [False, True])
def test_written_tiff_is_read_again(tmp_path, monkeypatch, image, big):
    if big: monkeypatch.setattr(pages, "_BIG", 0)
    write_picture(tmp_path/"a.tif", as_picture(image, um_per_px=(.25, .5), pyramid=True), tile=32)
    with open_picture(tmp_path/"a.tif") as picture:
        assert picture.um_per_px == pytest.approx((.25, .5)) and picture.pyramid and picture.chunks == (32, 32)
        assert np.array_equal(picture[:, :], image)
    with tifffile.TiffFile(tmp_path/"a.tif") as file:
        levels = file.series[0].levels
        assert file.is_bigtiff == big
        assert [v.shape[:2] for v in levels] == [(187, 161), (94, 81), (47, 41), (24, 21)]
        assert levels[1].pages[0].get_resolution() == pytest.approx((20000, 10000))
        assert np.array_equal(levels[1].asarray(), _half(image))
    if image is not DEEP: assert np.array_equal(np.array(Image.open(tmp_path/"a.tif")), image)     # others read it, too


@pytest.mark.parametrize("suffix,near", [(".png", 0), (".jpg", 8)])
def test_other_formats(tmp_path, suffix, near):
    for image in (OTHER, GREY, ALPHA, DEEP):
        write_picture(tmp_path/f"a{suffix}", image)
        expected = as_uint8(image) if suffix == ".png" or image is not ALPHA else as_rgb(image)
        got = read_picture(tmp_path/f"a{suffix}")
        assert got.shape == expected.shape and np.abs(got.astype(int) - expected).mean() <= near / 4


@pytest.mark.parametrize("image", [OTHER, GREY], ids=["rgb", "grey"])
def test_jpeg_in_tiff_stays_jpeg(tmp_path, image):
    pytest.importorskip("imagecodecs")
    Image.fromarray(image).save(tmp_path/"a.tif", compression="jpeg", quality=95)
    with open_picture(tmp_path/"a.tif") as picture:
        assert picture.compression == "jpeg"
        write_picture(tmp_path/"b.tif", as_picture(picture, pyramid=True), tile=64)
        expected = picture[:, :].astype(int)
    for got in (read_picture(tmp_path/"b.tif"), np.array(Image.open(tmp_path/"b.tif"))):
        assert np.abs(got - expected).mean() < 1.5
    assert tifffile.TiffFile(tmp_path/"b.tif").pages[0].compression == 7


def test_jpeg_without_its_codec(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    picture = as_picture(OTHER, compression="jpeg")
    with pytest.raises(BadInput, match="pip install imagecodecs"): write_picture(tmp_path/"a.tif", picture)
    assert not only(tmp_path)


# stain, from file to file

@pytest.mark.parametrize("method", STAIN_METHODS)
def test_tile_by_tile_is_the_whole(tmp_path, method):
    normaliser = StainNormalizer(method).fit(SLIDE)
    save(tmp_path/"a.tif", OTHER, tile=(48, 32), **ZIP)
    report = stain_picture(normaliser, tmp_path/"a.tif", tmp_path/"b.tif", tile=48)
    assert report["done"] and np.array_equal(read_picture(tmp_path/"b.tif"), normaliser.transform(OTHER))


GLASS = np.full((90, 70, 3), 240, np.uint8)

@pytest.mark.parametrize("image", [GREY, ALPHA, DEEP, GLASS], ids=["grey", "alpha", "deep", "glass"])
def test_stain_of_every_kind(tmp_path, image):
    normaliser = StainNormalizer().fit(SLIDE)
    save(tmp_path/"a.tif", image, **(dict(extrasamples=["unassalpha"]) if image is ALPHA else {}))
    report = stain_picture(normaliser, tmp_path/"a.tif", tmp_path/"b.tif", tile=32)
    got, expected = read_picture(tmp_path/"b.tif"), normaliser.transform(image)
    assert report["done"] == (image is ALPHA or image is DEEP) == (not report["reason"])
    assert np.array_equal(got, expected)
    if not report["done"]: assert np.array_equal(got, image)


def test_saved_normaliser_as_reference(tmp_path):
    normaliser = StainNormalizer("macenko").fit(SLIDE)
    normaliser.to_json(tmp_path/"ref.json")
    write_picture(tmp_path/"a.png", OTHER)
    assert stain_image_file(tmp_path/"a.png", tmp_path/"ref.json", tmp_path/"b.png")["done"]
    assert np.array_equal(read_picture(tmp_path/"b.png"), normaliser.transform(OTHER))


def test_folder(tmp_path):
    for name in ("one.png", "two.tif"): write_picture(tmp_path/"in"/name, OTHER)
    for name in ("bad.jpg", "notes.txt"): (tmp_path/"in"/name).write_text("no picture")
    write_picture(tmp_path/"ref.png", SLIDE)
    save(tmp_path/"in"/"scan.svs", OTHER, tile=(32, 32), **ZIP)
    reports = stain_image_file(tmp_path/"in", tmp_path/"ref.png", tmp_path/"out")
    assert only(tmp_path/"out") == ["one.png", "scan.svs.tif", "two.tif"]
    written = {k: r["written"] for k, r in reports.items()}
    assert written == {"bad.jpg": False, "one.png": True, "scan.svs": True, "two.tif": True}
    assert "cannot be read as a picture" in reports["bad.jpg"]["reason"]
    folders = tmp_path/"in", tmp_path/"ref.png", tmp_path/"in"
    with pytest.raises(BadInput, match="choose another folder"): stain_image_file(*folders)


NONE = "cannot be read as a picture"
BAD = {"text.tif": NONE, "half.png": NONE, "headless.tif": NONE, "half.tif": "cut off", "torn.tif": "is damaged",
    "gone.tif": "does not exist", "folder.tif": "is a folder|holds no picture",
    "stack.tif": "holds 2 pictures of one size"}

@pytest.fixture
def bad_pictures(tmp_path):
    "A folder with every picture of `BAD`, and a good one."
    whole = save(tmp_path/"whole.tif", OTHER, tile=(32, 32), **ZIP).read_bytes()
    png = write_picture(tmp_path/"ref.png", SLIDE).read_bytes()
    torn = whole[:-9000] + bytes(9000)
    content = {"half.tif": whole[:-5000], "headless.tif": whole[:60], "torn.tif": torn}
    content |= {"text.tif": b"no picture", "half.png": png[:9000]}
    for name, data in content.items(): (tmp_path/name).write_bytes(data)
    (tmp_path/"folder.tif").mkdir()
    tifffile.imwrite(tmp_path/"stack.tif", np.stack([OTHER, OTHER]), photometric="rgb")
    return tmp_path


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("role", ["picture", "reference"])
def test_bad_pictures(bad_pictures, caplog, name, role):
    out = bad_pictures/"out"/"out.tif"
    out.parent.mkdir()
    out.write_text("earlier")
    paths = [bad_pictures/name, bad_pictures/"ref.png"]
    paths = paths if role == "picture" else paths[::-1]
    with pytest.raises(BadInput, match=BAD[name]) as e: stain_image_file(*paths, out)
    assert len(str(e.value).splitlines()) == 1 and str(bad_pictures/name) in str(e.value) and not caplog.records
    assert out.read_text() == "earlier" and only(out.parent) == ["out.tif"]


KIND = "format of the result"
RESULTS = {"a.gif": KIND, "a.h5": KIND, "folder.tif": "it is a folder", "file/a.tif": "cannot write",
    "/proc/a.tif": "cannot write /proc"}

@pytest.mark.parametrize("out", RESULTS)
def test_bad_results(tmp_path, out):
    picture = write_picture(tmp_path/"in.tif", OTHER)
    (tmp_path/"folder.tif").mkdir()
    (tmp_path/"file").write_text("")
    with pytest.raises(BadInput, match=RESULTS[out]) as e: stain_image_file(picture, picture, tmp_path/out)
    assert len(str(e.value).splitlines()) == 1 and only(tmp_path) == ["file", "folder.tif", "in.tif"]


def test_slides_do_not_become_a_picture(tmp_path, demo_file):
    with pytest.raises(BadInput, match="format of the result"): stain_image_file(demo_file, "", tmp_path/"a.png")
    assert not only(tmp_path)


def test_disk_that_fills_up_leaves_the_earlier_result(tmp_path):
    (tmp_path/"a.tif").write_text("earlier")
    def read(ys, xs):
        if ys.start: raise OSError(28, "No space left on device")
        return OTHER[:64, :64]
    picture = Picture((128, 64, 3), np.dtype(np.uint8), read)
    with pytest.raises(BadInput, match="the disk is full"): write_picture(tmp_path/"a.tif", picture, tile=64)
    assert (tmp_path/"a.tif").read_text() == "earlier" and only(tmp_path) == ["a.tif"]


def test_memory_does_not_grow_with_the_slide(tmp_path):
    sides, block = (2560, 4000), OTHER[20:180, :160]
    for side in sides:
        row = np.tile(block, (1, side // 160, 1))
        read = lambda ys, xs, row=row: row[np.arange(ys.start, ys.stop) % 160][:, xs]
        slide = Picture((side, side, 3), block.dtype, read, pyramid=True)
        write_picture(tmp_path/f"{side}.tif", slide)
    write_picture(tmp_path/"ref.png", SLIDE)
    code = f"""
import resource, sys
from histokit.stain import stain_image_file
peak = []
for side in {sides}:
    assert stain_image_file(f"{{side}}.tif", "ref.png", f"out_{{side}}.tif")["done"]
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20))
print(peak[1] - peak[0])
"""
    env = {**os.environ, "PYTHONPATH": str(Path(pages.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    more = 3 * (sides[1]**2 - sides[0]**2) / 2**20
    assert float(done.stdout) < more / 2, f"{done.stdout} MB of memory for {more:.0f} MB more of pixels"
    with open_picture(tmp_path/"out_4000.tif") as out: assert out.shape == slide.shape and out.pyramid


# what people bring: bits, signs, turns, palettes, alphas, scales, endings that lie

def png16(path, image):
    "A PNG of 16 bits a channel, written byte by byte, since Pillow writes none in colour."
    import struct, zlib
    number = lambda n: struct.pack(">I", n)
    def chunk(kind, data): return number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[image.shape[2] if image.ndim == 3 else 1]
    rows = image.astype(">u2").reshape(len(image), -1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", image.shape[1], len(image), 16, kind, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


def of_bits(image, bits): return (image.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16)


DEEP_FILES = {
    "tiles": lambda p, a: save(p/"a.tif", a, tile=(32, 32), **ZIP),
    "big end first": lambda p, a: save(p/"a.tif", a, byteorder=">"),
    "planes": lambda p, a: save(p/"a.tif", a, **PLANES),
    "grey": lambda p, a: save(p/"a.tif", a[..., 1]),
    "png": lambda p, a: png16(p/"a.png", a),
    "grey png": lambda p, a: png16(p/"a.png", a[..., 1]),
    "alpha png": lambda p, a: png16(p/"a.png", np.dstack([a, np.full(a.shape[:2], 65535, np.uint16)])),
}

@pytest.mark.parametrize("kind", DEEP_FILES)
def test_fewer_bits_than_the_type_has_are_refused_at_every_reader(tmp_path, kind):
    for bits in (8, 10, 12, 14):
        path = DEEP_FILES[kind](tmp_path, of_bits(OTHER, bits))
        for read in (open_picture, read_picture, read_rgb):
            with pytest.raises(BadInput, match=f"{path.name} is uint16 .* of {bits} bits; "): read(path)
    path = DEEP_FILES[kind](tmp_path, of_bits(OTHER, 16))
    expected = np.dstack([OTHER[..., 1]] * 3) if "grey" in kind else OTHER
    assert np.abs(read_rgb(path).astype(int) - expected).max() <= 1


def test_bits_that_are_named_are_spread(tmp_path):
    twelve = of_bits(OTHER, 12)
    assert np.abs(as_uint8(read_picture(save(tmp_path/"a.tif", twelve), bits=12)).astype(int) - OTHER).max() <= 1
    assert np.array_equal(read_picture(tmp_path/"a.tif", bits=16), twelve)
    with pytest.raises(BadInput, match="more than 10 bits hold"): read_picture(tmp_path/"a.tif", bits=10)
    ome = dict(ome=True, metadata=dict(axes="YXS", SignificantBits=12))
    top = dict(extratags=[(281, "H", 1, 4095, True)])
    for how in (ome, top):
        with open_picture(save(tmp_path/"a.tif", twelve, **how)) as picture:
            assert "12 bits, as its file says" in picture.notes[0]
            assert np.abs(as_uint8(picture[:, :]).astype(int) - OTHER).max() <= 1
    with pytest.raises(BadInput, match="of 12 bits"):                       # its largest value says nothing of its bits
        read_rgb(save(tmp_path/"a.tif", twelve, extratags=[(281, "H", 1, int(twelve.max()), True)]))


@pytest.mark.parametrize("type_", [np.float16, np.float32, np.float64])
def test_floats(tmp_path, type_):
    unit = (OTHER / 255).astype(type_)
    assert np.abs(read_rgb(save(tmp_path/"a.tif", unit)).astype(int) - OTHER).max() <= 1
    wrong = {"divide by 255 ": OTHER.astype(type_), "scaled to 0-1 twice": (OTHER / 255**2).astype(type_)}
    wrong |= {"not finite": np.where(OTHER > 200, np.nan, unit).astype(type_), "scale them to 0-1": unit - type_(.9)}
    if type_ != np.float16: wrong["divide by 65535"] = of_bits(OTHER, 16).astype(type_)
    for words, image in wrong.items():
        with pytest.raises(BadInput, match=f"a.tif h.* {words}"): read_rgb(save(tmp_path/"a.tif", image))


@pytest.mark.parametrize("type_", [np.int8, np.int16, np.int32, np.uint32, np.complex64])
def test_what_is_refused_is_not_guessed_by_a_second_reader(tmp_path, type_, monkeypatch):
    for image in (OTHER[..., 0] // 2, OTHER // 2):
        for how in ({}, dict(tile=(32, 32))):
            path = save(tmp_path/"a.tif", image.astype(type_), **how)
            with pytest.raises(BadInput, match=f"is not read: .*{np.dtype(type_)}.*save it as RGB"): read_rgb(path)
    save(tmp_path/"a.tif", image.astype(np.int16))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadInput): read_rgb(tmp_path/"a.tif")


@pytest.mark.parametrize("turn", [0, *TURNS, 9])
@pytest.mark.parametrize("image", [OTHER, DEEP, ALPHA, GREY], ids=["rgb", "deep", "alpha", "grey"])
def test_turned_tiffs_are_read_in_windows(tmp_path, turn, image):
    how = dict(tile=(48, 32), **ZIP, **(RGBA if image is ALPHA else {}))
    tag = dict(extratags=[(274, "H", 1, turn, True)], resolution=(10000, 5000), resolutionunit="CENTIMETER")
    expected = TURNS.get(turn, np.asarray)(image)
    with open_picture(save(tmp_path/"a.tif", image, **how, **tag)) as picture:
        assert picture.shape == expected.shape and np.array_equal(picture[:, :], expected)
        assert np.array_equal(picture[31:97, 50:133], expected[31:97, 50:133])
        assert picture.um_per_px == pytest.approx((2, 1) if turn in (5, 6, 7, 8) else (1, 2))
        assert any("taken as upright" in n for n in picture.notes) == (turn not in TURNS)
    assert picture_size(tmp_path/"a.tif") == expected.shape[1::-1]


def test_palettes_and_alphas_of_tiffs(tmp_path):
    index = OTHER[..., 0] // 16
    table = np.random.default_rng(0).integers(0, 256, (256, 3))
    for scale in (1, 257):                                      # some writers store 8 bits of the 16
        how = dict(photometric="palette", colormap=(table * scale).T.astype(np.uint16), tile=(32, 32))
        assert np.array_equal(read_picture(save(tmp_path/"a.tif", index, **how)), table[index])
    half = np.full_like(GREY, 128)
    grey = dict(photometric="minisblack", planarconfig="contig", tile=(32, 32))
    straight = save(tmp_path/"a.tif", np.dstack([GREY, half]), **grey, extrasamples=["unassalpha"])
    assert np.array_equal(read_picture(straight), np.dstack([GREY, GREY, GREY, half]))
    multiplied = save(tmp_path/"a.tif", np.dstack([GREY // 2, half]), **grey, extrasamples=["assocalpha"])
    assert np.abs(read_picture(multiplied)[..., 0].astype(int) - GREY).max() <= 2
    floats = (np.dstack([OTHER / 255 / 2, np.full(GREY.shape, .5)])).astype(np.float32)
    got = read_picture(save(tmp_path/"a.tif", floats, extrasamples=["assocalpha"]))
    assert np.abs(got[..., :3] - OTHER / 255).max() < 1e-5
    with open_picture(save(tmp_path/"a.tif", np.dstack([GREY, half]), **grey, extrasamples=["unspecified"])) as picture:
        assert np.array_equal(picture[:, :], GREY) and "was left out" in picture.notes[0]
    for white in (1 - (GREY / 255).astype(np.float32), 65535 - DEEP[..., 1]):
        got = read_rgb(save(tmp_path/"a.tif", white, photometric="miniswhite"))
        assert np.abs(got[..., 0].astype(int) - GREY).max() <= 1
    with open_picture(save(tmp_path/"a.tif", OTHER, photometric="minisblack", planarconfig="contig")) as picture:
        assert np.array_equal(picture[:, :], OTHER) and "not said to be colours" in picture.notes[0]


def test_a_transparent_grey_of_16_bits(tmp_path):
    import struct, zlib
    deep = of_bits(GREY, 16)
    data = png16(tmp_path/"a.png", deep).read_bytes()
    chunk = b"tRNS" + struct.pack(">H", int(deep[5, 5]))
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = data.index(b"IDAT") - 4
    (tmp_path/"a.png").write_bytes(data[:at] + chunk + data[at:])
    got = read_rgb(tmp_path/"a.png")
    assert (got[deep == deep[5, 5]] == 255).all() and np.abs(got[deep != deep[5, 5]][:, 0].astype(int)
        - GREY[deep != deep[5, 5]]).max() <= 1


def test_which_of_several_pictures(tmp_path):
    for sizes, words in (([1, 1], "holds 2 pictures of one size"), ([2, 1], ""), ([1, 2], "")):
        with tifffile.TiffWriter(tmp_path/"a.tif") as file:
            for k, packed in zip(sizes, ("zlib", "lzma")):
                file.write(OTHER[::k, ::k], photometric="rgb", compression=packed)
        if words:
            with pytest.raises(BadInput, match=words): read_rgb(tmp_path/"a.tif")
            continue
        with open_picture(tmp_path/"a.tif") as picture:
            assert picture.shape == OTHER.shape and picture.notes == ("the largest of its 2 pictures was taken",)


@pytest.mark.parametrize("text", ["MPP = 0", "MPP = 0,5", "MPP = .", "MPP = unknown", "MPP = -1", "MPP=nan"])
def test_a_scale_that_is_none_stops_nothing(tmp_path, text):
    aperio = dict(description=f"Aperio Image Library |AppMag = 40|{text}|x", metadata=None)
    with open_picture(save(tmp_path/"a.tif", OTHER, **aperio)) as picture:
        right = text == "MPP = 0,5"
        assert picture.um_per_px == ((.5, .5) if right else None) and bool(picture.notes) != right
        write_picture(tmp_path/"b.tif", replace(picture, pyramid=True), tile=32)
    assert np.array_equal(read_picture(tmp_path/"b.tif"), OTHER)


@pytest.mark.parametrize("x,y,unit,expected", [("0.0", "0.0", "µm", None), ("250", "500", "nm", (.25, .5)),
    ("2.5E-4", "5E-4", "mm", (.25, .5)), (".25", "", "µm", None), ("1", "1", "pixel", None),
    ("0,25", "0,5", "µm", (.25, .5))])
def test_the_scale_of_ome(tmp_path, x, y, unit, expected):
    size = f'PhysicalSizeX="{x}" PhysicalSizeXUnit="{unit}" PhysicalSizeY="{y}" PhysicalSizeYUnit="{unit}"'
    head = '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
    head += '<Image ID="Image:0"><Pixels'
    shape = 'DimensionOrder="XYCZT" ID="Pixels:0" SizeC="3" SizeT="1" SizeX="161" SizeY="187" SizeZ="1" Type="uint8"'
    channel = '<Channel ID="Channel:0:0" SamplesPerPixel="3"/><TiffData IFD="0"/></Pixels></Image></OME>'
    text = f"{head} {shape} {size}>{channel}".encode()
    with open_picture(save(tmp_path/"a.ome.tif", OTHER, description=text, metadata=None)) as picture:
        assert picture.um_per_px == (expected and pytest.approx(expected)) and bool(picture.notes) == (not expected)


def test_metadata_that_is_broken_stops_no_picture(tmp_path):
    Image.fromarray(OTHER).save(tmp_path/"a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\xff\xff")
    Image.fromarray(OTHER).save(tmp_path/"b.png", icc_profile=b"no profile")
    for name in "ab": assert np.array_equal(read_rgb(tmp_path/f"{name}.png"), OTHER)
    with open_picture(tmp_path/"b.png") as picture: assert "profile (one that cannot be read) was" in picture.notes[0]
    from PIL import ImageCms
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(OTHER).save(tmp_path/"b.png", icc_profile=profile)
    with open_picture(tmp_path/"b.png") as picture: assert not picture.notes


DISGUISED = {"zip": (b"PK\x03\x04" + bytes(30), "a ZIP archive.*unpack it first"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "packed with gzip.*unpack it first"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "login": (b"<!DOCTYPE html><html>", "a web page.*download"), "empty": (b"", "it is empty.*download it again"),
    "zeros": (bytes(5000), "zeros only.*again"), "slides": (b"\x89HDF\r\n\x1a\n" + bytes(30), "an HDF5 file.*use PNG"),
    "text": (b"x,y\n1,2\n", "it is text.*use PNG, JPEG or TIFF")}

@pytest.mark.parametrize("kind", DISGUISED)
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_endings_that_lie(tmp_path, kind, suffix):
    data, words = DISGUISED[kind]
    (tmp_path/f"a.{suffix}").write_bytes(data)
    for read in (read_rgb, picture_size):
        with pytest.raises(BadInput, match=words): read(tmp_path/f"a.{suffix}")
    Image.fromarray(OTHER).save(tmp_path/"b", "PNG" if suffix != "png" else "TIFF")
    assert np.array_equal(read_rgb((tmp_path/"b").rename(tmp_path/f"c.{suffix}")), OTHER)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_what_is_cut_off_is_not_said_to_be_of_a_wrong_kind(tmp_path, suffix):
    Image.fromarray(OTHER).save(tmp_path/"a", dict(jpg="JPEG").get(suffix, suffix.upper()))
    data = (tmp_path/"a").read_bytes()
    (tmp_path/f"a.{suffix}").write_bytes(data[:len(data) // 2])
    with pytest.raises(BadInput, match="copy or download it again"): read_rgb(tmp_path/f"a.{suffix}")


def test_what_was_guessed_is_said_with_the_stain(tmp_path):
    from typer.testing import CliRunner
    from histokit.cli import app
    write_picture(tmp_path/"ref.png", SLIDE)
    save(tmp_path/"a.tif", SLIDE, photometric="minisblack", planarconfig="contig")
    done = CliRunner().invoke(app, ["stain", *(str(tmp_path/n) for n in ("a.tif", "ref.png", "b.png"))])
    assert done.exit_code == 0 and "not said to be colours" in done.stdout
    save(tmp_path/"c.tif", SLIDE // 200)
    done = CliRunner().invoke(app, ["stain", *(str(tmp_path/n) for n in ("c.tif", "ref.png", "d.png"))])
    assert done.exit_code == 1 and "c.tif holds only 0 and 1" in done.stderr and not (tmp_path/"d.png").exists()


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_other_formats_of_16_bits(tmp_path, bits):
    codecs, deep = pytest.importorskip("imagecodecs"), of_bits(OTHER, bits)
    (tmp_path/"a.jp2").write_bytes(codecs.jpeg2k_encode(deep, level=0))
    for name, kind, image in (("a.ppm", "P6", deep), ("a.pgm", "P5", deep[..., 1])):
        (tmp_path/name).write_bytes(f"{kind} 161 187 65535\n".encode() + image.astype(">u2").tobytes())
    for name in ("a.jp2", "a.ppm", "a.pgm"):
        if bits < 16:
            with pytest.raises(BadInput, match=f"a picture of {bits} bits"): read_rgb(tmp_path/name)
        else: assert np.abs(read_rgb(tmp_path/name)[..., 1].astype(int) - OTHER[..., 1]).max() <= 1
    (tmp_path/"said.ppm").write_bytes(f"P6 161 187 {2**bits - 1}\n".encode() + deep.astype(">u2").tobytes())
    assert np.abs(read_rgb(tmp_path/"said.ppm").astype(int) - OTHER).max() <= 1


@pytest.mark.parametrize("mode", ["CMYK", "LAB"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_turned_pictures_of_other_colours_are_upright_or_refused(tmp_path, mode, compression):
    inks = Image.fromarray(OTHER).convert(mode)
    inks.save(tmp_path/"a.tif", tiffinfo={274: 6}, compression=compression)
    try: got = read_rgb(tmp_path/"a.tif")
    except BadInput as e: assert compression == "raw" and "stored turned" in str(e)
    else: assert np.abs(got.astype(int) - np.rot90(np.array(inks.convert("RGB")), -1)).max() <= 1


def _png_of_one_colour(path, side, exif=b""):
    "A PNG of one grey, written without its pixels in memory: a row repeated."
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    pack, row = zlib.compressobj(9), bytes(side + 1)
    pixels = b"".join(pack.compress(row) for _ in range(side)) + pack.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    after = chunk(b"eXIf", exif) if exif else b""
    before = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    path.write_bytes(before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b""))


def test_the_size_of_a_png_is_asked_without_its_pixels(tmp_path, monkeypatch):
    "Pillow unpacks a PNG to look for EXIF data, 3.6 GB of one of 60 000 pixels a side."
    from PIL import PngImagePlugin
    _png_of_one_colour(tmp_path/"plain.png", 300)
    exif = Image.Exif()
    exif[274] = 6
    _png_of_one_colour(tmp_path/"turned.png", 300, exif.tobytes()[6:])
    _png_of_one_colour(tmp_path/"huge.png", 20_000, exif.tobytes()[6:])
    unpacked, load = [], PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda im: unpacked.append(im.size) or load(im))
    assert picture_size(tmp_path/"plain.png") == (300, 300) and not unpacked
    assert picture_size(tmp_path/"turned.png") == (300, 300) and unpacked == [(300, 300)]
    assert picture_size(tmp_path/"huge.png") == (20_000, 20_000) and len(unpacked) == 1

"Space Ranger folders and tables of cell types in every known form, made here, imported, and opened again."
import importlib.util
import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histokit.core.pictures import read_rgb
from histokit.core.table import as_texts
from histokit.core.text import BadInput
from histokit.spots import own_slides as own_slides_page
from histokit.spots.explore_scene import Scene
from histokit.spots.h5ad import export_run, library_entry, put_element, read_h5ad_slide, write_h5ad
from histokit.spots.own_slides import import_visium
from histokit.spots.slides import DataFactory
from histokit.spots.spaceranger import (PAINTED_TYPES, POSITION_COLUMNS, POSITION_FILES, paint_outs, physical_scale,
    read_outs, read_positions, write_positions)



def need(module):
    "Skip, and say so, where an optional package is not installed."
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed; what needs it is not tested here")
    return importlib.import_module(module)


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    "A folder that no test may change, and what is true of it."
    folder = tmp_path_factory.mktemp("painted")
    slide = paint_outs(folder, seed=5, size=800)
    table = pd.read_csv(folder/"proportions.csv", index_col=0)
    return folder, slide, table.set_axis(list(PAINTED_TYPES), axis=1)


@pytest.fixture
def outs(painted, tmp_path):
    "A copy of the painted folder, to be changed."
    shutil.copytree(painted[0], tmp_path/"mine")
    return tmp_path/"mine"


def same_as_painted(path, painted, scale=.5, name="S_1"):
    "The file holds the painted slide: every spot within a pixel, every abundance as it was."
    factory, (_, slide, table) = DataFactory(path), painted
    spots = factory.spots[factory.spots.slide.eq(name)]
    assert sorted(factory.cell_types) == sorted(PAINTED_TYPES) and len(spots) == len(slide.xy)
    near = np.abs(spots[["x", "y"]].to_numpy()[:, None] - slide.xy * scale).max(-1)
    assert (near.min(1) <= 1).all() and len(set(near.argmin(1))) == len(spots)
    with h5py.File(path) as h5: barcodes = [b.decode() for b in h5[f"barcodes/Train/{name}"]]
    key = {b.removesuffix("-1"): i for i, b in enumerate(table.index)}
    rows = [key[b.removesuffix("-1")] for b in barcodes]
    assert np.allclose(spots[factory.targets], table[factory.cell_types].to_numpy()[rows], rtol=1e-9)
    assert abs(factory.slides[name].um_per_px / (slide.geo.um / scale) - 1) < .01
    return factory


# ---- folders ----
@pytest.mark.parametrize("version", [1, 2, 3])
def test_each_version_of_the_folder(version, outs, painted, tmp_path):
    table = pd.read_csv(outs/"outs/spatial/tissue_positions.csv")
    (outs/"outs/spatial/tissue_positions.csv").unlink()
    assert write_positions(outs/"outs/spatial", table, version).name == POSITION_FILES[3 - version]
    result = import_visium(outs/"outs", outs/"proportions.csv", tmp_path/"a.h5")
    same_as_painted(tmp_path/"a.h5", painted)
    assert not result.warnings and result.cell_types == list(PAINTED_TYPES)


def test_header_decides_not_the_name(outs, tmp_path):
    spatial = outs/"outs/spatial"
    before = read_positions(spatial/"tissue_positions.csv")
    (spatial/"tissue_positions.csv").rename(spatial/"tissue_positions_list.csv")
    assert read_positions(spatial/"tissue_positions_list.csv").equals(before)
    pd.read_csv(spatial/"tissue_positions_list.csv").to_csv(spatial/"tissue_positions.csv", header=False, index=False)
    assert read_positions(spatial/"tissue_positions.csv").equals(before)


@pytest.mark.parametrize("place", [".", "outs", "outs/spatial"])
def test_the_folder_is_found_from_three_places(place, painted): assert len(read_outs(painted[0]/place).positions) > 100


def visium_hd(folder, painted):
    "Bins of 16 and 50 µm on a square lattice, as Visium HD lays them out."
    source, um = painted[0]/"outs/spatial", painted[1].geo.um
    for bins in (16, 50):
        spatial = folder/f"binned_outputs/square_{bins:03d}um/spatial"
        shutil.copytree(source, spatial, ignore=shutil.ignore_patterns("tissue_positions*"))
        r, c = np.mgrid[:10, :12].reshape(2, -1)
        names = [f"s_{bins:03d}um_{i:05d}_{j:05d}-1" for i, j in zip(r, c)]
        columns = (names, np.ones(120, int), r, c, 300 + r * bins / um, 300 + c * bins / um)
        write_positions(spatial, pd.DataFrame(dict(zip(POSITION_COLUMNS, columns))), 3)
        factors = dict(bin_size_um=bins, microns_per_pixel=um, spot_diameter_fullres=bins / um)
        factors |= dict(tissue_hires_scalef=.5, tissue_lowres_scalef=.2)
        (spatial/"scalefactors_json.json").write_text(json.dumps(factors))
    return folder


def test_visium_hd(painted, tmp_path):
    folder = visium_hd(tmp_path/"hd", painted)
    with pytest.raises(BadInput, match="bins of 16, 50 µm; choose one with bin_um"): read_outs(folder)
    with pytest.raises(BadInput, match="no bins of 8"): read_outs(folder, 8)
    source = read_outs(folder, 50)
    barcodes = [b.removesuffix("-1") for b in source.positions.barcode]
    table = pd.DataFrame(np.random.default_rng(0).random((120, 3)), index=barcodes, columns=list("abc"))
    import_visium(folder, table, tmp_path/"hd.h5", bin_um=50)
    info = DataFactory(tmp_path/"hd.h5").slides["S_1"]
    assert info.lattice == "square" and abs(info.um_per_px - 2 * painted[1].geo.um) < 1e-9
    with pytest.raises(BadInput, match="px apart in this picture"):
        import_visium(folder, None, tmp_path/"no.h5", split="Test", bin_um=16, image="lowres")


# ---- scale ----
def test_lattice_is_the_ruler_and_the_diameter_its_witness(painted):
    positions, um = read_outs(painted[0]).positions[["x", "y"]], painted[1].geo.um
    for diameter, warns in ((65, 0), (55, 0), (40, 1), (90, 1)):
        found, _, warned = physical_scale(positions, dict(spot_diameter_fullres=diameter / um))
        assert abs(found / um - 1) < .005 and len(warned) == warns
    assert abs(physical_scale(positions[:2], dict(spot_diameter_fullres=65 / um))[0] - um) < 1e-9
    assert np.isnan(physical_scale(positions[:2], {})[0])


# ---- pictures ----
def full_picture(painted, kind, folder):
    "The full-resolution picture, saved in another format."
    pixels = read_rgb(painted[0]/"full_resolution.tif")
    if kind == "rgba": pixels = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    path = folder/f"full.{kind.replace('rgba', 'png')}"
    Image.fromarray(pixels).save(path, **dict(quality=95) if kind == "jpg" else {})
    return path


PICTURES = dict(auto=.5, hires=.5, lowres=.2, tif=1, png=1, jpg=1, rgba=1)


@pytest.mark.parametrize("kind,scale", PICTURES.items())
def test_each_picture(kind, scale, painted, tmp_path):
    image = full_picture(painted, kind, tmp_path) if scale == 1 else kind
    result = import_visium(painted[0], painted[0]/"proportions.csv", tmp_path/"a.h5", image=image)
    factory = same_as_painted(tmp_path/"a.h5", painted, scale)
    pixels = factory.read_slide("S_1")
    assert (result.height, result.width) == pixels.shape[:2]
    if scale == 1:
        change = np.abs(pixels.astype(int) - read_rgb(painted[0]/"full_resolution.tif")).mean()
        assert change < (4 if kind == "jpg" else 1e-9)
    with h5py.File(tmp_path/"a.h5") as h5:
        stored = h5["images/Train/S_1"]
        assert stored.dtype == np.uint8 and stored.chunks
        assert abs(stored.attrs["spot_diameter_px"] * stored.attrs["um_per_px"] - 55) < 1e-9


def test_a_large_picture_is_no_bomb(painted, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_rgb(painted[0]/"full_resolution.tif").shape[2] == 3 and Image.MAX_IMAGE_PIXELS == 100


def test_a_copy_at_another_size_needs_its_scale(painted, tmp_path):
    quarter, table = tmp_path/"quarter.png", painted[0]/"proportions.csv"
    Image.open(painted[0]/"full_resolution.tif").reduce(4).save(quarter)
    with pytest.raises(BadInput, match="give scale=0.25"):
        import_visium(painted[0], table, tmp_path/"a.h5", image=quarter)
    import_visium(painted[0], table, tmp_path/"a.h5", image=quarter, scale=.25)
    same_as_painted(tmp_path/"a.h5", painted, .25)


def test_a_larger_picture_can_be_reduced(painted, tmp_path):
    full, um = painted[0]/"full_resolution.tif", painted[1].geo.um
    import_visium(painted[0], painted[0]/"proportions.csv", tmp_path/"a.h5", image=full, reduce_to=4 * um)
    same_as_painted(tmp_path/"a.h5", painted, .25)


def test_tiff_that_pillow_cannot_read(painted, tmp_path):
    pixels = read_rgb(painted[0]/"full_resolution.tif")
    tifffile = need("tifffile")
    tifffile.imwrite(tmp_path/"deep.tif", pixels.astype(np.uint16) * 257, photometric="rgb")
    planes = dict(photometric="rgb", planarconfig="separate", bigtiff=True)
    tifffile.imwrite(tmp_path/"big.tif", np.moveaxis(pixels, -1, 0), **planes)
    for name in ("deep.tif", "big.tif"): assert np.array_equal(read_rgb(tmp_path/name), pixels), name


def test_without_tifffile_the_error_names_it(tmp_path, monkeypatch):
    (tmp_path/"odd.tif").write_bytes(b"II*\0" + b"\0" * 60)
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(BadInput, match="pip install tifffile"): read_rgb(tmp_path/"odd.tif")


# ---- tables ----
def styles(table):
    "The same abundances as each method would export them: name -> function of a path, suffix of the path."
    rows = table.rename_axis("barcode")
    c2l = table.rename(columns=lambda c: f"q05cell_abundance_w_sf_{c}")
    means, stds = (table.add_prefix(f"{k}cell_abundance_w_sf_") for k in ("means", "stds"))
    obs = pd.concat([means * 2, c2l, stds], axis=1).assign(sample="a", n_counts=5, total_counts=7.)
    melted = rows.reset_index().melt("barcode", var_name="cell_type", value_name="proportion")
    shuffled = melted.set_axis(["spot", "celltype", "weight"], axis=1).sample(frac=1, random_state=0)
    return dict(
        wide=(lambda p: rows.to_csv(p), "csv"),
        unnamed=(lambda p: table.to_csv(p), "csv"),
        semicolons=(lambda p: rows.to_csv(p, sep=";"), "csv"),
        gzipped=(lambda p: rows.to_csv(p), "csv.gz"),
        parquet=(lambda p: rows.reset_index().to_parquet(p), "parquet"),
        cell2location=(lambda p: c2l.to_csv(p), "csv"),
        cell2location_obs=(lambda p: obs.rename_axis("spot_id").to_csv(p), "csv"),
        stereoscope=(lambda p: table.to_csv(p, sep="\t"), "tsv"),
        rctd=(lambda p: table.to_csv(p, quoting=2), "csv"),
        rctd_text=(lambda p: table.to_csv(p, sep=" ", index_label=False, quoting=2), "txt"),
        card=(lambda p: rows.assign(x=1, y=2).to_csv(p), "csv"),
        card_mangled=(lambda p: table.rename(index=lambda b: b.replace("-", ".")).to_csv(p), "csv"),
        sideways=(lambda p: table.T.to_csv(p), "csv"),
        long=(lambda p: melted.to_csv(p, index=False), "csv"),
        long_indexed=(lambda p: melted.to_csv(p), "csv"),
        long_other_names=(lambda p: shuffled.to_csv(p, index=False, sep="\t"), "tsv"),
        other_order=(lambda p: rows.iloc[::-1].to_csv(p), "csv"),
        no_suffix=(lambda p: rows.rename(index=lambda b: b[:-2]).to_csv(p), "csv"),
        merged=(lambda p: rows.rename(index=lambda b: f"slideA_{b}_3").to_csv(p), "csv"))


STYLES = sorted(styles(pd.DataFrame(dict(a=[1.]), index=["A-1"])))


@pytest.mark.parametrize("style", STYLES)
def test_each_style_of_table(style, painted, tmp_path):
    write, suffix = styles(painted[2])[style]
    write(tmp_path/f"table.{suffix}")
    import_visium(painted[0], tmp_path/f"table.{suffix}", tmp_path/"a.h5")
    same_as_painted(tmp_path/"a.h5", painted)


def test_a_sparse_long_table_counts_what_is_not_listed(painted, tmp_path):
    rows = painted[2].rename_axis("barcode").reset_index()
    long = rows.melt("barcode", var_name="cell_type", value_name="value").query("value > .01")
    long.to_csv(tmp_path/"long.csv", index=False)
    result = import_visium(painted[0], tmp_path/"long.csv", tmp_path/"a.h5")
    assert any("not listed and count as 0" in s for s in result.said)
    assert np.isclose(DataFactory(tmp_path/"a.h5").spots.filter(regex=r"C\d").sum().sum(), long.value.sum())


def test_one_of_several_samples(painted, tmp_path):
    table = painted[2].rename_axis("barcode")
    pd.concat([table.assign(slide="one"), (table * 3).assign(slide="two")]).to_csv(tmp_path/"two.csv")
    one, two = table.rename(index=lambda b: f"one_{b}"), (table * 3).rename(index=lambda b: f"two_{b}")
    pd.concat([one, two]).to_csv(tmp_path/"names.csv")
    out = tmp_path/"a.h5"
    for path in (tmp_path/"two.csv", tmp_path/"names.csv"):
        with pytest.raises(BadInput, match="choose one with sample"):
            import_visium(painted[0], path, out, overwrite=True)
        import_visium(painted[0], path, out, sample="one", overwrite=True)
        same_as_painted(out, painted)
        with pytest.raises(BadInput, match="no row of sample 'three'"):
            import_visium(painted[0], path, tmp_path/"b.h5", sample="three")


def test_spots_without_a_row_are_left_out_and_said(painted, tmp_path):
    result = import_visium(painted[0], painted[2].iloc[5:], tmp_path/"a.h5")
    n = len(painted[2])
    assert result.spots == n - 5 and any(f"{n - 5} of {n} spots" in s for s in result.said)
    with pytest.raises(BadInput, match="is it the table of this slide"):
        import_visium(painted[0], painted[2].iloc[:n // 3], tmp_path/"b.h5")


# ---- several slides ----
def test_second_slide_is_matched_by_name(painted, tmp_path):
    out = tmp_path/"a.h5"
    import_visium(painted[0], painted[2], out, patient="P1", append=True)       # append begins a file that is not there
    import_visium(painted[0], painted[2][painted[2].columns[::-1]], out, append=True, name="B", patient="P1")
    import_visium(painted[0], None, out, append=True, split="Test")
    factory = same_as_painted(out, painted)
    same_as_painted(out, painted, name="B")
    assert factory.names("Train") == ["B", "S_1"] and factory.names("Test") == ["S_2"]
    assert factory.slides["B"].patient == "P1"
    assert factory.spots[factory.spots.slide.eq("S_2")][factory.targets].isna().all().all()


def test_a_test_slide_may_come_first(painted, tmp_path):
    result = import_visium(painted[0], None, tmp_path/"a.h5", split="Test", name="T")
    assert "no training slide yet" in result.warnings[-1]
    import_visium(painted[0], painted[2], tmp_path/"a.h5", append=True)
    same_as_painted(tmp_path/"a.h5", painted)


def test_a_failed_import_leaves_the_file_as_it_was(painted, tmp_path, monkeypatch):
    out = tmp_path/"a.h5"
    import_visium(painted[0], painted[2], out)
    before = out.read_bytes()
    bad = [
        (painted[2].rename(columns={"B cells": "b"}), {}, "lacks, 'B cells'"),
        (painted[2].assign(new=painted[2].iloc[:, 0]), {}, "only this table has 'new'"),
        (painted[2], dict(name="S_1"), "already has a slide S_1"),
        (painted[2], dict(name="a/b"), "cannot name a slide"),
        (-painted[2], {}, "negative")]
    for table, options, message in bad:
        with pytest.raises(BadInput, match=message): import_visium(painted[0], table, out, append=True, **options)
    for function in ("_put_slide", "DataFactory"):
        with monkeypatch.context() as m:
            m.setattr(own_slides_page, function, lambda *a, **k: 1 / 0)
            for options in (dict(append=True), dict(overwrite=True)):
                with pytest.raises(ZeroDivisionError): import_visium(painted[0], painted[2], out, **options)
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    import_visium(painted[0], painted[2], out, append=True)
    assert DataFactory(out).names() == ["S_1", "S_2"]


# ---- what is refused ----
def edit_positions(change):
    def edit(outs):
        path = outs/"outs/spatial/tissue_positions.csv"
        change(pd.read_csv(path)).to_csv(path, index=False)
    return edit


def edit_factors(**new):
    def edit(outs):
        path = outs/"outs/spatial/scalefactors_json.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | new))
    return edit


def edit_table(change):
    def edit(outs): change(pd.read_csv(outs/"proportions.csv", index_col=0)).to_csv(outs/"proportions.csv")
    return edit


def drop(*names):
    def edit(outs):
        for n in names: (outs/"outs/spatial"/n).unlink()
    return edit


def write_bytes(path, data):
    def edit(outs): (outs/path).write_bytes(data)
    return edit


def unchanged(outs): pass


SCALES, HIRES = "outs/spatial/scalefactors_json.json", "outs/spatial/tissue_hires_image.png"
ROW, TABLE = "pxl_row_in_fullres", "proportions.csv"
REFUSED = {
    "no positions": (drop("tissue_positions.csv"), {}, "is no Space Ranger output.*it holds scalefactors_json.json"),
    "no scale factors": (drop("scalefactors_json.json"), {}, "has no scalefactors_json.json"),
    "no picture": (drop("tissue_hires_image.png", "tissue_lowres_image.png"), {},
        "neither tissue_hires_image.png nor"),
    "no hires": (drop("tissue_hires_image.png"), dict(image="hires"), "use image=lowres"),
    "unknown column": (edit_positions(lambda t: t.rename(columns={ROW: "pxl_row_in_full"})), {},
        "is it 'pxl_row_in_full'"),
    "word for a number": (edit_positions(lambda t: t.assign(**{ROW: ["?"] + list(t[ROW][1:])})), {},
        "row 0 is '\\?', not a number"),
    "nothing in tissue": (edit_positions(lambda t: t.assign(in_tissue=0)), {}, "no spot is in tissue"),
    "barcode twice": (edit_positions(lambda t: pd.concat([t, t[:1]])), {}, "given twice"),
    "rows and columns swapped": (edit_positions(lambda t: t.assign(**{ROW: t[ROW] * 3})), {}, "lie outside"),
    "scale of another picture": (edit_factors(tissue_hires_scalef=1.9), {}, "another resolution"),
    "much too small a picture": (edit_factors(tissue_hires_scalef=.02), {}, "px apart in this picture"),
    "no factor": (edit_factors(tissue_hires_scalef=None), {}, "no positive number tissue_hires_scalef"),
    "broken picture": (write_bytes(HIRES, b"\x89PNG broken"), {}, "cannot be read as a picture"),
    "broken factors": (write_bytes(SCALES, b"{"), {}, "not readable JSON"),
    "factors in a list": (write_bytes(SCALES, b"[1]"), {}, "not a table of factors"),
    "negative": (edit_table(lambda t: -t), {}, "negative"),
    "missing": (edit_table(lambda t: t.mask(t > t.max().max() - 1e-9)), {}, "not a finite number"),
    "all missing": (edit_table(lambda t: t.assign(**{t.columns[0]: np.nan})), {}, "not a finite number"),
    "decimal commas": (edit_table(lambda t: t.map(lambda v: f"{v:.3f}".replace("0.1", "0,1"))), {},
        "mixes numbers and words"),
    "other barcodes": (edit_table(lambda t: t.set_axis([f"{i}x{i}" for i in range(len(t))])), {},
        "table's like 0x0"),
    "no numbers": (edit_table(lambda t: t.map(lambda v: "many")), {}, "no column of numbers"),
    "doublets of RCTD": (edit_table(lambda t: t.assign(spot_class="singlet")), {}, "export the weights"),
    "spot twice": (edit_table(lambda t: pd.concat([t, t[:1]])), {}, "given twice"),
    "no table": (lambda outs: (outs/TABLE).unlink(), {}, "does not exist"),
    "empty table": (write_bytes(TABLE, b""), {}, "not a readable table"),
    "header alone": (edit_table(lambda t: t[:0]), {}, "holds no row"),
    "more fields than names": (write_bytes(TABLE, b"barcode,a\nAAAA,1,2,3\n"), {}, "more fields than"),
    "no table named": (unchanged, dict(targets=None), "needs targets"),
    "unknown format": (write_bytes(TABLE, bytes(range(128, 256)) * 9), {}, "not a readable table"),
    "no such picture": (unchanged, dict(image="full.tif"), "is no file"),
    "file for a folder": (unchanged, dict(outs=TABLE), "is not a folder"),
    "no such folder": (unchanged, dict(outs="elsewhere"), "does not exist"),
    "split": (unchanged, dict(split="train"), "did you mean 'Train'"),
    "both ways": (unchanged, dict(append=True, overwrite=True), "choose one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, outs, tmp_path):
    edit, options, message = REFUSED[case]
    edit(outs)
    arguments = dict(outs=outs, targets=outs/"proportions.csv", out=tmp_path/"no.h5") | options
    if "outs" in options: arguments["outs"] = outs/options["outs"]
    with pytest.raises(BadInput, match=message) as error: import_visium(**arguments)
    assert "\n" not in str(error.value) and not (tmp_path/"no.h5").exists()


def test_an_existing_file_is_not_replaced_unasked(painted, tmp_path):
    (tmp_path/"a.h5").write_text("something else")
    with pytest.raises(BadInput, match="exists; add this slide"):
        import_visium(painted[0], painted[2], tmp_path/"a.h5")
    with pytest.raises(BadInput, match="not a readable HDF5"):
        import_visium(painted[0], painted[2], tmp_path/"a.h5", append=True)
    assert (tmp_path/"a.h5").read_text() == "something else"


def test_the_wrong_picture_is_noticed(outs, tmp_path):
    hires = outs/"outs/spatial/tissue_hires_image.png"
    glass = Image.new("RGB", Image.open(hires).size, (252, 252, 252))
    glass.save(hires)
    with pytest.raises(BadInput, match="is one flat colour"): import_visium(outs, None, tmp_path/"a.h5", split="Test")
    glass.putpixel((3, 3), (250, 240, 250))                                                # not quite flat
    glass.save(hires)
    result = import_visium(outs, outs/"proportions.csv", tmp_path/"a.h5")
    assert any("lie on tissue" in w for w in result.warnings)


def damaged(data, rng):
    "Some bytes replaced, the end cut off, some bytes doubled, or a sign put in."
    data, at, n = bytearray(data), int(rng.integers(len(data))), int(rng.integers(1, 40))
    kind = rng.integers(4)
    if kind == 0: data[at:at + n] = rng.bytes(min(n, len(data) - at))
    elif kind == 1: del data[at:]
    elif kind == 2: data[at:at] = data[at:at + n]
    else: data[at:at + 1] = rng.choice([b",", b"\n", b"-", b"nan", b'"', b"e9", b"\0", b"\t"])
    return bytes(data)


def test_damage_at_random_gives_a_line_or_a_good_file(outs, tmp_path):
    "Bytes of each file changed, cut and doubled: an import says what is wrong, or what it writes can be opened."
    rng, spatial = np.random.default_rng(0), outs/"outs/spatial"
    files = [outs/"proportions.csv", spatial/"tissue_positions.csv", spatial/"scalefactors_json.json"]
    for i in range(150):
        file = files[i % 3]
        whole = file.read_bytes()
        file.write_bytes(damaged(whole, rng))
        try: import_visium(outs, outs/"proportions.csv", tmp_path/"a.h5", overwrite=True)
        except BadInput as e: assert "\n" not in str(e)
        else: DataFactory(tmp_path/"a.h5")
        file.write_bytes(whole)


# ---- .h5ad ----
@pytest.fixture
def two_slides(painted, tmp_path):
    "A factory with two training slides."
    for k in range(2): import_visium(painted[0], painted[2] * (k + 1), tmp_path/"two.h5", append=True)
    return DataFactory(tmp_path/"two.h5")


def with_tables(path):
    "The predictions of an .h5ad once more as a table of obsm, as a bare array, and as columns of obs."
    with h5py.File(path, "a") as h5:
        values, types = h5["X"][()], as_texts(h5["var/_index"][()])
        table = pd.DataFrame(values, columns=types, index=as_texts(h5["obs/_index"][()]))
        put_element(h5["obsm"], "prop", table)
        put_element(h5["obsm"], "bare", values)
        columns = [f"type {t}" for t in types]
        for name, column in zip(columns, values.T): put_element(h5["obs"], name, column)
        h5["obs"].attrs["column-order"] = [*h5["obs"].attrs["column-order"], *columns]


@pytest.fixture
def h5ad(two_slides, tmp_path):
    "Two slides as .h5ad."
    path = write_h5ad(tmp_path/"p.h5ad", two_slides, two_slides.spots[two_slides.targets])
    with_tables(path)
    return path


@pytest.mark.parametrize("key", ["prop", "obs:type "])
def test_h5ad_round_trip(key, h5ad, two_slides, tmp_path):
    want = two_slides.spots[two_slides.spots.slide.eq("S_2")]
    import_visium(h5ad, key, tmp_path/"b.h5", library="S_2")
    back = DataFactory(tmp_path/"b.h5")
    columns = ["x", "y", *back.targets]
    assert np.array_equal(back.spots[columns], want[columns]) and back.cell_types == list(PAINTED_TYPES)
    assert np.array_equal(back.read_slide("S_1"), two_slides.read_slide("S_2"))
    assert np.isclose(back.slides["S_1"].um_per_px, two_slides.slides["S_2"].um_per_px)


def test_an_h5ad_of_several_slides_is_asked_which(h5ad, tmp_path):
    with pytest.raises(BadInput, match="choose one with library"): import_visium(h5ad, "prop", tmp_path/"b.h5")
    with pytest.raises(BadInput, match="did you mean 'S_2'"): read_h5ad_slide(h5ad, "s_2")
    import_visium(h5ad, None, tmp_path/"t.h5", library="S_1", split="Test")


NO_TABLE = [("propp", "did you mean 'prop'"), ("bare", "without names"), ("obs:none", "no column of obs begins"),
    (None, "needs targets")]


@pytest.mark.parametrize("key,message", NO_TABLE)
def test_h5ad_without_such_a_table(key, message, h5ad, tmp_path):
    with pytest.raises(BadInput, match=message): import_visium(h5ad, key, tmp_path/"c.h5", library="S_2")


def test_h5ad_that_cannot_be_read(tmp_path):
    h5py.File(tmp_path/"empty.h5ad", "w").close()
    (tmp_path/"text.h5ad").write_text("no")
    for name, message in (("empty", "has no obs"), ("text", "not a readable HDF5")):
        with pytest.raises(BadInput, match=message): import_visium(tmp_path/f"{name}.h5ad", "a", tmp_path/"b.h5")


def test_h5ad_of_predictions_that_do_not_fit(two_slides, tmp_path):
    n = len(two_slides.spots)
    for values, names, message in (
        (np.ones((n - 1, 8)), None, "fit neither"),
        (np.ones((n, 7)), None, "have shape"),
        (np.full((n, 8), np.nan), None, "not finite"),
        (np.ones((n, 8)), ["S_9"], "unknown slide")):
        with pytest.raises(BadInput, match=message): write_h5ad(tmp_path/"no.h5ad", two_slides, values, names)
    assert not (tmp_path/"no.h5ad").exists()


def test_a_large_slide_gets_a_smaller_picture(painted, tmp_path, monkeypatch):
    import_visium(painted[0], painted[2], tmp_path/"a.h5", image=painted[0]/"full_resolution.tif")
    factory = DataFactory(tmp_path/"a.h5")
    entry = library_entry(factory, "S_1", most=200)
    factors = entry["scalefactors"]
    assert max(entry["images"]["hires"].shape) == 200
    assert np.isclose(factors["tissue_hires_scalef"], 200 / 800, rtol=.02)
    assert np.isclose(factors["spot_diameter_fullres"] * factory.slides["S_1"].um_per_px, 55)


def test_anndata_reads_what_is_written(two_slides, tmp_path):
    anndata = need("anndata")
    values = np.random.default_rng(0).random((len(two_slides.spots), 8))
    a = anndata.read_h5ad(write_h5ad(tmp_path/"a.h5ad", two_slides, values))
    assert np.array_equal(a.X, values) and list(a.var_names) == list(PAINTED_TYPES)
    assert np.array_equal(a.obsm["spatial"], two_slides.spots[["x", "y"]])
    assert np.array_equal(a.layers["abundance"], two_slides.spots[two_slides.targets])
    assert a.obs_names.is_unique and a.obs_names[0].startswith("S_1_") and a.obs_names[0].endswith("-1")
    assert str(a.obs.library_id.dtype) == "category" and list(a.uns["spatial"]) == ["S_1", "S_2"]
    first = a.uns["spatial"]["S_1"]
    assert np.array_equal(first["images"]["hires"], two_slides.read_slide("S_1"))
    assert first["scalefactors"]["tissue_hires_scalef"] == 1


def test_what_anndata_writes_is_read(two_slides, tmp_path):
    anndata = need("anndata")
    values = np.random.default_rng(0).random((len(two_slides.spots), 8))
    a = anndata.read_h5ad(write_h5ad(tmp_path/"a.h5ad", two_slides, values))
    columns = [f"q05cell_abundance_w_sf_{t}" for t in PAINTED_TYPES]
    a.obsm["q05_cell_abundance_w_sf"] = pd.DataFrame(a.X, index=a.obs_names, columns=columns)
    a.obsm["means"], a.uns["mod"] = a.X, dict(factor_names=np.array(PAINTED_TYPES))
    for name, column in zip(columns, values.T): a.obs[name] = column
    a.write_h5ad(tmp_path/"b.h5ad")
    for key in ("q05_cell_abundance_w_sf", "means", "obs"):
        import_visium(tmp_path/"b.h5ad", key, tmp_path/"b.h5", library="S_1", overwrite=True)
        b = DataFactory(tmp_path/"b.h5")
        assert np.allclose(b.spots[b.targets], values[:len(values) // 2]) and b.cell_types == list(PAINTED_TYPES)


def finished_run(folder, data):
    "A run folder: out-of-fold predictions that are the truth, a submission that counts the spots."
    factory = DataFactory(data)
    train, test = (factory.spots[factory.spots.split.eq(p)] for p in ("Train", "Test"))
    folder.mkdir()
    (folder/"run.json").write_text(json.dumps(dict(parameters=dict(data_path=data))))
    factory.spots.assign(on_tissue=True, fold=0).to_parquet(folder/"spots.parquet")
    answer = pd.DataFrame(np.arange(len(test))[:, None] * np.ones(35) + .5, columns=factory.targets)
    answer.rename_axis("ID").reset_index().to_csv(folder/"submission.csv", index=False)
    held = train[["slide", "ID", "x", "y", *factory.targets]].sample(frac=1, random_state=0)
    held.to_parquet(folder/"oof.parquet")
    return factory, folder


def test_export_of_a_run(demo_file, tmp_path):
    factory, run = finished_run(tmp_path/"run", demo_file)
    export_run(run, tmp_path/"a.h5ad")
    test = factory.spots.split.eq("Test").to_numpy()
    with h5py.File(tmp_path/"a.h5ad") as h5:
        assert np.allclose(h5["X"][~test], factory.spots.loc[~test, factory.targets])
        assert np.allclose(h5["X"][test, 0], np.arange(test.sum()) + .5)
        assert set(as_texts(h5["obs/predicted"][()])) == {"submission", "out of fold"}
        assert set(h5["uns/spatial"]) == set(factory.slides)


def test_a_run_without_held_out_predictions_exports_its_test_slides(demo_file, tmp_path):
    factory, run = finished_run(tmp_path/"run", demo_file)
    (run/"oof.parquet").unlink()
    export_run(run, tmp_path/"b.h5ad")
    with h5py.File(tmp_path/"b.h5ad") as h5: assert list(h5["uns/spatial"]) == factory.names("Test")
    (run/"run.json").unlink()
    with pytest.raises(BadInput, match="has no run.json"): export_run(run, tmp_path/"c.h5ad")


def test_a_run_can_be_explored(demo_file, tmp_path):
    scene = Scene(finished_run(tmp_path/"run", demo_file)[1])
    assert "score" in scene.kinds and np.isfinite(scene.predicted).all()

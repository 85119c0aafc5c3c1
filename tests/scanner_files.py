"""Small slides in the formats of scanners, written byte by byte as OpenSlide's documentation describes them."""
import io
import struct
from pathlib import Path

import tifffile
from PIL import Image

UM = .5                      # micrometres a pixel of every slide here


def levels(pixels, n=2):
    "A picture and its copies of half the size."
    return [pixels[::2**i, ::2**i] for i in range(n)]


def write_svs(path, pixels):
    "Aperio: a TIFF of tiles with a line of text in it."
    text = f"Aperio Image Library v11\r\n[0,0 9x9] (256x256)|AppMag = 20|MPP = {UM}"
    with tifffile.TiffWriter(path) as file:
        how = dict(compression="lzw", photometric="rgb", description=text, metadata=None)
        for i, level in enumerate(levels(pixels)):
            file.write(level, tile=(256, 256), **how)
            if i == 0: file.write(pixels[::16, ::16], rowsperstrip=16, **how)        # the thumbnail comes second
    return path


def write_ndpi(path, pixels):
    "Hamamatsu: each level one strip of JPEG, with the maker's tags."
    per_cm = (round(1e4 / UM), 1)
    with tifffile.TiffWriter(path) as file:
        for i, level in enumerate(levels(pixels)):
            lens = 20. / 2**i
            own = [(271, "s", 0, "Hamamatsu", True), (65420, "I", 1, 1, True), (65421, "f", 1, lens, True),
                (65422, "i", 1, 0, True), (65423, "i", 1, 0, True), (65424, "i", 1, 0, True)]
            file.write(level, rowsperstrip=len(level), compression="jpeg", compressionargs=dict(level=98),
                photometric="rgb", subsampling=(1, 1), extratags=own, metadata=None,
                resolution=(per_cm[0] / 2**i,) * 2, resolutionunit="CENTIMETER")
    return path


def _scn_image(name, size_um, offset, dimensions):
    "An image of a Leica collection: the area in nm, and a directory for each level."
    nm = [round(1000 * v) for v in size_um]
    rows = "".join(f'<dimension sizeX="{w}" sizeY="{h}" r="{r}" ifd="{ifd}"/>' for r, (w, h, ifd) in
        enumerate(dimensions))
    w, h, _ = dimensions[0]
    view = f'<view sizeX="{nm[0]}" sizeY="{nm[1]}" offsetX="{offset}" offsetY="{offset}"/>'
    light = "<illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings>"
    settings = f"<objectiveSettings><objective>20</objective></objectiveSettings>{light}"
    return (f'<image name="{name}" uuid="{name}"><pixels sizeX="{w}" sizeY="{h}">{rows}</pixels>{view}'
        f"<scanSettings>{settings}</scanSettings></image>")


def write_scn(path, pixels):
    "Leica: a BigTIFF of tiles, with an overview and a slide described in XML."
    parts = [pixels[::8, ::8], *levels(pixels)]
    h, w = pixels.shape[:2]
    size = w * UM, h * UM
    whole = [2 * v for v in size]                 # the overview sees more than the slide
    overview = _scn_image("macro", whole, 0, [(parts[0].shape[1], parts[0].shape[0], 0)])
    dims = [(p.shape[1], p.shape[0], i + 1) for i, p in enumerate(parts[1:])]
    slide = _scn_image("slide", size, 1000, dims)
    across = f'sizeX="{round(whole[0] * 1000)}" sizeY="{round(whole[1] * 1000)}"'
    text = (f'<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="u">'
        f'<collection name="c" uuid="c" {across}><barcode>Y29kZQ==</barcode>{overview}{slide}</collection></scn>')
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for i, part in enumerate(parts):
            per_cm = 1e4 / UM / (1, 1, 2)[i]
            file.write(part, tile=(256, 256), compression="jpeg", compressionargs=dict(level=98), photometric="rgb",
                subsampling=(1, 1), description=text if i == 0 else None, metadata=None,
                resolution=(per_cm, per_cm), resolutionunit="CENTIMETER")
    return path


_INI = """[GENERAL]
SLIDE_VERSION = 01.02
SLIDE_ID = {id}
IMAGENUMBER_X = {nx}
IMAGENUMBER_Y = {ny}
OBJECTIVE_MAGNIFICATION = 20
CameraImageDivisionsPerSide = 1
[HIERARCHICAL]
INDEXFILE = Index.dat
HIER_COUNT = 1
NONHIER_COUNT = 0
HIER_0_NAME = Slide zoom level
HIER_0_COUNT = 1
HIER_0_VAL_0 = ZoomLevel_0
HIER_0_VAL_0_SECTION = LAYER_0_LEVEL_0_SECTION
[DATAFILE]
FILE_COUNT = 1
FILE_0 = Data0000.dat
[LAYER_0_LEVEL_0_SECTION]
OVERLAP_X = 0
OVERLAP_Y = 0
MICROMETER_PER_PIXEL_X = {um}
MICROMETER_PER_PIXEL_Y = {um}
IMAGE_FILL_COLOR_BGR = 16777215
DIGITIZER_WIDTH = {tile}
DIGITIZER_HEIGHT = {tile}
IMAGE_FORMAT = JPEG
IMAGE_CONCAT_FACTOR = 0
"""


def _jpeg(part):
    out = io.BytesIO()
    Image.fromarray(part).save(out, "JPEG", quality=98, subsampling=0)
    return out.getvalue()


def write_mrxs(path, pixels, tile=256):
    "3DHISTECH: a preview that carries the name, and a folder with an index and the tiles."
    path, slide_id = Path(path), "0" * 32
    folder = path.with_suffix("")
    folder.mkdir()
    ny, nx = pixels.shape[0] // tile, pixels.shape[1] // tile
    head = b"head"                                     # no tile begins at the first byte
    data, records = head, []
    for i in range(ny * nx):
        y, x = divmod(i, nx)
        packed = _jpeg(pixels[y * tile:(y + 1) * tile, x * tile:(x + 1) * tile])
        records.append(struct.pack("<4i", i, len(data), len(packed), 0))
        data += packed
    start = len("01.02") + len(slide_id)
    levels_at, page_at = start + 8, start + 8 + 4
    body = struct.pack("<3i", levels_at, 0, page_at)
    body += struct.pack("<4i", 0, page_at + 8, len(records), 0) + b"".join(records)
    (folder/"Index.dat").write_bytes(b"01.02" + slide_id.encode() + body)
    (folder/"Data0000.dat").write_bytes(data)
    (folder/"Slidedat.ini").write_text(_INI.format(id=slide_id, nx=nx, ny=ny, um=UM, tile=tile))
    path.write_bytes(_jpeg(pixels[::16, ::16]))
    return path


WRITERS = dict(svs=write_svs, ndpi=write_ndpi, scn=write_scn, mrxs=write_mrxs)

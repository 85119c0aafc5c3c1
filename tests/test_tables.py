"Tables of cell types as people's tools write them: read as the same table, or refused in a line that names the choice."
import gzip

import numpy as np
import pandas as pd
import pytest

from histokit.core.table import read_text_table
from histokit.core.text import BadInput
from histokit.spots.columns import doubtful_types, is_no_type, like_positions
from histokit.spots.tables import Choice, as_proportions, lies_sideways, match_barcodes

RNG = np.random.default_rng(0)
N, TYPES = 60, ["Tumour", "T cells, CD4", "B cells", "Größe µ", "NA", "1"]
BARCODES = ["".join(RNG.choice(list("ACGT"), 16)) + "-1" for _ in range(N)]
AMOUNTS = pd.DataFrame(RNG.dirichlet(np.ones(6), N) * RNG.uniform(2, 20, (N, 1)), BARCODES, TYPES).round(6)
PARTS = AMOUNTS.div(AMOUNTS.sum(axis=1), axis=0)
ROWS = AMOUNTS.rename_axis("barcode")
LONG = ROWS.reset_index().melt("barcode", var_name="cell_type", value_name="proportion")


def read(path, sample="", **choice):
    "The table of a file, as an import reads it."
    return as_proportions(read_text_table(path, row_names="barcode"), path.name, sample, Choice(**choice))


def german(v): return f"{v:.6f}".replace(".", ",")


SAME = {
    "capital ending": lambda p: ROWS.to_csv(p/"T.CSV"),
    "tabs, gzipped, capital": lambda p: (p/"T.TSV.GZ").write_bytes(gzip.compress(ROWS.to_csv(sep="\t").encode())),
    "byte order mark and CRLF": lambda p: ROWS.to_csv(p/"t.csv", encoding="utf-8-sig", lineterminator="\r\n"),
    "old Mac's line ends": lambda p: (p/"t.csv").write_text(ROWS.to_csv().replace("\n", "\r"), newline=""),
    "UTF-16 of Excel": lambda p: ROWS.to_csv(p/"t.txt", sep="\t", encoding="utf-16"),
    "decimal commas": lambda p: ROWS.to_csv(p/"t.csv", sep=";", decimal=","),
    "decimal commas in quotes": lambda p: ROWS.map(german).to_csv(p/"t.csv"),
    "Excel's line": lambda p: (p/"t.csv").write_text("sep=;\n" + ROWS.to_csv(sep=";", decimal=",")),
    "bars": lambda p: ROWS.to_csv(p/"t.csv", sep="|"),
    "empty lines first": lambda p: (p/"t.csv").write_text("\n\n" + ROWS.to_csv()),
    "a separator at each end": lambda p: (p/"t.csv").write_text(ROWS.to_csv(sep=";").replace("\n", ";\n")),
    "scientific": lambda p: ROWS.to_csv(p/"t.csv", float_format="%.9E"),
    "long": lambda p: LONG.to_csv(p/"t.csv", index=False),
    "long, German": lambda p: LONG.to_csv(p/"t.csv", index=False, sep=";", decimal=","),
    "numbers of rows too": lambda p: ROWS.reset_index().to_csv(p/"t.csv"),
    "Parquet, capital": lambda p: AMOUNTS.to_parquet(p/"T.PARQUET"),
}


@pytest.mark.parametrize("how", SAME)
def test_the_same_table_however_it_is_written(how, tmp_path):
    SAME[how](tmp_path)
    table, said = read(next(tmp_path.iterdir()))
    assert list(table) == TYPES and np.allclose(table.loc[BARCODES], AMOUNTS)
    assert "6 cell types: Tumour, 'T cells, CD4', B cells, Größe µ, NA, 1" in said


def first(value): return lambda t: t.astype(object).assign(Tumour=[value, *t.Tumour[1:]])


def numbered(k): return ROWS.rename(index=lambda b: b[:-1] + str(k))


REFUSED = {      # name -> rows to write, options of to_csv, what is said
    "another encoding": (ROWS, dict(encoding="cp1252"), "line 1 is not UTF-8.*save it as CSV UTF-8"),
    "UTF-16 without a mark": (ROWS, dict(encoding="utf-16-le"), "zero bytes"),
    "perhaps thousands": ((ROWS * 3000).map(lambda v: f"{v + 1000:,.0f}"), dict(sep=";"), "may be .* or .*; write"),
    "thousands": ((ROWS * 3000).map(lambda v: f"{v + 1000:,.2f}"), {}, "in a form that is not read here"),
    "Swiss thousands": ((ROWS * 3000 + 1000).map(lambda v: f"{v:,.2f}".replace(",", "'")), {}, "in a form that"),
    "both commas and points": (ROWS.assign(Tumour=ROWS.Tumour.map(german)), {}, "with a comma, column .* with a point"),
    "one in percent": (ROWS.assign(Tumour=ROWS.Tumour.map("{:.2f}%".format)), {}, "is in percent, column .* is not"),
    "one cell in percent": (first("5%")(ROWS), {}, "mixes numbers and words: row 0 is '5%'"),
    "stray text": (first("n.d.")(ROWS), {}, "row 0 is 'n.d.'"),
    "a date": (first("01. Mai")(ROWS), {}, "row 0 is '01. Mai'"),
    "Excel's error": (first("#DIV/0!")(ROWS), {}, "row 0 is '#DIV/0!'"),
    "errors only": (ROWS.assign(Tumour="#REF!"), {}, "holds errors only"),
    "not available": (ROWS.mask(ROWS < .1), dict(na_rep="#N/A"), "not a finite number"),
    "infinite": (first("inf")(ROWS), {}, "not a finite number"),
    "below a limit": (ROWS.assign(Tumour="<0.01"), {}, "in a form that is not read here"),
    "an empty column": (ROWS.assign(note=""), {}, "'note' of .* is nan.*leave the column out with without"),
    "type twice": (ROWS.rename(columns={"B cells": "Tumour"}), {}, "column 'Tumour' is there 2 times"),
    "type renamed": (ROWS.rename(columns={"B cells": "Tumour.1"}), {}, "'Tumour.1' may be the name before it twice"),
    "no names": (ROWS, dict(header=False), "begins with a row and not with names"),
    "no barcodes": (ROWS, dict(index=False), "no column holds barcodes"),
    "a row without a barcode": (ROWS.rename(index={BARCODES[3]: ""}), {}, "row 3 has no barcode"),
    "rows twice": (pd.concat([ROWS, ROWS[:2]]), {}, "given twice \\(2 such rows\\); keep one of each"),
    "one type": (ROWS[["Tumour"]], {}, "only 'Tumour' is left"),
    "samples 1 and 2": (pd.concat([numbered(1), numbered(2)]), {}, "2 samples .*'…-1' 60 times, '…-2' 60.*with sample"),
    "parts of two": (pd.concat([numbered(1)[:30], numbered(2)[30:]]), {}, "2 samples"),
    "a few of another": (pd.concat([numbered(1), numbered(2)[:2]]), {}, "2 samples"),
    "two libraries": (ROWS.assign(library_id=["a"] * 40 + ["b"] * 20), {}, "library_id names 2 samples \\(a, b\\)"),
    "two batches": (ROWS.assign(batch=[0] * 40 + [1] * 20), {}, "batch names 2 samples \\(0, 1\\)"),
    "a name is missing": (LONG.set_index("barcode").replace("NA", ""), {}, "row 240 names no type"),
    "two columns of values": (LONG.assign(weight=1.).set_index("barcode"), {}, "which column of proportion, weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused_in_one_line(case, tmp_path):
    rows, how, words = REFUSED[case]
    rows.to_csv(tmp_path/"t.csv", **how)
    with pytest.raises(BadInput, match=words) as error: read(tmp_path/"t.csv")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sample,factor", [("2", 3), ("-2", 3), ("1", 1)])
def test_one_sample_of_an_aggregate(sample, factor, tmp_path):
    pd.concat([numbered(1), 3 * numbered(2)]).to_csv(tmp_path/"t.csv")
    table, said = read(tmp_path/"t.csv", sample)
    assert np.allclose(table, factor * AMOUNTS) and f"sample '{sample}' (by the barcodes): 60 of 120 rows" in said
    with pytest.raises(BadInput, match="around its barcodes stand '…-1', '…-2'"): read(tmp_path/"t.csv", "3")


def test_a_sample_is_a_name_and_no_piece_of_a_barcode(tmp_path):
    named = [ROWS.rename(index=lambda b, k=k: f"{k}_{b}") for k in ("A", "B")]
    pd.concat([named[0], 2 * named[1]]).to_csv(tmp_path/"t.csv")
    assert np.allclose(read(tmp_path/"t.csv", "B")[0], 2 * AMOUNTS)
    for sample in ("1", "C"):
        with pytest.raises(BadInput, match="2 samples|no row of sample"): read(tmp_path/"t.csv", sample)
    ROWS.assign(sample=[1] * 40 + [2] * 20).to_csv(tmp_path/"n.csv")
    assert len(read(tmp_path/"n.csv", "2")[0]) == 20


NO_TYPES = dict(total_counts=RNG.integers(500, 9000, N), nUMI=RNG.integers(500, 9000, N), percent_mito=RNG.random(N),
    x_um=RNG.random(N), n_nuclei=RNG.integers(1, 9, N), cells_seen=RNG.integers(1, 9, N), dose=.5, flag=[0, 1] * 30,
    everything=AMOUNTS.sum(axis=1), depth=RNG.uniform(900, 9000, N), leiden=3, text="x", truth=True, date="2024-01-05")


@pytest.mark.parametrize("name", NO_TYPES)
@pytest.mark.parametrize("table", [AMOUNTS, PARTS])
def test_a_column_that_is_no_type_is_left_out_or_asked_about(name, table, tmp_path):
    table.assign(**{name: NO_TYPES[name]}).to_csv(tmp_path/"t.csv")
    try: found, said = read(tmp_path/"t.csv")
    except BadInput as e: assert f"'{name}'" in str(e) and "leave columns out with without" in str(e)
    else: assert list(found) == TYPES and f"columns left out: {name}" in said
    assert list(read(tmp_path/"t.csv", without=(name,))[0]) == TYPES
    assert read(tmp_path/"t.csv", types="B cells,Tumour")[0].columns.tolist() == ["B cells", "Tumour"]


def test_good_tables_are_not_doubted():
    counts, one_high = pd.DataFrame(RNG.poisson(2, (N, 6))), AMOUNTS * [9, 1, 1, 1, 1, 1]
    for good in (AMOUNTS, PARTS, 100 * PARTS, PARTS.round(2), counts, AMOUNTS.assign(none=0.), one_high):
        assert doubtful_types(good) == {} and like_positions(good, RNG.random((N, 2))) == []
    for name in ("T cells", "PC", "NK", "Cluster 3", "X-linked", "1", "Total T", "pDC"): assert not is_no_type(name)


def test_a_position_is_seen_by_the_slide():
    xy = RNG.uniform(0, 900, (N, 2))
    assert like_positions(AMOUNTS.assign(a=xy @ [.001, .002], b=xy[:, 0] / 900), xy) == ["a", "b"]


@pytest.mark.parametrize("change", [str.lower, lambda b: b[:-2], lambda b: b.replace("-", "."), lambda b: f" {b}",
    lambda b: f"S1:{b}", lambda b: f"{b}_7"])
def test_barcodes_however_they_are_written(change):
    other = [change(b) for b in BARCODES]
    assert match_barcodes(BARCODES, other, "t")[0].tolist() == list(range(N)) and lies_sideways(other, BARCODES)

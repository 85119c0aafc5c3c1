"What the core pages cannot say about themselves: oracles, properties, damaged files, and forms of every kind."
import base64, gzip, hashlib, io, json, os, re, subprocess, sys, warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from matplotlib.figure import Figure
from PIL import Image
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, StratifiedGroupKFold, StratifiedKFold

from histokit.core.checks import error, from_error, html_findings, note, raise_errors, show_findings, warning
from histokit.core.compute import pick_device, seed_everything
from histokit.core.files import file_fingerprint, file_sha256, plain, read_json, sha256_of, write_json, write_text
from histokit.core.page import Html, card, data_uri, escaped, html_gallery, html_table, inline_png, page
from histokit.core.splits import check_folds, each_fold, group_folds, leave_one_out, repeated, stratified_folds
from histokit.core.submission import AnswerForm, check_submission, counted_form, form_of_template
from histokit.core.submission import read_submission, write_submission
from histokit.core.table import ItemColumns, number_column, read_items, read_text_table
from histokit.core.text import BadInput, did_you_mean, numbers, one_line, parse_args, some_of


def refusal(f, *args, **options):
    "The one line that a call is refused with."
    with pytest.raises(BadInput) as e: f(*args, **options)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


# text

@given(st.lists(st.integers(-10**9, 10**9), max_size=6))
def test_numbers_come_back_from_text(values):
    assert numbers(",".join(map(str, values)), "sizes", int) == tuple(values) == numbers(values, "sizes", int)


NAMES, LITERALS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.integers() | st.booleans() | st.none()

@given(st.dictionaries(NAMES, LITERALS, max_size=5))
def test_arguments_come_back_from_text(arguments):
    assert parse_args(", ".join(f"{k}={v}" for k, v in arguments.items())) == arguments


def test_names_in_messages():
    assert did_you_mean("SMOOTHING", ["smoothing"]) == " (did you mean 'smoothing'?)"
    assert some_of(range(5)) == "0, 1, 2, …" and some_of("ab") == "a, b"
    assert one_line(BadInput("a\n  b")) == "a b" and one_line(RuntimeError()) == "RuntimeError"


def test_devices():
    assert pick_device("cpu") == "cpu" and "did you mean 'cpu'" in refusal(pick_device, "cpi")
    for device in ("cuda:99", "cuda:x", "mps:7"): assert "use device=auto" in refusal(pick_device, device)
    seed_everything(2**40)
    assert 0 <= np.random.rand() < 1  # noqa: NPY002


# files: one hash

def stream(*parts): return hashlib.sha256(b"".join(parts)).hexdigest()

def test_hash_of_values_is_what_its_page_says():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert sha256_of(a) == stream(b"float32 (2, 3) 24\n", a.tobytes())
    assert sha256_of("ab", b"c") == stream(b"text 2\nab", b"bytes 1\nc")
    text = json.dumps(dict(b=1, a=[2.5, None]), sort_keys=True).encode()
    assert sha256_of(dict(b=1, a=[2.5, None])) == stream(f"json {len(text)}\n".encode(), text)


@given(st.lists(st.text(max_size=3), max_size=4), st.lists(st.text(max_size=3), max_size=4))
def test_joined_text_is_not_taken_for_other_text(a, b):
    assert (sha256_of(*a) == sha256_of(*b)) == (a == b)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64", "bool"])
def test_hash_of_tensors_is_that_of_arrays(dtype):
    a = np.arange(12).reshape(3, 4).astype(dtype)
    t = torch.from_numpy(a)
    assert sha256_of(a) == sha256_of(t) == sha256_of(np.asfortranarray(a)) == sha256_of(t.T.contiguous().T)
    assert sha256_of(a.T) != sha256_of(a) != sha256_of(a.ravel())


def test_hash_of_odd_values():
    assert sha256_of(torch.tensor(3., requires_grad=True)) == sha256_of(np.array(3., np.float32))
    assert len({sha256_of(v) for v in (float("nan"), float("inf"), None, "NaN", 0, "", [], {})}) == 8
    assert sha256_of(np.array(["a", 1], object)) == sha256_of(["a", 1])
    half = [torch.ones(2, dtype=t) for t in (torch.float16, torch.bfloat16)]
    assert sha256_of(half[0]) != sha256_of(half[1])
    assert sha256_of(np.empty((0, 3))) != sha256_of(np.empty((3, 0)))
    with pytest.raises(TypeError): sha256_of(object())


def test_hash_is_the_same_in_every_process():
    code = "from histokit.core.files import sha256_of; print(sha256_of({'b', 'a', 'c'}, dict(x={3, 1, 2})))"
    run = lambda seed: subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True, text=True, check=True).stdout
    assert run("1") == run("2")


def test_hash_of_files(tmp_path):
    file = tmp_path/"a"
    file.write_bytes(os.urandom(3 << 20))
    assert file_sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    whole, pieces = file_fingerprint(file), file_fingerprint(file, whole=1000)
    assert whole != pieces and whole == file_fingerprint(file) and pieces == file_fingerprint(file, whole=1000)
    data = bytearray(file.read_bytes())
    data[1 << 20] ^= 1
    file.write_bytes(data)
    assert file_fingerprint(file) != whole and file_fingerprint(file, whole=1000) != pieces


def test_text_is_utf8_whatever_the_locale(tmp_path):
    assert write_text(tmp_path/"a.txt", "µ–…").read_bytes() == "µ–…".encode()
    assert read_json(write_json(tmp_path/"a.json", {"µ": {2, 1}})) == {"µ": [1, 2]}
    assert plain([np.float32("nan")]) == [None] and np.isnan(plain([np.float32("nan")], finite=False)[0])
    with pytest.raises(RuntimeError):
        from histokit.core.files import atomic
        with atomic(tmp_path/"a.txt") as tmp:
            tmp.write_text("half")
            raise RuntimeError
    assert (tmp_path/"a.txt").read_text(encoding="utf-8") == "µ–…" and len(list(tmp_path.iterdir())) == 2


# tables

@pytest.mark.parametrize("separator", [",", ";", "\t", "  "])
@pytest.mark.parametrize("packed", [False, True])
def test_any_separator(tmp_path, separator, packed):
    lines = [["case", '"a, b; c"', "n"], ["007", "x", "1"], ["012", "y", "2"]]
    text = "\ufeff" + "\n".join(separator.join(line) for line in lines) + "\n"
    if separator == "  ": text = text.replace(", b; c", "_b")
    file = tmp_path/f"a.csv{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    table = read_text_table(file)
    assert table.case.tolist() == ["007", "012"] and table.n.tolist() == ["1", "2"]


def test_row_names_get_the_name_that_is_asked_for(tmp_path):
    (tmp_path/"r.csv").write_text("a,b\nx,1,2\ny,3,4\n")
    assert list(read_text_table(tmp_path/"r.csv", row_names="barcode")) == ["barcode", "a", "b"]
    assert "give every column a name" in refusal(read_text_table, tmp_path/"r.csv", row_names="a")
    (tmp_path/"two.csv").write_text("a,b\nx,1,2,3\n")
    assert "give every column a name" in refusal(read_text_table, tmp_path/"two.csv")


def test_damaged_tables_are_bad_input(tmp_path):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(case=["a", "b"] * 30, n=range(60)))
    table.to_parquet(tmp_path/"t.parquet")
    table.to_csv(tmp_path/"t.csv.gz")
    for name in ("t.parquet", "t.csv.gz"):
        whole = (tmp_path/name).read_bytes()
        for _ in range(60):
            data = bytearray(whole[:rng.integers(1, len(whole) + 1)])
            for i in rng.integers(0, len(data), 4): data[i] = rng.integers(256)
            (tmp_path/name).write_bytes(data)
            try: read_text_table(tmp_path/name)
            except BadInput as e: assert len(str(e).splitlines()) == 1
    (tmp_path/"nothing.csv").write_text("")
    assert "is not a readable table" in refusal(read_text_table, tmp_path/"nothing.csv")
    assert "is not a readable table" in refusal(read_text_table, tmp_path)


def test_a_column_of_numbers():
    assert number_column(pd.Series([1, 2]), "a").dtype == np.float64
    for bad in ("x", None, "inf", ""):
        assert "column n of row 1" in refusal(number_column, pd.Series(["1", bad], name="n"), "a.csv")


@pytest.fixture
def items(tmp_path):
    "A table of items with their files; IDs and patients are numbers in Parquet."
    paths = [f"{name}.png" for name in "abcd"]
    for path in paths: (tmp_path/path).touch()
    known = dict(label=list("xyyx"), age=[50., np.nan, 61, 7], patient=[1, 1, 2, 3])
    return pd.DataFrame(dict(id=[3, 1, 2, 10], path=paths, **known))


def test_items_from_parquet(tmp_path, items):
    items.to_parquet(tmp_path/"items.parquet")
    read = read_items(tmp_path/"items.parquet", ItemColumns(labels=("label", "age"), groups=("patient",)))
    assert list(read) == ["id", "path", "label", "age", "patient"] and read.id.tolist() == ["3", "1", "2", "10"]
    assert read.patient.tolist() == ["1", "1", "2", "3"] and np.array_equal(read.age, items.age, equal_nan=True)
    assert all(Path(p).is_file() for p in read.path)
    folds = group_folds(read.patient)
    check_folds(folds, read.patient)


BAD_ITEMS = {
    "is missing": dict(patient=[1, None, 2, 3]),
    "is there twice": dict(id=[1, 1, 2, 3]),
    "no column 'label'": None,
    "gone.png does not exist \\(1 of 4 files\\)": dict(path=["a.png", "b.png", "c.png", "gone.png"]),
    "column label of row 3": dict(label=["x", "y", "x", None]),
}

@pytest.mark.parametrize("message", BAD_ITEMS)
def test_bad_items(tmp_path, items, message):
    change = BAD_ITEMS[message]
    table = items.drop(columns="label") if change is None else items.assign(**change)
    table.to_csv(tmp_path/"items.csv", index=False)
    said = refusal(read_items, tmp_path/"items.csv", ItemColumns(labels=("label",), groups=("patient",)))
    assert re.search(message, said) and "items.csv" in said


# splits

def sets_of(fold): return {frozenset(np.flatnonzero(fold == k)) for k in np.unique(fold)}
def oracle_sets(splitter, labels, groups=None): return {frozenset(h) for _, h in splitter.split(labels, labels, groups)}

def dealt(groups, folds):
    "Leave-one-group-out or dealt folds, written as they were before this page."
    sizes = pd.DataFrame(dict(g=groups)).groupby("g", sort=False).size()
    n = folds or len(sizes)
    if n == len(sizes): return pd.Series(groups).map({g: k for k, g in enumerate(sizes.index)}).to_numpy()
    load, of = np.zeros(n, int), {}
    for group, size in sizes.sort_values(ascending=False, kind="stable").items():
        of[group] = int(load.argmin())
        load[of[group]] += size
    return pd.Series(groups).map(of).to_numpy()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcdefghi"), min_size=2, max_size=60), st.integers(0, 9))
def test_group_folds(groups, folds):
    count = len(set(groups))
    if count < 2 or folds == 1 or folds > count:
        refusal(group_folds, groups, folds)
        return
    fold = group_folds(groups, folds)
    assert np.array_equal(fold, dealt(groups, folds))
    check_folds(fold, groups)
    oracle = GroupKFold(folds or count).split(groups, groups=groups)
    assert sorted(np.bincount(fold)) == sorted(len(held) for _, held in oracle)
    if folds in (0, count): assert sets_of(fold) == oracle_sets(LeaveOneGroupOut(), groups, groups)


def test_spots_are_held_out_by_the_same_function(demo_file):
    from histokit.spots.slides import DataFactory
    from histokit.spots.splits import assign_folds
    spots = DataFactory(demo_file).spots
    train = spots.split.eq("Train").to_numpy()
    for folds in (0, 2):
        fold = assign_folds(spots, "slide", folds)
        assert np.array_equal(fold[train], dealt(spots.slide[train].to_numpy(), folds))
        assert (fold[~train] == -1).all()
    assert "there are 3 slides" in refusal(assign_folds, spots, "slide", 4)


@pytest.mark.parametrize("seed", range(4))
def test_stratified_folds(seed):
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(80), rng.integers(1, 4, 80))
    labels = np.array(["none", "benign", "tumour"])[rng.choice(3, 80, p=(.6, .25, .15))][patients]
    fold = stratified_folds(labels, 4, seed=seed)
    kind = dict(n_splits=4, shuffle=True, random_state=seed)
    assert sets_of(fold) == oracle_sets(StratifiedKFold(**kind), labels)
    counts = pd.crosstab(labels, fold).to_numpy()
    assert (counts.max(1) - counts.min(1) <= 1).all()
    grouped = stratified_folds(labels, 4, patients, seed)
    assert sets_of(grouped) == oracle_sets(StratifiedGroupKFold(**kind), labels, patients)
    check_folds(grouped, patients)
    repeats = repeated(stratified_folds, (seed, seed + 1), labels, 4, groups=patients)
    assert np.array_equal(repeats[0], grouped) and not np.array_equal(*repeats)


def test_splits_that_cannot_be():
    assert "class 'b' has 1 items" in refusal(stratified_folds, ["a"] * 9 + ["b"], 2)
    patients = [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]
    assert "class 'b' has 1 items or groups" in refusal(stratified_folds, ["a"] * 6 + ["b"] * 4, 2, patients)
    assert "item 2 has no label" in refusal(stratified_folds, ["a", "b", None], 2)
    assert "item 0 has no patient" in refusal(group_folds, [np.nan, 1, 2], what="patient")
    assert "leak: patient '1' is in folds 0, 1" in refusal(check_folds, [0, 1, 1], [1, 1, 2], "patient")
    check_folds([0, -1, 1], [1, 1, 2])                                       # what is in no fold leaks nothing
    refusal(leave_one_out, 1)


def test_a_fold_without_a_class_is_said():
    labels = list("abaaaaaabaaaaabbbaaaaaaaaaaaaaaaaaaab")
    groups = np.repeat(np.arange(12), (2, 3, 4, 2, 3, 3, 5, 2, 1, 4, 3, 5))
    with pytest.warns(UserWarning, match=r"fold \d holds no item of class 'b'; try another seed"):
        stratified_folds(labels, 4, groups)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stratified_folds(labels, 4)


@given(st.lists(st.integers(-1, 3), min_size=2, max_size=20))
def test_each_item_is_held_out_once(fold):
    parts = list(each_fold(fold))
    held = np.concatenate([h for *_, h in parts]) if parts else np.array([])
    assert sorted(held) == [i for i, k in enumerate(fold) if k >= 0]
    for k, train, h in parts: assert sorted([*train, *h]) == sorted(held) and all(fold[i] == k for i in h)


# pages

class Balanced(HTMLParser):
    "Fails where a tag is closed that is not open; keeps the text."
    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""
    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta"): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data


def text_of(html):
    "The text of a piece of HTML that is whole."
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser.text


PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
NASTY = ["<script>alert(1)</script>", "</style><b>", "' onload='x", '"', "a & b", "</title>", "\udcff", "&lt;"]

@pytest.mark.parametrize("name", NASTY)
def test_no_name_becomes_markup(name):
    findings = [error(name, name, name), warning(name), note("fine")]
    sections = [(name, html_table([{name: name}])), ("pictures", html_gallery([(name, PHOTO)])), ("text", name),
        ("card", card(name, {name: name}, PHOTO)), ("findings", html_findings(findings))]
    whole = page(name, sections, name, name)
    shown = name.encode("utf-8", "backslashreplace").decode()
    assert text_of(whole).count(shown) >= 12 and "<script" not in whole and "onload='x" not in whole
    assert "http" not in whole and whole.isascii() or shown.isprintable()


def test_pages_have_their_style():
    whole = page("a", [("b", Html("<p>c</p>"))])
    style = re.search("<style>(.*)</style>", whole, re.S)[1]
    assert style.count("{") == style.count("}") and "url(" not in style and "<h2>b</h2><p>c</p></body>" in whole
    for css in ("error", "warning", "counts", "pictures", "plot", "swatch", "wide", "facts"): assert f".{css}" in style


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_pictures_of_every_mode_go_into_a_page(mode):
    image = PHOTO.convert(mode)
    for html in (data_uri(image), inline_png(image)):
        raw = base64.b64decode(re.search('base64,([^"]*)', html)[1])
        assert Image.open(io.BytesIO(raw)).size == image.size


def test_a_gallery_names_what_has_no_room():
    html = html_gallery([(f"case {k}", PHOTO) for k in range(9)], budget=20_000)
    shown = html.count("<figure>")
    assert 0 < shown < 9 and len(html) < 21_000 and f"no room for case {shown}, " in html and text_of(html)


def test_values():
    assert escaped(np.float64(1234567)) == "1.23e+06" and escaped(True) == "True" and escaped(Html("<b>")) == "<b>"
    assert isinstance(html_table([dict(a=1)]), Html) and html_table([]).startswith("<p class=none>")


# checks

def test_findings_in_every_form():
    parts = dict(file=[error("a"), error("b"), note("c")], split=[], training=[warning("d")])
    ax = Figure().subplots()
    show_findings(parts, ax)
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    assert widths == [[2, 0, 0], [0, 0, 1], [1, 0, 0]]                        # errors, warnings, notes
    assert refusal(raise_errors, parts) == "2 checks failed; first: a"
    html = html_findings([error(f"e{k}") for k in range(5)] + [note("n")], most=3)
    assert "5 errors" in html and "and 2 more" in html and "1 note<" in html and text_of(html)
    show_findings({}, Figure().subplots())
    assert from_error(EOFError()).what == "cannot be read (EOFError: EOFError)"


# submissions

TARGETS = ["C1", "C2", "C3"]
ANSWER = counted_form(4, TARGETS).table(np.arange(12).reshape(4, 3))
MESSAGES = {
    "submission: column 3 is 'C3', not 'C2'; the columns are ID, C1 … C3, in this order": ANSWER.drop(columns="C2"),
    "submission: 5 columns, not 4; the columns are ID, C1 … C3, in this order": ANSWER.assign(C4=1),
    "submission: 3 rows for 4 test spots; give one row for each, in the file's order": ANSWER.iloc[:3],
    "submission: column C2 holds text; write numbers only": ANSWER.assign(C2="a"),
    "submission: column ID holds text; write numbers only": ANSWER.assign(ID=list("abcd")),
    "submission: row 0 has ID 3; IDs count 0 to 3 in the file's order": ANSWER.iloc[::-1],
    "submission: C3 of ID 0 is not finite; predict a number for every spot": ANSWER.assign(C3=np.inf),
}

@pytest.mark.parametrize("message", MESSAGES)
def test_the_form_of_spots_says_what_it_said(message):
    check_submission(ANSWER, 4, TARGETS)
    assert refusal(check_submission, MESSAGES[message], 4, TARGETS) == message
    renamed = refusal(check_submission, MESSAGES[message], 4, TARGETS, "mine.csv")
    assert renamed == message.replace("submission", "mine.csv", 1)


IDS = st.lists(st.from_regex(r"[A-Za-z0-9_.\-]{1,6}", fullmatch=True), min_size=1, max_size=6, unique=True)
COLUMNS = st.sampled_from(["ID label", "image_id a b", "ID C1 C2 C3"])

@settings(max_examples=60, deadline=None)
@given(ids=IDS, columns=COLUMNS)
def test_any_form_comes_back_from_its_template_and_its_answer(tmp_path_factory, ids, columns):
    folder, (id_column, *targets) = tmp_path_factory.mktemp("form"), columns.split()
    rows = [[id_column, *targets], *([i, *["0.5"] * len(targets)] for i in ids)]
    (folder/"sample.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    form = form_of_template(folder/"sample.csv")
    assert [str(i) for i in form.ids] == ids and form.columns == [id_column, *targets] and form.numbers
    values = np.random.default_rng(0).random((len(ids), len(targets)))
    write_submission(folder/"answer.csv", values, form)
    table = read_submission(folder/"answer.csv", form)
    check_submission(table, form)
    assert np.array_equal(table[targets], values) and [str(i) for i in table[id_column]] == ids
    if len(ids) > 1: assert " order" in refusal(check_submission, table.iloc[::-1], form)


def test_templates(tmp_path):
    def form(text):
        (tmp_path/"t.csv").write_text(text)
        return form_of_template(tmp_path/"t.csv")
    assert form("id,a\n1,\n2,\n").numbers and form("id,a\n01,NA\n").ids == ("01",)
    assert not form("id,kind\n1,cat\n2,dog\n").numbers
    assert form("\ufeffid,a\n1,0\n").id_column == "id"
    big = 2**70
    assert form(f"id,a\n{big},0\n").ids == (big,)
    assert "is not a readable CSV" in refusal(form, "") and "holds no row" in refusal(form, "id,a\n")
    (tmp_path/"t.csv").write_text("a,id\n0,1\n")
    assert "is not its first column" in refusal(form_of_template, tmp_path/"t.csv", "id")
    assert "has no column 'key'; there is a, id" in refusal(form_of_template, tmp_path/"t.csv", "key")


def test_answers_in_text(tmp_path):
    form = AnswerForm("image", ["a", "b"], ["kind", "grade"], numbers=False, unit="picture")
    written = write_submission(tmp_path/"a.csv", [["NA", "1"], ["none", "007"]], form)
    read = read_submission(tmp_path/"a.csv", form)
    check_submission(read, form)
    assert read.equals(written) or read.to_numpy().tolist() == written.to_numpy().tolist()
    assert refusal(check_submission, read.assign(grade=[None, "1"]), form) == \
        "submission: grade of image a is empty; answer every picture"


def test_a_failed_answer_leaves_the_earlier_one(tmp_path):
    form = AnswerForm("case", ["1", "2"], ["p"])
    file = tmp_path/"a.csv"
    write_submission(file, [.1, .2], form)
    before = file.read_bytes()
    for values in (.1, [[.1, .2]], [[.1], [np.nan]], np.ones((2, 2)), torch.ones(3)):
        refusal(write_submission, file, values, form)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    write_submission(file, torch.tensor([.3, .4]), form)
    assert file.read_bytes() != before


def test_forms_that_cannot_be():
    assert "there is no column to fill" in refusal(AnswerForm, "ID", [1], [])
    assert "column 'ID' is there twice" in refusal(AnswerForm, "ID", [1], ["ID"])
    assert "ID 1 is there twice" in refusal(AnswerForm, "ID", [1, 1], ["a"])

"Similar cases: galleries that refuse what has changed, the same answers from every index, and what is left out."
import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

import histokit.cli_search  # noqa: F401 (it adds its commands)
from histokit.cli import app
from histokit.core.text import BadInput
from histokit.retrieval import embedders, gallery as galleries, nearest
from histokit.retrieval.adapter import AdapterSettings, nested_gain
from histokit.retrieval.asking import AskSettings, answer_query, picture_query, spot_query, text_query
from histokit.retrieval.embedders import open_embedder, unit_length, write_tiny_clip
from histokit.retrieval.evaluate import (EvaluationSettings, chance_majority, evaluate_gallery, leave_one_out_chance,
    ranking_agreement)
from histokit.retrieval.filters import Condition
from histokit.retrieval.gallery import FolderGallery, add_to_gallery, build_gallery, delete_from_gallery
from histokit.retrieval.nearest import NearestSettings, exact_nearest, faiss_nearest, make_approximate
from histokit.retrieval.sources import SpotSource, picture_source
from histokit.retrieval.words import read_query

RANDOM = "timm:test_resnet.r160_in1k,weights=none,px=32"
PACKAGED = "timm:tf_efficientnet_lite0,px=64"


def search(*args): return CliRunner().invoke(app, ["search", *map(str, args)])


def refused(*args):
    "The one line of a command that must fail with status 1."
    answer = search(*args)
    assert answer.exit_code == 1, answer.output
    lines = answer.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("histokit: "), answer.output
    return lines[0]


def draw(path, seed, px=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 255, (6, 6), np.uint8)).resize(px[::-1], Image.Resampling.BICUBIC)
    smooth.save(path)


@pytest.fixture
def folder(tmp_path):
    "Twelve pictures of six patients in two classes."
    for i in range(12): draw(tmp_path/"set"/"ab"[i % 2]/f"person{i // 2}_{i}.png", i)
    return tmp_path/"set"


@pytest.fixture(scope="module")
def embedder(): return open_embedder(RANDOM)


@pytest.fixture(scope="module")
def clip(tmp_path_factory): return open_embedder(f"open_clip:{write_tiny_clip(tmp_path_factory.mktemp('clip'))}")


@pytest.fixture
def index(folder, embedder, tmp_path): return build_gallery(picture_source(folder), tmp_path/"index", embedder)


# --- the same answers -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["torch", "flat", "ivf", "hnsw"])
def test_every_index_gives_the_answers_of_the_exact_search(kind):
    rng = np.random.default_rng(1)
    vectors = unit_length(rng.standard_normal((2000, 4)) @ rng.standard_normal((4, 24)))
    asked, mask = vectors[:50], rng.random(2000) < .5
    right = exact_nearest(vectors, asked, 10)
    if kind == "torch": found = exact_nearest(vectors, asked, 10, block=333)
    elif kind == "flat":
        flat = nearest.load_faiss().IndexFlatIP(24)
        flat.add(vectors)
        found = faiss_nearest(flat, asked, 10)
        among = faiss_nearest(flat, asked, 10, mask)[1], exact_nearest(vectors, asked, 10, np.flatnonzero(mask))[1]
        assert (among[0] == among[1]).mean() > .99
    else:
        made, facts = make_approximate(vectors, NearestSettings(kind))
        assert facts["recall"] >= .95 and facts["sample"] == 200
        found = faiss_nearest(made, asked, 10)
        assert nearest.recall_of(found[1], right[1]) >= .9
        return
    assert (found[1] == right[1]).mean() > .99
    np.testing.assert_allclose(found[0], right[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["torch", "flat", "hnsw", "ivf"])
def test_an_index_on_disk_answers_the_same_by_each_kind(folder, embedder, tmp_path, kind):
    made = build_gallery(picture_source(folder), tmp_path/kind, embedder, NearestSettings(kind))
    again = FolderGallery(tmp_path/kind)
    exact = exact_nearest(again.vectors_of(range(12)), again.vectors_of([4]), 12)
    assert sorted(again.search(again.vectors_of([4]), 12)[1][0]) == sorted(exact[1][0])
    assert made.manifest["nearest"]["kind"] == kind
    assert ("recall" in made.manifest["measured"]) == (kind in ("hnsw", "ivf"))


def test_milvus_gives_the_same_answers_up_to_ties(folder, embedder, index, tmp_path):
    milvus = pytest.importorskip("histokit.retrieval.milvus")
    pytest.importorskip("milvus_lite")
    there = milvus.make_gallery(picture_source(folder), f"milvus:{tmp_path}/a.db/cases", embedder)
    for which in ((), (Condition("patient", "!=", ("person1",)), Condition("label", "=", ("a", "b")))):
        asked = index.vectors_of(range(12))
        (a, rows_a), (b, rows_b) = there.search(asked, 6, which), index.search(asked, 6, which)
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert (rows_a == rows_b).mean() > .95
    one = [answer_query(g, picture_query(g, "person2_4.png"), AskSettings(k=3)) for g in (there, index)]
    assert one[0].table.id.tolist() == one[1].table.id.tolist() and one[0].said == one[1].said
    pd.testing.assert_frame_equal(evaluate_gallery(there).table(), evaluate_gallery(index).table(), atol=1e-4)
    fewer, count = milvus.shrink_gallery(f"milvus:{tmp_path}/a.db/cases", ["person2_4.png"])
    assert (count, len(fewer)) == (1, 11)
    assert "holds an index" in refused("build", folder, "-o", f"milvus:{tmp_path}/a.db/cases", "--embedder", RANDOM)


# --- the folder -----------------------------------------------------------------------------------

def test_what_was_killed_goes_on_and_gives_the_same_index(folder, embedder, index, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from histokit.retrieval import staging
from histokit.retrieval.embedders import open_embedder
from histokit.retrieval.gallery import build_gallery
from histokit.retrieval.sources import picture_source
append, done = staging.Staging.append, []
def once(self, *batch):
    append(self, *batch)
    done.append(1)
    if len(done) == 2: os.kill(os.getpid(), signal.SIGKILL)
staging.Staging.append = once
build_gallery(picture_source({str(folder)!r}), {str(tmp_path/'killed')!r}, open_embedder({RANDOM!r}, batch=4))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "was not finished" in refused("eval", tmp_path/"killed")
    source, asked = picture_source(folder), []
    read = source.read
    source.read = lambda rows, px: asked.extend(rows) or read(rows, px)
    embedder.batch = 4
    made = build_gallery(source, tmp_path/"killed", embedder)
    assert asked == [8, 9, 10, 11]
    np.testing.assert_allclose(made.vectors_of(range(12)), index.vectors_of(range(12)), atol=1e-6)
    left = {p.name for p in (tmp_path/"killed").iterdir()} - {".lock"}
    assert left == {"embeddings.npy", "index.faiss", "manifest.json", "metadata.parquet", "thumbs.npy"}


@pytest.mark.parametrize("stop", range(1, 6))
def test_a_change_that_is_cut_short_is_ended_or_undone(index, tmp_path, monkeypatch, stop):
    "Whichever file was the last to be moved, the index that is opened next is whole."
    calls, replace = [], galleries.os.replace
    def cut_short(a, b):
        if galleries._NEXT in str(a) and Path(a).parent.name == galleries._NEXT and Path(b).parent != Path(a).parent:
            calls.append(b)
            if len(calls) == stop: raise KeyboardInterrupt
        replace(a, b)
    monkeypatch.setattr(galleries.os, "replace", cut_short)
    try: delete_from_gallery(index.folder, ["person0_0.png"])
    except KeyboardInterrupt: pass
    monkeypatch.undo()
    again = FolderGallery(index.folder)
    assert len(again) == len(again.all_rows()) == 11
    assert not (index.folder/galleries._NEXT).exists()


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path, embedder):
    embedder.batch, peaks = 16, []
    for n in (64, 512):
        for i in range(n): draw(tmp_path/str(n)/f"{i:04}.png", i % 7, (128, 128))
        source = picture_source(tmp_path/str(n))
        tracemalloc.start()
        build_gallery(source, tmp_path/f"index{n}", embedder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 448 * 128 * 128 / 3, peaks         # what is known of a row stays, not its pixels


def test_what_changed_is_refused_then_added_again(folder, embedder, index):
    draw(folder/"a"/"person0_0.png", 99)
    assert "person0_0.png has changed" in refused("eval", index.folder)
    draw(folder/"a"/"person9_12.png", 100)
    said = search("add", index.folder, folder)
    assert said.exit_code == 0 and said.output.startswith("2 added, 1 of them instead of older ones"), said.output
    grown = FolderGallery(index.folder)
    direct = embedder.pictures([np.asarray(Image.open(folder/"a"/"person0_0.png"))])
    assert grown.about(grown.search(direct, 1)[1][0]).id.tolist() == ["person0_0.png"]
    (folder/"a"/"person9_12.png").unlink()
    assert "person9_12.png is gone" in refused("image", index.folder, "person0_0.png")
    assert search("delete", index.folder, "--gone", "--pack").exit_code == 0
    packed = FolderGallery(index.folder)
    assert (len(packed), len(packed.items)) == (12, 12)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf", "torch"])
def test_adding_and_deleting_needs_no_rebuild(folder, embedder, tmp_path, kind, monkeypatch):
    for name in ("a", "b"): shutil.copytree(folder/name, tmp_path/"half"/name)
    for path in sorted((tmp_path/"half"/"b").iterdir())[:3]: path.unlink()
    build_gallery(picture_source(tmp_path/"half"), tmp_path/"grow", embedder, NearestSettings(kind))
    shutil.copytree(folder, tmp_path/"half", dirs_exist_ok=True)
    embedded, pictures = [], embedder.pictures
    monkeypatch.setattr(embedder, "pictures", lambda images: embedded.extend(images) or pictures(images))
    grown, added, _ = add_to_gallery(tmp_path/"grow", picture_source(tmp_path/"half"), embedder)
    assert (added, len(embedded), len(grown)) == (3, 3, 12)
    whole = build_gallery(picture_source(folder), tmp_path/"whole", embedder, NearestSettings(kind))
    names = lambda g: [set(g.about(r).id) for r in g.search(whole.vectors_of(range(12)), 4)[1]]
    assert names(grown) == names(whole)
    fewer, _ = delete_from_gallery(tmp_path/"grow", ["person3_6.png"])
    assert not any("person3_6.png" in found for found in names(fewer))


# --- what is refused ------------------------------------------------------------------------------

def test_an_index_of_another_embedder_is_refused(folder, index, tmp_path):
    other = RANDOM.replace("32", "64")
    assert "has other preprocessing" in refused("image", index.folder, "person0_0.png", "--embedder", other)
    state = index.folder/"manifest.json"
    facts = json.loads(state.read_text())
    facts["identity"]["weights"] = "0" * 64
    state.write_text(json.dumps(facts))
    Image.new("L", (50, 40), 7).save(tmp_path/"new.png")
    assert "has other weights" in refused("image", index.folder, tmp_path/"new.png")


def test_bad_input_is_one_line_and_nothing_is_lost(folder, index, tmp_path):
    before = {p.name: p.read_bytes() for p in index.folder.iterdir()}
    (tmp_path/"empty").mkdir()
    (tmp_path/"text.png").write_text("no picture")
    (tmp_path/"note.txt").write_text("a text")
    new = ("-o", tmp_path/"new", "--embedder", RANDOM)
    lines = {
        "holds no pictures": ("build", tmp_path/"empty", *new),
        "does not exist": ("build", tmp_path/"nothing", *new),
        "is text": ("build", tmp_path/"note.txt", *new),
        "names no embedder": ("build", folder, "-o", tmp_path/"new", "--embedder", "clip"),
        "unknown kind of index": ("build", folder, *new, "--index", "annoy"),
        "recall=2.0": ("build", folder, *new, "--index", "hnsw", "--recall", 2),
        "batch=0": ("build", folder, *new, "--batch", 0),
        "holds an index": ("build", folder, "-o", index.folder, "--embedder", RANDOM),
        "cannot be read as a picture": ("image", index.folder, tmp_path/"text.png"),
        "no picture file and no id": ("image", index.folder, "nobody"),
        "items are left to answer with": ("image", index.folder, "person0_0.png", "-k", 1000),
        "k=0": ("image", index.folder, "person0_0.png", "-k", 0),
        "no column 'sit'": ("image", index.folder, "person0_0.png", "--where", "sit=1"),
        "is no condition": ("image", index.folder, "person0_0.png", "--where", "site"),
        "holds pictures, no slides": ("image", index.folder, "S_1", "--at", "3,4"),
        "give column and row": ("image", index.folder, "S_1", "--at", "3"),
        "has no text tower": ("text", index.folder, "no effusion"),
        "names nothing to look for": ("text", index.folder, "there is no"),
        "unknown mode": ("eval", index.folder, "--mode", "cv"),
        "no column 'lable'": ("eval", index.folder, "--label", "lable"),
        "nothing to delete": ("delete", index.folder),
        "has no nobody": ("delete", index.folder, "nobody"),
        "HOST:19530/NAME": ("build", folder, "-o", "milvus:http://db:19530", "--embedder", RANDOM),
        "is no index": ("eval", folder)}
    for said, line in lines.items(): assert said in refused(*line), (said, line)
    assert {p.name: p.read_bytes() for p in index.folder.iterdir()} == before
    assert not (tmp_path/"new"/"manifest.json").exists()


@pytest.mark.parametrize("name, cut, said", [
    ("embeddings.npy", 300, "missing or damaged"), ("metadata.parquet", 100, "missing or damaged"),
    ("index.faiss", 200, "is damaged"), ("thumbs.npy", 0, "missing or damaged"),
    ("manifest.json", 30, "readable JSON")])
def test_damaged_indexes_are_refused(index, name, cut, said):
    file = index.folder/name
    file.write_bytes(file.read_bytes()[:cut])
    assert said in refused("eval", index.folder)


def test_a_model_folder_without_its_parts_is_refused(folder, tmp_path):
    made = write_tiny_clip(tmp_path/"clip")
    (made/"open_clip_config.json").rename(made/"config.json")
    new = ("build", folder, "-o", tmp_path/"new", "--embedder", f"open_clip:{made}")
    assert "no open_clip_config.json" in refused(*new)
    (made/"config.json").rename(made/"open_clip_config.json")
    (made/"open_clip_model.safetensors").rename(tmp_path/"elsewhere")
    assert "holds no weights" in refused(*new)
    (made/"open_clip_model.safetensors").write_bytes(b"torn")
    assert "cannot be loaded" in refused(*new)


def test_memory_that_runs_out_is_one_line(folder, embedder, tmp_path, monkeypatch):
    def full(*args, **kw): raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    monkeypatch.setattr(embedders.Embedder, "pictures", full)
    with pytest.raises(RuntimeError): embedder.pictures([])
    monkeypatch.undo()
    monkeypatch.setattr(embedder, "model", full)
    with pytest.raises(BadInput, match="out of memory.*smaller batch"): embedder.pictures([np.zeros((9, 9), np.uint8)])
    def other(*args): raise RuntimeError("shapes differ")
    monkeypatch.setattr(embedder, "model", other)
    with pytest.raises(RuntimeError, match="shapes differ"): embedder.pictures([np.zeros((9, 9), np.uint8)])


def test_memory_that_runs_out_is_said_by_the_command_and_nothing_is_lost(folder, index, tmp_path, monkeypatch):
    "Neither the index that is asked, nor what was embedded before: built again, it goes on."
    before, done = {p.name: p.read_bytes() for p in index.folder.iterdir()}, []
    whole = embedders._Pooled.forward
    def full(self, image):
        done.append(len(image))
        if len(done) > 2: raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return whole(self, image)
    monkeypatch.setattr(embedders._Pooled, "forward", full)
    new = ("build", folder, "-o", tmp_path/"new", "--embedder", RANDOM, "--batch", 4)
    assert "out of memory while embedding pictures: give a smaller batch than 4" in refused(*new)
    draw(tmp_path/"other.png", 77)
    assert "out of memory" in refused("image", index.folder, tmp_path/"other.png")
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in index.folder.iterdir()} == before
    asked, pictures = [], embedders.Embedder.pictures
    monkeypatch.setattr(embedders.Embedder, "pictures", lambda self, i: asked.extend(i) or pictures(self, i))
    assert search(*new).exit_code == 0 and len(FolderGallery(tmp_path/"new")) == 12
    assert sum(image.shape != (64, 64, 3) for image in asked) < 12


def test_damaged_pictures_are_left_out_and_named(folder, tmp_path):
    (folder/"a"/"person0_0.png").write_bytes(b"torn")
    made = search("build", folder, "-o", tmp_path/"new", "--embedder", RANDOM)
    assert made.exit_code == 0 and "left out: person0_0.png" in made.output
    assert len(FolderGallery(tmp_path/"new")) == 11


# --- questions ------------------------------------------------------------------------------------

def test_itself_its_patient_and_its_copies_are_left_out(folder, tmp_path):
    first = folder/"a"/"person0_0.png"
    Image.open(first).point(lambda v: min(v + 8, 255)).save(folder/"b"/"person8_90.png")
    made = build_gallery(picture_source(folder), tmp_path/"i", open_embedder(PACKAGED))
    found = answer_query(made, picture_query(made, str(first)))
    assert found.near == ["person8_90.png"] and "person0" not in set(found.table.patient)
    assert "left out: the query itself" in found.said and "left out: 1 of the same patient" in found.said
    loose = answer_query(made, picture_query(made, str(first)), AskSettings(apart="none", near=True))
    assert loose.table.id.iloc[0] == "person8_90.png" and "person0_0.png" not in set(loose.table.id)
    copy = tmp_path/"renamed.png"
    shutil.copy(first, copy)
    assert picture_query(made, str(copy)).row == picture_query(made, "person0_0.png").row
    turned = tmp_path/"person0_99.png"
    Image.open(first).rotate(90).save(turned)
    unseen = answer_query(made, picture_query(made, str(turned)))
    assert "person0" not in set(unseen.table.patient) and "read from its name" in unseen.said[0]


def test_words_need_a_tower_and_a_negation_is_said(folder, clip, tmp_path):
    made = build_gallery(picture_source(folder), tmp_path/"words", clip)
    found = search("text", made.folder, "pneumonia, no effusion", "-k", 3, "--json")
    value = json.loads(found.output)
    assert "subtracted: effusion" in value["said"][0] and len(value["found"]) == 3
    positive, negative, both = (text_query(made, t, lambda: clip).vector for t in
        ("pneumonia", "effusion", "pneumonia, no effusion"))
    np.testing.assert_allclose(both, unit_length((positive - negative)[None])[0], atol=1e-5)
    assert "Cyrillic" in refused("text", made.folder, "пневмония")
    assert not clip.model.training


def test_negation_is_read_word_by_word():
    sought = lambda text: (read_query(text).sought, read_query(text).denied)
    assert sought("nodule in the node-like opacity")[1] == ()
    assert sought("No pneumothorax; consolidation") == (("consolidation",), ("pneumothorax",))
    assert sought("free of effusion and free of pneumothorax")[1] == ("effusion", "pneumothorax")


def test_spots_by_slide_and_position(demo_file, tmp_path):
    made = build_gallery(SpotSource(demo_file, 150), tmp_path/"spots", open_embedder(PACKAGED))
    one = made.about([5]).iloc[0]
    line = ("image", made.folder, one.slide, "--at", f"{one.x},{one.y}", "--json")
    found = json.loads(search(*line).output)
    assert found["known"]["id"] == one.id and one.slide not in {row["slide"] for row in found["found"]}
    assert f"no slide '{one.slide}x'" in refused("image", made.folder, f"{one.slide}x", "--at", "3,4")
    assert spot_query(made, one.slide, float(one.x), float(one.y)).row == 5
    same = ranking_agreement(made)
    assert same["nearest"] > same["chance"] and same["spots"] < len(made)


# --- what it is worth -----------------------------------------------------------------------------

def test_chance_is_counted():
    assert round(leave_one_out_chance([390, 234]), 3) == .530
    assert chance_majority((1, 1, 1), 0, 1) == pytest.approx(1 / 3)


def test_leaving_the_patient_out_matters_where_patients_are_what_is_seen(tmp_path):
    "Pictures that say who it is and nothing of the label."
    labels = np.random.default_rng(0).permutation(["a", "b"] * 12)
    for p, label in enumerate(labels):
        for i in range(3):
            draw(tmp_path/"set"/label/f"person{p:02}_{i}.png", p)
            path = tmp_path/"set"/label/f"person{p:02}_{i}.png"
            Image.open(path).rotate(4 * i).save(path)
    made = build_gallery(picture_source(tmp_path/"set"), tmp_path/"i", open_embedder(PACKAGED))
    found = evaluate_gallery(made)
    p1 = found.table()[found.table().measure.eq("p@1")].set_index("answers")
    assert p1.value["any but itself"] > .9
    assert p1.low["other patients"] < p1.chance["other patients"] < p1.high["other patients"]
    asking = found.strict.rows["query"].to_numpy()[:, None]
    patient = found.items.patient.to_numpy()
    assert not (patient[found.strict.nearest] == patient[asking]).any()


def test_split_asks_train_only(index):
    items = index.items
    items["split"] = ["test" if i % 4 == 0 else "train" for i in range(12)]
    found = evaluate_gallery(index, EvaluationSettings("split"))
    assert set(found.strict.rows["query"]) == {0, 4, 8}
    near = found.loose.nearest
    assert not set(near[near >= 0]) & {0, 4, 8}
    with pytest.raises(BadInput, match="needs labelled pictures in train and in test"):
        items["split"] = "train"
        evaluate_gallery(index, EvaluationSettings("split"))


def test_an_adapter_is_judged_on_patients_it_has_not_seen():
    rng = np.random.default_rng(3)
    vectors, label = unit_length(rng.standard_normal((90, 40))), rng.choice(["a", "b"], 90)
    groups = np.arange(90) // 2
    gain, chosen = nested_gain(vectors, label, groups, folds=3, choices=(AdapterSettings(width=40, epochs=40),))
    first = gain.set_index("measure").loc["p@1"]
    assert first.low < 0 < first.high or first.difference < 0
    with pytest.raises(BadInput, match="six patients"): nested_gain(vectors, label, np.arange(90) % 4)


def test_an_adapted_index_is_asked_through_its_adapter(folder, index, tmp_path):
    made = search("adapt", index.folder, "-o", tmp_path/"adapted", "--width", 6)
    assert made.exit_code == 0, made.output
    turned = tmp_path/"person0_99.png"
    Image.open(folder/"a"/"person0_0.png").rotate(3).save(turned)
    every = "--apart", "none", "--near", "-k", 12, "--json"
    found = json.loads(search("image", tmp_path/"adapted", turned, *every).output)
    assert "person0_0.png" in [row["id"] for row in found["found"][:4]]
    adapted = FolderGallery(tmp_path/"adapted")
    assert adapted.vectors_of([0]).shape == (1, 6) and not index.manifest.get("adapter")
    assert "words cannot follow" in refused("text", tmp_path/"adapted", "no effusion")
    assert "went through an adapter" in refused("adapt", tmp_path/"adapted", "-o", tmp_path/"twice")
    assert "unknown shape" in refused("adapt", index.folder, "-o", tmp_path/"new", "--shape", "deep")
    (tmp_path/"adapted"/"adapter.safetensors").write_bytes(b"torn")
    assert "is not the adapter" in refused("image", tmp_path/"adapted", turned)


def test_eval_writes_figures_and_a_page(folder, index, tmp_path):
    made = search("eval", index.folder, "--out", tmp_path/"worth")
    assert made.exit_code == 0, made.output
    names = {p.name for p in (tmp_path/"worth"/"figures").iterdir()}
    assert names == {"retrieval_results.png", "precision_at_k.png", "tsne_embeddings.png"}
    html = (tmp_path/"worth"/"search.html").read_text()
    assert "chance" in html and "http" not in html.split("</style>")[1].replace("http://www.w3.org", "")


def test_the_index_is_searched_while_it_is_added_to(folder, embedder, index):
    "A reader that opened the index before keeps its answers."
    reader, asked = FolderGallery(index.folder), index.vectors_of([0])
    before = reader.search(asked, 5)
    for i in range(3): draw(folder/"a"/f"person{20 + i}_0.png", 50 + i)
    add_to_gallery(index.folder, picture_source(folder), embedder)
    after = reader.search(asked, 5)
    np.testing.assert_array_equal(before[1], after[1])

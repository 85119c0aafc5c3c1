"What a kernel tries before its first stage, wherever its inputs are mounted, and an answer that nothing takes away."
import json
import shutil
import zipfile
from pathlib import Path

import pytest

import histokit.pipeline as pipeline
from histokit.core.files import make_dir, read_json
from histokit.core.mounted import find_mounted, list_mounted, mounted_folders, mounted_wheels
from histokit.core.runs import assets
from histokit.core.submission import read_submission, submit_answer
from histokit.core.text import BadInput
from histokit.kaggle_parts import Inputs, Places, end_parts, hand_in, is_result, read_parts, run_part
from histokit.kaggle_start import (card_findings, check_start, data_findings, disk_findings, internet_findings,
    memory_findings, weight_findings)
from histokit.pictures.toy import smoke_pictures
from histokit.spots.demo import smoke_demo

HERE = {   # name -> folders of an input, below /kaggle/input
    "slug": ["cells"], "competitions": ["competitions/cells"], "datasets": ["datasets/some-one/cells"],
    "notebooks": ["notebooks/some-one/cells"], "model": ["cells/pyTorch/base/1"],
    "models": ["models/some-one/cells/pyTorch/base/1"], "deep": ["cells/archive/v2/cells"],
    "both": ["cells", "competitions/cells"], "all": ["cells", "competitions/cells", "datasets/some-one/cells"]}
EMPTY = (lambda: dict(gpus=[]))
T4 = dict(name="Tesla T4", bytes=15_800_000_000, sm="7.5", fault="")


def spots(*overrides, weights="none"): return read_parts("resnet18", ["device=cpu", *overrides], weights)[0]


def said(findings, level="error"): return [str(f) for f in findings if f.level == level]


# --- where inputs lie ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ending", [".h5", ".hdf5"])
@pytest.mark.parametrize("places", HERE.values(), ids=HERE)
def test_slides_are_found_in_every_layout(tmp_path, places, ending):
    "One file, however often it is mounted."
    for place in places: shutil.copy(smoke_demo(), make_dir(tmp_path/"input"/place)/f"train{ending}")
    found = spots().find_data(Inputs(str(tmp_path)))
    assert Path(found["data_path"]) in [tmp_path/"input"/place/f"train{ending}" for place in places]


@pytest.mark.parametrize("places", HERE.values(), ids=HERE)
def test_pictures_are_found_in_every_layout(tmp_path, places):
    for place in places: shutil.copytree(smoke_pictures(), tmp_path/"input"/place)
    found = read_parts("tb", weights="none")[0].find_data(Inputs(str(tmp_path)))
    assert Path(found["data_path"]) in [tmp_path/"input"/place for place in places]


@pytest.mark.parametrize("places", HERE.values(), ids=HERE)
def test_weights_and_wheels_are_found_in_every_layout(tmp_path, places):
    for place in places:
        (make_dir(tmp_path/"input"/place)/"tiny.pth").write_bytes(b"weights")
        (tmp_path/"input"/place/"toy_package-1.0-py3-none-any.whl").write_bytes(b"wheel")
    assert find_mounted(tmp_path, "tiny.pth", "weights").parent in [tmp_path/"input"/p for p in places]
    assert len(mounted_wheels(tmp_path, "toy-package")) == len(places)
    assert len(mounted_folders(tmp_path)) == len(places)


@pytest.mark.parametrize("of", ["file", "folder", "input"])
def test_links_are_followed(tmp_path, of):
    "Kaggle's mounts may be links; what is linked twice is there once; one that leads back is no trap."
    there = make_dir(tmp_path/"elsewhere"/"cells")
    shutil.copy(smoke_demo(), there/"train.h5")
    (there/"toy_package-1.0-py3-none-any.whl").write_bytes(b"wheel")
    top = tmp_path/"kaggle"/"input"
    if of == "input":
        top.parent.mkdir()
        top.symlink_to(tmp_path/"elsewhere")
    elif of == "folder":
        make_dir(top/"competitions")
        for place in ("cells", "competitions/cells"): (top/place).symlink_to(there)
        (there/"back").symlink_to(there.parent)
    else:
        for file in there.iterdir(): (make_dir(top/"cells")/file.name).symlink_to(file)
    found = spots().find_data(Inputs(str(tmp_path/"kaggle")))
    assert Path(found["data_path"]).samefile(there/"train.h5")
    assert mounted_wheels(tmp_path/"kaggle", "toy-package")


def test_two_files_that_differ_are_two(tmp_path):
    import h5py
    for place in HERE["both"]: shutil.copy(smoke_demo(), make_dir(tmp_path/"input"/place)/"train.h5")
    with h5py.File(tmp_path/"input"/"cells"/"train.h5", "a") as h5: h5.attrs["made"] = "elsewhere"
    with pytest.raises(BadInput, match="2 files could be the .*detach the other input"):
        spots().find_data(Inputs(str(tmp_path)))


# --- what is tried before the first stage -----------------------------------------------------------------------------

def test_what_is_there_is_listed_with_sizes_and_capped(tmp_path):
    "Weights are not hidden by a thousand pictures."
    for i in range(30): (make_dir(tmp_path/"input"/"a"/"train")/f"{i}.png").write_bytes(b"p")
    for i in range(12): (make_dir(tmp_path/"input"/f"w{i}")/"x.pth").write_bytes(b"w" * 1500)
    listed = list_mounted(tmp_path)
    assert "input/w0/x.pth (1.5 kB)" in listed and listed.endswith("and 5 more") and len(listed) < 400


def zipped(path, *files):
    with zipfile.ZipFile(path, "w") as z:
        for file in files: z.write(file, f"data/{Path(file).name}")


def half(path, source): path.write_bytes(Path(source).read_bytes()[:Path(source).stat().st_size // 2])


DAMAGED = {   # name -> what makes the file, and what is said
    "cut.h5": (lambda p: half(p, smoke_demo()), "cut.h5 is cut off ("),
    "cut.hdf5": (lambda p: half(p, smoke_demo()), "cut.hdf5 is cut off ("),
    "slides.zip": (lambda p: zipped(p, smoke_demo()), "is a zip that holds data/demo.h5: attach it unpacked"),
    "cut.zip": (lambda p: (zipped(p, smoke_demo()), half(p, p)), "cut.zip is cut off ("),
    "empty.h5": (lambda p: p.write_bytes(b""), "empty.h5 (0 bytes)"),
    "notes.txt": (lambda p: p.write_text("notes"), "notes.txt (5 bytes)")}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name):
    make, expected = DAMAGED[name]
    make(make_dir(tmp_path/"input"/"cells")/name)
    line, = said(data_findings(spots(), Inputs(str(tmp_path)))[0])
    assert expected in line and "\n" not in line
    if name in ("empty.h5", "notes.txt"): assert "Add Input" in line and "accept its rules" in line


def test_data_that_are_named_are_looked_at_too(tmp_path):
    half(tmp_path/"a.h5", smoke_demo())
    zipped(tmp_path/"b.zip", smoke_demo())
    for name, expected in (("a.h5", "is cut off"), ("b.zip", "attach it unpacked"), ("c.h5", "does not exist")):
        line, = said(data_findings(spots(), Inputs(str(tmp_path), data_path=str(tmp_path/name)))[0])
        assert expected in line
    assert "there: nothing" in line and "leave it empty" in line


def test_pictures_are_decoded(tmp_path):
    "A folder in which nothing can be decoded has no data; a zip of pictures is named."
    part = read_parts("image_probe", ["device=cpu"], "none")[0]
    shutil.copytree(smoke_pictures(), tmp_path/"input"/"chests")
    fine, size = data_findings(part, Inputs(str(tmp_path)))
    assert not said(fine) and "120 pictures to learn from" in fine[0].what and size > 0
    for file in (tmp_path/"input"/"chests").rglob("*.png"): file.write_bytes(file.read_bytes()[:60])
    line, = said(data_findings(part, Inputs(str(tmp_path)))[0])
    assert "none of 8 pictures could be decoded" in line
    shutil.rmtree(tmp_path/"input"/"chests")
    zipped(make_dir(tmp_path/"input"/"zip")/"chests.zip", next(smoke_pictures().rglob("*.png")))
    line, = said(data_findings(part, Inputs(str(tmp_path)))[0])
    assert "chests.zip" in line and "attach it unpacked" in line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A folder with weights of a tiny network, whole and broken."
    import torch
    from safetensors.torch import save_file
    from histokit.learn.encoders import build_backbone
    folder = make_dir(tmp_path_factory.mktemp("kaggle")/"input"/"weights")
    state = build_backbone("test_resnet.r160_in1k").state_dict()
    save_file(state, folder/"tiny.safetensors")
    torch.save(state, folder/"tiny.pth")
    for ending in ("safetensors", "pth"): half(folder/f"half.{ending}", folder/f"tiny.{ending}")
    (folder/"web.pth").write_text("<!doctype html>")
    return folder.parent.parent


@pytest.mark.parametrize("file, expected", [
    ("tiny.safetensors", ""), ("tiny.pth", ""),
    ("half.safetensors", "half.safetensors is cut off ("), ("half.pth", "half.pth is cut off ("),
    ("web.pth", "cannot be read"), ("gone.pth", "no weights file gone.pth"),
])
def test_weights_are_loaded(tiny, file, expected):
    "Into the network that will use them; a message lists the weights that are there, with sizes."
    part = spots("backbone=test_resnet.r160_in1k", weights=file)
    lines = said(weight_findings(part, Inputs(str(tiny))))
    assert len(lines) == bool(expected) and all(expected in line for line in lines)
    if file in ("web.pth", "gone.pth"):
        assert "tiny.safetensors (1.5 MB)" in lines[0] and "--weights FILE" in lines[0]


def test_weights_of_another_network_do_not_fit(tiny):
    line, = said(weight_findings(spots("backbone=resnet18", weights="tiny.pth"), Inputs(str(tiny))))
    assert "do not fit backbone 'resnet18'" in line


def test_a_card_has_to_compute():
    "No card, a card too old for this PyTorch, one of two; nobody asks where device=cpu."
    auto, old = read_parts("resnet18", weights="none"), "CUDA error: no kernel image is available for execution"
    p100 = T4 | dict(name="Tesla P100-PCIE-16GB", sm="6.0", fault=old)
    assert "Session options -> Accelerator -> GPU T4 x2" in said(card_findings(auto, EMPTY))[0]
    line, = said(card_findings(auto, lambda: dict(gpus=[T4, p100])))
    assert "1, Tesla P100-PCIE-16GB" in line and "sm_60" in line and old in line and "GPU T4 x2" in line
    wrong, = said(card_findings(auto, lambda: dict(gpus=[T4 | dict(fault="a product came out wrong")])))
    assert "a product came out wrong" in wrong and "another machine" in wrong
    assert not said(card_findings(auto, lambda: dict(gpus=[T4, T4])))
    assert not said(card_findings([spots()], lambda: 1 / 0))
    assert "torch is broken (no libcudart)" in said(card_findings(auto, lambda: dict(fault="no libcudart")))[0]


def test_internet_is_asked_for_where_it_is_needed(monkeypatch, tmp_path):
    "By a connection to the hub's address: a server of ours, and then none."
    import http.server
    import threading
    from huggingface_hub import constants
    hub = spots("backbone=resnet18", weights="")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY"): monkeypatch.delenv(name, raising=False)
    assert [f.what for f in internet_findings([hub])] == ["on"]
    server.shutdown()
    server.server_close()
    line, = said(internet_findings([hub]))
    assert "internet is off: switch it on in the settings, which needs a verified phone" in line
    assert "--weights FILE --dataset OWNER/SLUG" in line
    assert not said(internet_findings([spots()]))
    (make_dir(tmp_path/"models--timm--resnet18.a1_in1k"/"snapshots"/"a")/"model.safetensors").touch()
    assert not said(internet_findings([hub])) and said(internet_findings([hub]), "warning")


def test_disk_and_memory_have_to_suffice(tmp_path):
    assert not said(disk_findings({tmp_path/"not"/"yet": 1000}) + memory_findings(1000))
    assert "3.0 MB left" in said(disk_findings({tmp_path: 9_000_000_000}, lambda p: 3_000_000))[0]
    assert "cache_mb" in said(memory_findings(9_000_000_000, lambda: 5_000_000_000), "warning")[0]
    assert "1.0 GB of memory" in said(memory_findings(0, lambda: 1_000_000_000))[0]


def test_all_faults_are_shown_at_once(tmp_path, tiny):
    "One table, a line each; one error that counts them."
    half(make_dir(tmp_path/"input"/"cells")/"train.h5", smoke_demo())
    shutil.copy(tiny/"input"/"weights"/"half.pth", tmp_path/"input"/"cells")
    part, lines = read_parts("resnet18", ["backbone=test_resnet.r160_in1k"], "half.pth"), []
    places = Places(tmp_path/"working", tmp_path/"temp")
    with pytest.raises(BadInput) as e: check_start(part, Inputs(str(tmp_path)), places, lines.append, ask=EMPTY)
    assert [line.split()[1] for line in lines if line.startswith("error")] == ["data", "weights", "GPU"]
    assert [line.split()[1] for line in lines if line.startswith("ok")] == ["internet", "disk", "disk", "memory"]
    assert str(e.value).startswith("nothing was started: data: ") and "(and 2 more" in str(e.value)
    assert not any("\n" in line for line in [*lines, str(e.value)]) and not places.answer.exists()


def test_one_of_several_parts_is_left_out(tmp_path):
    "What only one part lacks stops only that part; a fault of the machine stops all."
    shutil.copytree(smoke_pictures(), tmp_path/"input"/"chests")
    ask = ["tb.label_columns=lable", "embedder=timm:resnet18,weights=none"]
    inputs, places = Inputs(str(tmp_path)), Places(tmp_path/"working", tmp_path/"temp", alone=False)
    two = read_parts("tb,retrieve", [*ask, "device=cpu"], "none")
    check_start(two, inputs, places, lambda line: None)
    assert [p.failed for p in two] == [True, False] and "no column 'lable'" in two[0].said
    with pytest.raises(BadInput, match="nothing was started: data: .*lable.* 1 more"):
        check_start(read_parts("tb,retrieve", ask, "none"), inputs, places, lambda line: None, ask=EMPTY)


# --- an answer that nothing takes away ----------------------------------------------------------------------------

def breaks(folder, stage, text):
    "A copy of the stages in which the cell of one that contains a text raises."
    file = folder/f"{stage}.ipynb"
    notebook = read_json(file)
    cell = next(c for c in notebook["cells"] if c["cell_type"] == "code" and text in "".join(c["source"]))
    cell["source"] = ["raise ValueError('broken on purpose')\n", *cell["source"]]
    file.write_text(json.dumps(notebook))


@pytest.fixture
def stages(tmp_path, monkeypatch):
    "The stages' notebooks, to be broken."
    folder = make_dir(tmp_path/"nbs")
    for file in assets("nbs").glob("[0-9]*.ipynb"): shutil.copy(file, folder)
    monkeypatch.setattr(pipeline, "assets", lambda kind: folder if kind == "nbs" else assets(kind))
    return folder


PICTURES = "backbone=test_resnet.r160_in1k input_px=32 folds=3 views=none device=cpu".split()
SLIDES = "backbone=test_resnet.r160_in1k patch_um=400 input_px=32 views=none device=cpu pca=16".split()


def run_again(recipe, overrides, root):
    "Run a kernel's only part in a folder that stands for /kaggle; what it said."
    part, lines = read_parts(recipe, overrides, "none")[0], []
    places = Places(root/"working", root/"temp")
    run_part(part, Inputs(str(root)), places, lambda line: lines.append(str(line)), first=True)
    return part, places, "\n".join(lines), hand_in(part, places.answer)


def check_kept(recipe, overrides, root, broken):
    "A run of which everything after the answer fails: the answer is there, and all is said."
    part, places, log, answer = run_again(recipe, overrides, root)
    assert not part.failed and len(answer) and recipe in end_parts([part])
    assert read_submission(places.answer).equals(read_submission(places.results(part)/"submission.csv"))
    report = places.report.read_text()
    for stage in broken:
        line = f"{stage} failed (ValueError: broken on purpose)"
        assert line in log and line in report and any(line in said for said in part.objections), stage
        assert (places.results(part)/f"{stage}.failed.ipynb").exists()
    assert str(places.temp) not in part.said + report and read_json(part.run/"run.json")["failed"].keys() == set(broken)


def test_pictures_keep_their_answer(tmp_path, stages):
    "A figure after the answer, and the whole of 12, raise; then the prediction itself does, and nothing is left."
    root = tmp_path/"kaggle"
    shutil.copytree(smoke_pictures(), root/"input"/"chests")
    breaks(stages, "11_classify", 'run.save_figure("ladder"')
    breaks(stages, "12_explain", "explain_run(answered")
    check_kept("image_probe", PICTURES, root, ["11_classify", "12_explain"])
    breaks(stages, "11_classify", "metrics = run_classification(")
    part, places, log, answer = run_again("image_probe", PICTURES, root)
    assert part.failed and answer is None and not places.answer.exists() and "broken on purpose" in log
    with pytest.raises(RuntimeError, match="nothing was handed in: image_probe failed: 11_classify"): end_parts([part])


@pytest.mark.slow
def test_slides_keep_their_answer(tmp_path, stages):
    "A figure after the answer, and the whole of 05, raise; then the prediction itself does, and nothing is left."
    root = tmp_path/"kaggle"
    shutil.copy(smoke_demo(), make_dir(root/"input"/"cells")/"train.h5")
    breaks(stages, "04_tta_smoothing", 'run.save_figure("oof_ladder"')
    breaks(stages, "05_debug_checks", "check_run(run")
    check_kept("probe", SLIDES, root, ["04_tta_smoothing", "05_debug_checks"])
    breaks(stages, "04_tta_smoothing", "found = run_prediction(")
    part, places, log, answer = run_again("probe", SLIDES, root)
    assert part.failed and answer is None and not places.answer.exists() and "broken on purpose" in log


def stand_in(monkeypatch, write, then=None):
    "In place of a run: an answer of pictures is written, or not, and then something happens."
    from histokit.core.submission import hand_in_at
    from histokit.pictures.prepared import prepare_pictures
    from histokit.pictures.folders import find_pictures
    from histokit.pictures.settings import PictureSettings
    from histokit.core.runs import RunFolder
    def run(recipe, overrides, folder, show=print, hand_in=""):
        run, settings = RunFolder(folder).make(), PictureSettings(input_px=16, folds=3)
        hand_in_at(run, hand_in)
        data = prepare_pictures(run, find_pictures(smoke_pictures(), settings), settings)
        write(run, data.form if hasattr(data, "form") else find_pictures(smoke_pictures(), settings).form)
        if then: raise then
    monkeypatch.setattr("histokit.kaggle_parts.run_pipeline", run)
    monkeypatch.setattr("histokit.kaggle_parts.run_report", lambda run: "a ladder")


def stood_in(tmp_path, parts=1):
    "Parts that are run by the stand-in."
    names = ",".join(["tb", "pneumonia"][:parts])
    some = read_parts(names, ["device=cpu"], "none")
    places = Places(tmp_path/"working", tmp_path/"temp", alone=parts == 1)
    inputs, lines = Inputs(str(tmp_path), data_path=str(smoke_pictures())), []
    for part in some: run_part(part, inputs, places, lines.append, first=part is some[0])
    return some, places, "\n".join(lines)


def halves(run, form): submit_answer(run, [.5] * len(form.ids), form)


@pytest.mark.parametrize("error", [KeyError("a figure"), BadInput("05 objects; look"), OSError(28, "No space left"),
    RuntimeError("12_explain failed")], ids=lambda e: type(e).__name__)
def test_whatever_fails_after_the_answer_is_an_objection(tmp_path, monkeypatch, error):
    "Also of the first of several parts, whose answer no other part touches."
    stand_in(monkeypatch, halves, error)
    some, places, log = stood_in(tmp_path, 2)
    answer = hand_in(some[0], places.answer)
    assert not some[0].failed and len(answer) == 40 and places.answer.exists() and some[0].objections
    assert some[0].objections[0] in log and some[0].objections[0] in places.report.read_text().replace("&#x27;", "'")
    assert some[1].failed and "tb is done" in end_parts(some) and (places.results(some[0])/"submission.csv").exists()


def spoil(change):
    "An answer that is changed after it was written."
    def write(run, form):
        halves(run, form)
        table = read_submission(run/"submission.csv")
        change(table).to_csv(run/"submission.csv", index=False)
    return write


@pytest.mark.parametrize("write", [
    lambda run, form: None, spoil(lambda t: t.iloc[1:]), spoil(lambda t: t.assign(label=float("nan"))),
    spoil(lambda t: t.assign(id="x")), spoil(lambda t: t.assign(label=7.))], ids=["none", "row", "nan", "ids", "range"])
def test_an_answer_that_is_not_valid_fails(tmp_path, monkeypatch, write):
    "Whatever the run says: nothing lies where an answer would be handed in from."
    stand_in(monkeypatch, write)
    some, places, _ = stood_in(tmp_path)
    assert hand_in(some[0], places.answer) is None and some[0].failed and not places.answer.exists()
    with pytest.raises(RuntimeError, match="nothing was handed in: tb failed"): end_parts(some)


def test_a_check_that_breaks_down_does_not_fail_a_kernel(tmp_path, monkeypatch):
    "An error of ours in the comparison; a summary that cannot be made; results that cannot be kept."
    stand_in(monkeypatch, halves)
    def broken(*args, **how): raise TypeError("of ours")
    for name in ("pictures.task.check_answer", "kaggle_parts.run_report", "kaggle_parts.keep_results"):
        monkeypatch.setattr(f"histokit.{name}", broken)
    some, places, log = stood_in(tmp_path)
    assert not some[0].failed and places.answer.exists() and log.count("of ours") >= 3
    assert "tb is done" in end_parts(some)


def test_pictures_are_answered_before_anything_is_compared(tmp_path, monkeypatch):
    "Baselines, other sites and intervals take time and may fail; the answer is in its place by then."
    from histokit.core.submission import hand_in_at
    from histokit.core.runs import RunFolder
    from histokit.pictures.classification import run_classification
    from histokit.pictures.classify_settings import ClassifySettings
    from histokit.pictures.folders import find_pictures
    from histokit.pictures.prepared import prepare_pictures
    from histokit.pictures.settings import PictureSettings
    run, how = RunFolder(tmp_path/"run").make(), PictureSettings(input_px=16, folds=3)
    data = prepare_pictures(run, find_pictures(smoke_pictures(), how), how)
    network = dict(backbone="test_resnet.r160_in1k", weights="none", views="none", device="cpu")
    def broken(*args): raise KeyError("a baseline")
    monkeypatch.setattr("histokit.pictures.classification.baseline_rungs", broken)
    hand_in_at(run, tmp_path/"submission.csv")
    with pytest.raises(KeyError): run_classification(run, data, ClassifySettings(method="probe", **network))
    assert (tmp_path/"submission.csv").read_bytes() == (run/"submission.csv").read_bytes()


# --- what the output holds ------------------------------------------------------------------------------------------

def test_the_output_is_results_only():
    state = "stages.json hand_in.json .lock slides.h5 pictures.npy folds/0/last.pt folds/0/finished.json demo/demo.h5"
    assert not [name for name in state.split() if is_result(name)]
    kept = "report.html metrics.json 04_tta_smoothing.ipynb figures/maps.png folds/3/model.safetensors"
    assert all(map(is_result, [*kept.split(), "predictor/kept.json"]))


def test_kernels_start_under_the_images_jupyter(monkeypatch):
    "ipykernel 6.17 goes with a jupyter_client that has no provisioners; then Jupyter starts its kernels itself."
    import sys
    from histokit.core.notebooks import ready_kernel_manager
    assert ready_kernel_manager.__wrapped__() is not None
    monkeypatch.setitem(sys.modules, "jupyter_client.provisioning", None)
    assert ready_kernel_manager.__wrapped__() is None

"The four kinds of kernel, each run as on Kaggle: no network, no clone, nothing that the notebook does not carry."
import json
import re
import shutil

import pandas as pd
import pytest
from test_kaggle import FINDINGS, KAGGLE_TAKES, LAYOUTS, REPO, TINY, mount, mount_pictures, offline, papermill

from histokit.core.files import read_json, write_json
from histokit.core.runs import RunFolder
from histokit.core.submission import check_submission, read_submission
from histokit.core.text import BadInput
from histokit.kaggle import build_again, build_kernel, check_kernel, read_plan, upload_text
from histokit.kaggle_cells import carried
from histokit.kaggle_infer import find_trained
from histokit.kaggle_kinds import KERNEL_KINDS
from histokit.kaggle_parts import is_result
from histokit.kaggle_show import SHOWN_COPY, copy_fits
from histokit.pictures.folders import find_pictures
from histokit.pictures.toy import smoke_pictures
from histokit.pipeline import run_pipeline
from histokit.spots.demo import smoke_demo
from histokit.spots.slides import DataFactory

COMMITTED = REPO/"kaggle_kernels"
SUBJECT = dict(spots="cell-types-from-h-e-slides", images="pneumonia-from-chest-x-rays")
SLUGS = {"train-submit": SUBJECT["spots"], "infer": f"{SUBJECT['spots']}-in-minutes",
    "explore": f"{SUBJECT['spots']}-a-first-look", "classify": SUBJECT["images"]}
QUIET = dict(show=lambda line: None)


def notebook_in(home): return read_json(home/f"{home.name}.ipynb")


def printed(root):
    "What a kernel's cells showed, as text."
    outputs = [o for c in read_json(root/"done.ipynb")["cells"] for o in c.get("outputs", [])]
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    return "\n".join(t if isinstance(t, str) else "".join(t) for t in texts)


def pictures_shown(root):
    "How many pictures a kernel's cells showed."
    outputs = [o for c in read_json(root/"done.ipynb")["cells"] for o in c.get("outputs", [])]
    return sum("image/png" in o.get("data", {}) for o in outputs)


def attach(run, root, place):
    "What a kernel keeps of a run, as another kernel's output."
    for file in (p for p in run.rglob("*") if p.is_file() and is_result(p.relative_to(run).as_posix())):
        target = root/"input"/place/file.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


# --- what is built -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    "A kernel of each kind."
    folder = tmp_path_factory.mktemp("kernels")
    more = dict(classify=dict(recipe="pneumonia", competition="chests"))
    return {kind: build_kernel(folder, kind=kind, username="someone", **more.get(kind, {})) for kind in KERNEL_KINDS}


@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_the_committed_kernel_is_what_would_be_built(tmp_path, kind):
    "Building changes nothing, and nobody's name is in it. If this fails: histokit kernels build"
    home = COMMITTED/SLUGS[kind]
    assert read_plan(notebook_in(home)).kind == kind
    copy = shutil.copytree(home, tmp_path/home.name)
    assert build_again(copy) == [copy]
    for name in (f"{home.name}.ipynb", "kernel-metadata.json"):
        assert (copy/name).read_bytes() == (home/name).read_bytes(), f"{name}: histokit kernels build"
    meta = read_json(home/"kernel-metadata.json")
    owners = {s.split("/")[0] for s in (meta["id"], *meta["kernel_sources"])}
    assert owners == {"INSERT_USERNAME"}
    assert [str(f) for f in check_kernel(home) if "INSERT_USERNAME" not in f.what] == []


@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_a_quarter_is_left_for_each_kind(kernels, kind):
    sent = len(upload_text(notebook_in(kernels[kind])).encode())
    left = 1 - sent / KAGGLE_TAKES
    print(f"{kind}: {sent / 1e3:.0f} kB would be sent, {left:.0%} is left")
    assert left >= .25, f"{kind}: {sent / 1e3:.0f} kB would be sent, {left:.0%} is left"


def test_metadata_of_each_kind(kernels):
    "Machine, internet and inputs follow the kind; the title makes the address; check is content."
    meta = {kind: read_json(home/"kernel-metadata.json") for kind, home in kernels.items()}
    assert {kind: home.name for kind, home in kernels.items()} == SLUGS
    assert [m["enable_gpu"] for m in meta.values()] == [True, True, False, True]
    assert [m["machine_shape"] for m in meta.values()] == ["NvidiaTeslaT4", "NvidiaTeslaT4", "", "NvidiaTeslaT4"]
    assert [m["enable_internet"] for m in meta.values()] == [True, False, False, True]
    assert meta["infer"]["kernel_sources"] == [meta["train-submit"]["id"]]
    for m in meta.values(): assert re.fullmatch(r"[A-Za-z0-9 -]{5,50}", m["title"]) and m["title"][0].isupper()
    assert [check_kernel(home) for home in kernels.values()] == [[]] * 4


@pytest.mark.parametrize("kind, without", [("infer", ("crossval", "spots/answers", "nbs/", "params/")),
    ("explore", ("crossval", "spots/answers", "predictor"))])
def test_what_trains_stays_at_home(kernels, kind, without):
    files = carried(notebook_in(kernels[kind]))
    assert not [name for name in files for part in without if part in name]
    legible = [s for c in notebook_in(kernels[kind])["cells"] if (s := "".join(c["source"])).startswith("%%writefile")]
    assert len(legible) >= 7                                  # what decides can be read


@pytest.mark.parametrize("args, said", [
    (dict(kind="explroe"), "did you mean 'explore'"),
    (dict(kind="classify", recipe="resnet18"), "is not for recipes of task spots"),
    (dict(kind="infer", recipe="retrieve", competition="c"), "choose a single recipe of task spots, images"),
    (dict(kind="explore", recipe="tb,reports", competition="c"), "choose a single recipe"),
    (dict(kind="infer", weights="resnet18.pth"), "trains nothing"),
    (dict(kind="infer", overrides=["epochs=3"]), "takes device alone"),
    (dict(kind="classify"), "--competition SLUG")])
def test_what_cannot_be_built_is_one_line(tmp_path, args, said):
    with pytest.raises(BadInput, match=said) as e: build_kernel(tmp_path, **args)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_traps_of_the_kinds(kernels, tmp_path):
    "A run that is not attached, and a GPU that nobody uses, are found."
    for kind, change, said in (("infer", dict(kernel_sources=[]), "no trained run is attached"),
            ("explore", dict(enable_gpu=True), "enable_gpu is true, and nothing needs it")):
        home = shutil.copytree(kernels[kind], tmp_path/kernels[kind].name)
        write_json(home/"kernel-metadata.json", read_json(home/"kernel-metadata.json") | change)
        assert any(said in str(f) for f in check_kernel(home))


def test_the_command_builds_each_kind(tmp_path, monkeypatch):
    "Options reach the kernel; without any, the default one is built and those beside it are built again."
    from typer.testing import CliRunner
    from histokit.cli_kernels import app
    cli = lambda *args: CliRunner().invoke(app, ["kernels", *map(str, args)])
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    asked = ("--kind", "infer", "--kernel", "another/kernel", "-p", "device=cpu")
    assert cli("build", tmp_path, *asked).exit_code == 0
    home = tmp_path/SLUGS["infer"]
    assert read_json(home/"kernel-metadata.json")["kernel_sources"] == ["another/kernel"]
    assert "device: str = 'cpu'" in json.dumps(notebook_in(home))
    before = (home/f"{home.name}.ipynb").read_bytes()
    (home/f"{home.name}.ipynb").write_bytes(before.replace(b"In here is histokit", b"In here was histokit"))
    assert cli("check", tmp_path).exit_code == 1
    done = cli("build", tmp_path)
    assert done.output.splitlines() == [f"wrote {tmp_path/SLUGS[k]}" for k in ("train-submit", "infer")]
    assert (home/f"{home.name}.ipynb").read_bytes() == before and cli("check", tmp_path).exit_code == 0
    assert read_json(home/"kernel-metadata.json")["kernel_sources"] == ["another/kernel"]
    bad = cli("build", tmp_path, "--kind", "train")
    assert bad.exit_code == 1 and len(bad.output.splitlines()) == 1


# --- the executed copies -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_the_executed_copy_shows_the_kernel(kind):
    "The kernel's own cells, pictures, nothing of the machine that made it. If not: histokit kernels show"
    home = COMMITTED/SLUGS[kind]
    assert copy_fits(home) == ""
    text, copy = (home/SHOWN_COPY).read_text(encoding="utf-8"), read_json(home/SHOWN_COPY)
    assert len(text.encode()) < 1_000_000 and re.fullmatch(r"[0-9a-f]{12}", copy["metadata"]["histokit"]["code"])
    code = [c for c in copy["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 1
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(home|root|Users|work|tmp|opt)/\w", words)
    shown = ["".join(c["source"]) for c in code]
    assert max(map(len, shown)) < 4000 and sum("more lines, which are in the kernel" in s for s in shown) >= 7


# --- infer ---------------------------------------------------------------------------------------------------------

def test_infer_answers_slides(kernels, finished_run, tmp_path):
    "The output of the kernel that trained, and the slides: what was submitted comes again, without a training."
    root = mount(tmp_path/"kaggle", LAYOUTS[1])
    attach(finished_run, root, "notebooks/someone/my-kernel/run")
    done = papermill(kernels["infer"], root, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    factory, answer = DataFactory(smoke_demo()), read_submission(root/"working"/"submission.csv")
    check_submission(answer, int(factory.spots.split.eq("Test").sum()), factory.targets)
    submitted = RunFolder(finished_run).table("submission.csv").sort_values("ID")[list(answer.columns)]
    assert abs(answer.to_numpy()[:, 1:] / submitted.to_numpy()[:, 1:] - 1).max() < 1e-4
    assert [p.name for p in (root/"working").rglob("*") if p.is_file()] == ["submission.csv"]
    assert str(root/"temp"/"code"/"histokit"/"__init__.py") in printed(root) and pictures_shown(root) == 1


@pytest.fixture(scope="module")
def picture_run(tmp_path_factory):
    "A small run of pictures."
    data = f"data_path={smoke_pictures()}"
    folder, stages = tmp_path_factory.mktemp("pictures")/"run", ("10_images", "11_classify")
    return run_pipeline("tb", [data, "weights=none", *TINY.split()], folder, stages, **QUIET)


@pytest.mark.slow
def test_infer_answers_pictures(picture_run, tmp_path):
    "The same of pictures, in the template's columns and order."
    kernel = build_kernel(tmp_path, "tb", kind="infer", username="someone", competition="chests")
    assert check_kernel(kernel) == []
    root = mount_pictures(tmp_path/"kaggle", "competitions/chests")
    attach(picture_run, root, "my-kernel/run")
    done = papermill(kernel, root, device="cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    form = find_pictures(smoke_pictures()).form
    answer, submitted = (read_submission(f/"submission.csv", form) for f in (root/"working", picture_run))
    assert list(answer.columns) == form.columns and len(answer)
    pd.testing.assert_frame_equal(answer, submitted, atol=1e-4)
    assert pictures_shown(root) == 1


def infer_look(kernel, root):
    "Execute the cell that looks for the run and the data."
    source = next(s for c in notebook_in(kernel)["cells"] if "find_trained(" in (s := "".join(c["source"])))
    names = dict(kaggle_root=str(root), run_path="", data_path="", competition="", device="cpu", working=root/"working")
    exec(source, names)
    return names


def test_infer_says_what_is_there(kernels, finished_run, tmp_path):
    "Without a run, with one that did not end, with two, and without slides: one line with the files and the mend."
    root = mount(tmp_path/"kaggle", LAYOUTS[0])
    (root/"input"/"weights").mkdir()
    (root/"input"/"weights"/"resnet18.safetensors").write_bytes(b"no run")
    def fails(said):
        with pytest.raises(BadInput, match=said) as e: infer_look(kernels["infer"], root)
        assert "\n" not in str(e.value) and "--kernel OWNER/SLUG" in str(e.value)
    fails(r"no trained run .*there: .*slides.h5 .*resnet18.safetensors \(6 bytes\)")
    attach(finished_run, root, "one/run")
    (root/"input"/"one"/"run"/"prediction.json").rename(root/"prediction.json")
    fails("did not end")
    (root/"prediction.json").rename(root/"input"/"one"/"run"/"prediction.json")
    assert find_trained(root) == root/"input"/"one"/"run"
    assert infer_look(kernels["infer"], root)["run"] == root/"input"/"one"/"run"
    (root/"input"/LAYOUTS[0]/"slides.h5").unlink()
    with pytest.raises(BadInput, match="no HDF5 file"): infer_look(kernels["infer"], root)
    kept = root/"input"/"two"/"run"/"predictor"/"kept.json"
    attach(finished_run, root, "two/run")
    kept.write_text(kept.read_text() + "\n")
    with pytest.raises(BadInput, match="2 folders could be the trained run.*one/run.*two/run"): find_trained(root)


# --- explore -------------------------------------------------------------------------------------------------------

def test_explore_shows_slides(kernels, tmp_path):
    "Checks, slides, targets and stain; figures inline and kept; nothing is trained and nothing handed in."
    root = mount(tmp_path/"kaggle", LAYOUTS[2])
    done = papermill(kernels["explore"], root, overrides="stain_method=macenko registration=off")
    assert done.returncode == 0, done.stderr[-3000:]
    kept = {p.relative_to(root/"working").as_posix() for p in (root/"working").rglob("*") if p.is_file()}
    assert {"report.html", "figures/data_slides.png", "figures/data_targets.png", "figures/stain.png"} <= kept
    assert not [name for name in kept if name.endswith((".csv", ".h5", ".safetensors"))]
    assert pictures_shown(root) >= 5 and "note" in printed(root)


@pytest.mark.slow
def test_explore_shows_pictures(tmp_path):
    kernel = build_kernel(tmp_path, "image_probe", kind="explore", username="someone", competition="chests")
    assert check_kernel(kernel) == [] and read_json(kernel/"kernel-metadata.json")["enable_internet"] is False
    root = mount_pictures(tmp_path/"kaggle", "chests")
    done = papermill(kernel, root, overrides="input_px=32 folds=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (root/"working"/"report.html").exists() and (root/"working"/"figures"/"samples.png").exists()
    assert pictures_shown(root) >= 2 and not list((root/"working").rglob("submission.csv"))


# --- classify ------------------------------------------------------------------------------------------------------

def test_classify_answers_another_competition(tmp_path):
    "Any slug, and a template with names of its own: its columns, its order."
    root = mount_pictures(tmp_path/"kaggle", "competitions/lungs-at-large")
    form = root/"input/competitions/lungs-at-large/sample_submission.csv"
    table = pd.read_csv(form, dtype=str)[::-1]
    table.columns = ["image_name", "disease_probability"]
    table.to_csv(form, index=False)
    kernel = build_kernel(tmp_path, "pneumonia", username="someone", competition="lungs-at-large")
    assert read_plan(notebook_in(kernel)).kind == "classify" and check_kernel(kernel) == []
    assert kernel.name.startswith(FINDINGS["pneumonia"])
    fast = f"{TINY} method=probe head=linear hidden=8 unfreeze=all sampler=shuffle loss=auto"
    done = papermill(kernel, root, weights="none", overrides=fast)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = pd.read_csv(root/"working"/"submission.csv", dtype={"image_name": str})
    assert list(answer.columns) == list(table.columns) and list(answer.image_name) == list(table.image_name)
    assert answer.disease_probability.between(0, 1).all() and answer.disease_probability.nunique() > 1


def test_the_test_is_fair(tmp_path):
    "Where these kernels ran there is no clone."
    code = "import importlib.util as u; s = u.find_spec('histokit'); print(s and s.origin)"
    assert offline(tmp_path, "-c", code).stdout.strip() == "None"

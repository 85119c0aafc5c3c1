"The commands that talk to Kaggle, with its unpatched client, against a server that misbehaves as Kaggle does."
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from kaggle_server import HTML, KaggleServer, Version

pytest.importorskip("kagglesdk")

from typer.testing import CliRunner

from histokit.cli_kernels import app
from histokit.core.files import read_json, write_json
from histokit.core.submission import counted_form, write_submission
from histokit.core.text import BadInput
from histokit.kaggle import upload_text
from histokit.kaggle_client import client_version, open_kaggle
from histokit.kaggle_submit import share_wheels

REPO = Path(__file__).resolve().parent.parent
COMPETITION, KERNEL = "el-hackathon-2025", "someone/tiny-kernel"
ENVIRONMENT = dict(KAGGLE_API_ENVIRONMENT="LOCALHOST", KAGGLE_USERNAME="someone", KAGGLE_KEY="0" * 32)


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    "A server of ours in the place of Kaggle, and someone's key."
    server = KaggleServer()
    for name in [n for n in os.environ if "proxy" in n.lower() or n.startswith("KAGGLE_")]: monkeypatch.delenv(name)
    for name, value in dict(ENVIRONMENT, http_proxy=server.address, HOME=str(tmp_path/"home")).items():
        monkeypatch.setenv(name, value)
    (tmp_path/"home").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))          # the client keeps notes of uploads there
    yield server
    server.close()
    assert not server.errors, server.errors


@pytest.fixture
def cli(kaggle, tmp_path, monkeypatch):
    "The commands, impatient."
    monkeypatch.chdir(tmp_path)
    def run(command, *args, timeout=20.):
        every = [] if command == "fetch" else ["--every", ".05"]
        given = [command, *args, "--timeout", timeout, *every]
        return CliRunner().invoke(app, ["kernels", *map(str, given)])
    return run


@pytest.fixture
def tiny(tmp_path):
    "A kernel of one cell; gives its folder, with changes of its metadata."
    folder = tmp_path/"tiny-kernel"
    cell = dict(cell_type="code", id="a1", metadata=dict(tags=["parameters"]), source=["x = 1\n", "x"], outputs=[],
        execution_count=None)
    spec = dict(display_name="Python 3", language="python", name="python3")
    meta = dict(id="INSERT_USERNAME/tiny-kernel", title="tiny kernel", code_file="tiny-kernel.ipynb", language="python",
        kernel_type="notebook", is_private=True, enable_gpu=True, enable_tpu=False, enable_internet=False,
        machine_shape="NvidiaTeslaT4", dataset_sources=[], competition_sources=[COMPETITION], kernel_sources=[],
        model_sources=[])
    def make(**changes):
        folder.mkdir(exist_ok=True)
        notebook = dict(cells=[cell], metadata=dict(kernelspec=spec), nbformat=4, nbformat_minor=5)
        write_json(folder/"tiny-kernel.ipynb", notebook)
        write_json(folder/"kernel-metadata.json", meta | changes)
        return folder
    return make


def answer_bytes(tmp_path, n=3):
    "The bytes of a valid answer."
    write_submission(tmp_path/"answer.csv", np.random.default_rng(0).random((n, 2)), counted_form(n, ["C1", "C2"]))
    return (tmp_path/"answer.csv").read_bytes()


def refused(answer, *said):
    "Exit status 1; the last line is ours and says this; nothing on standard output, no traceback."
    lines = answer.stderr.strip().splitlines()
    assert answer.exit_code == 1, answer.output
    assert lines[-1].startswith("histokit: ") and not answer.stdout, answer.output
    for text in said: assert text in lines[-1], lines[-1]
    return lines


# --- log-in --------------------------------------------------------------------------------------------------------

def log_in(monkeypatch, tmp_path, how):
    "Nothing but this log-in."
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"): monkeypatch.delenv(name)
    home = tmp_path/"home"/".kaggle"
    home.mkdir()
    if how == "variable": monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_good")
    if how == "file": (home/"access_token").write_text("KGAT_good\n")
    if how == "browser":
        write_json(home/"credentials.json", dict(refresh_token="refresh_good", username="browseruser", scopes=[]))
    if how == "expired browser": write_json(home/"credentials.json", dict(refresh_token="old", username="browseruser"))
    if how == "expired token": monkeypatch.setenv("KAGGLE_API_TOKEN", "KGAT_old")


@pytest.mark.parametrize("how, owner", [("variable", "tokenuser"), ("file", "tokenuser"), ("browser", "browseruser")])
def test_the_owner_is_who_is_logged_in(kaggle, cli, tiny, monkeypatch, tmp_path, how, owner):
    "Tokens and a log-in in the browser, no name given anywhere: the kernel that arrives is theirs."
    log_in(monkeypatch, tmp_path, how)
    done = cli("push", tiny())
    assert done.exit_code == 0, done.output
    assert kaggle.sent("SaveKernel")[0]["slug"] == f"{owner}/tiny-kernel"
    assert "INSERT_USERNAME" in (tiny()/"kernel-metadata.json").read_text()            # and stays out of the folder


@pytest.mark.parametrize("how, said", [
    ("nothing", "not logged in to Kaggle: run kaggle auth login"),
    ("expired token", "does not know the token in KAGGLE_API_TOKEN: make a new one"),
    ("expired browser", "the log-in has expired; not logged in")])
def test_no_log_in(kaggle, cli, tiny, monkeypatch, tmp_path, how, said):
    log_in(monkeypatch, tmp_path, how)
    assert len(refused(cli("push", tiny()), said)) == 1 and not kaggle.sent("SaveKernel")


@pytest.mark.parametrize("kind, said", [("html503", "log-in: refused (503)"), ("html", "perhaps a web page"),
    ("close", "the connection failed"), ("slow", "no answer within 1 s")])
def test_a_token_while_kaggle_is_in_trouble(kaggle, cli, tiny, monkeypatch, tmp_path, kind, said):
    "An outage is not taken for a wrong token."
    log_in(monkeypatch, tmp_path, "variable")
    kaggle.fault("IntrospectToken", kind, times=3)
    refused(cli("push", tiny(), timeout=.5), said)


def test_a_wrong_key(kaggle, cli, tiny, monkeypatch):
    monkeypatch.setenv("KAGGLE_KEY", "1" * 32)
    refused(cli("push", tiny()), "refused (401)", "run kaggle auth login")


def test_the_client_is_there_and_new_enough(monkeypatch):
    assert client_version() >= (2, 2, 4)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.7.4.5")
    with pytest.raises(BadInput, match="1.7.4.5, which is too old: pip install 'kaggle>=2.2.4'"): open_kaggle()
    def missing(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(BadInput, match=r"not installed: pip install 'histokit\[kaggle\]'"): open_kaggle()


def test_what_the_client_forgets_to_declare(tmp_path):
    "Without `six` the client cannot be imported; the line names it, and the package's extra brings it."
    code = "import sys; sys.modules['six'] = None\nfrom histokit.kaggle_client import open_kaggle\nopen_kaggle()"
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | ENVIRONMENT | dict(HOME=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    extra = next(line for line in (REPO/"pyproject.toml").read_text().splitlines() if line.startswith("kaggle = ["))
    assert '"six' in extra and '"kaggle>=2.2.4"' in extra
    if done.returncode: assert "needs six: pip install 'histokit[kaggle]'" in done.stderr, done.stderr


# --- push ----------------------------------------------------------------------------------------------------------

def test_push_sends_the_kernel(kaggle, cli, tmp_path):
    "A kernel of full size, sent with options: the payload, the quota first, the address last."
    slug = "cell-types-from-h-e-slides"
    home = shutil.copytree(REPO/"kaggle_kernels"/slug, tmp_path/"kernels"/slug)
    (home/"executed.ipynb").unlink(missing_ok=True)
    notebook = read_json(home/f"{slug}.ipynb")
    del notebook["metadata"]["histokit"]                    # else it would have to be that of the code as it is now
    write_json(home/f"{slug}.ipynb", notebook)
    done = cli("push", tmp_path/"kernels", "--image", "original", "--hours", "2.5")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"someone/{slug}/1 is saved: https://www.kaggle.com/code/someone/{slug}\n"
    assert "GPU quota: 20.0 of 30 hours left, renewed on 05 December" in done.stderr
    [sent] = kaggle.sent("SaveKernel")
    assert sent["text"] == upload_text(read_json(next((tmp_path/"kernels").rglob("*.ipynb"))))
    asked = dict(slug=f"someone/{slug}", newTitle="Cell types from H-E slides", isPrivate=True, enableGpu=True,
        enableInternet=True, machineShape="NvidiaTeslaT4", competitionDataSources=[COMPETITION],
        dockerImagePinningType="original", sessionTimeoutSeconds=9000)
    assert {name: sent.get(name) for name in asked} == asked
    order = [name for name, _ in kaggle.arrived]
    assert order.index("GetAcceleratorQuotaStatistics") < order.index("SaveKernel")


def test_push_in_json_and_on_a_cpu(kaggle, cli, tiny):
    done = cli("push", tiny(), "--accelerator", "none", "--json")
    assert json.loads(done.stdout) == dict(kernel=f"{KERNEL}/1", version=1, url=f"https://www.kaggle.com/code/{KERNEL}")
    [sent] = kaggle.sent("SaveKernel")
    assert sent.get("enableGpu") is False and not sent.get("machineShape")


def test_dry_run_sends_nothing(kaggle, cli, tiny):
    done = cli("push", tiny(), "--dry-run", "--image", "gcr.io/kaggle-images/python@sha256:ab", "--json")
    assert json.loads(done.stdout)["docker_image"] == "gcr.io/kaggle-images/python@sha256:ab"
    assert done.exit_code == 0 and "nothing was sent" in cli("push", tiny(), "--dry-run").stdout
    assert not kaggle.sent("SaveKernel")


def test_no_run_saves_only(kaggle, cli, tiny):
    "A quick save, where the client can; else the line says which can."
    from kaggle.api.kaggle_api_extended import KaggleApi
    done = cli("push", tiny(), "--no-run", "--watch")
    if "no_run" in inspect.signature(KaggleApi.kernels_push).parameters:
        assert done.exit_code == 0 and kaggle.sent("SaveKernel")[0]["kernelExecutionType"] == "QUICK_SAVE"
        assert not kaggle.sent("GetKernelSessionStatus")
    else: refused(done, "pip install 'kaggle>=2.2.5'")


def test_a_name_that_kaggle_does_not_know_makes_another_machine(kaggle, cli, tiny):
    done = cli("push", tiny(), "--accelerator", "nvidiaTeslaT4")
    assert done.exit_code == 0 and "Kaggle made Gpu of the accelerator nvidiaTeslaT4" in done.stderr


def test_a_quota_that_cannot_be_read_is_said(kaggle, cli, tiny):
    kaggle.fault("GetAcceleratorQuotaStatistics", "html")
    done = cli("push", tiny())
    assert done.exit_code == 0 and "GPU quota: what came is no answer" in done.stderr
    assert "going on without it" in done.stderr
    kaggle.quota = None
    assert "Kaggle names no GPU quota" in cli("push", tiny()).stderr


AGAIN = "may be saved all the same: look at https://www.kaggle.com/code/someone/tiny-kernel before pushing again"
PHONE = dict(error="Phone verification is required")


def reply(kind, **more): return lambda kaggle: kaggle.fault("SaveKernel", kind, **more)


PUSH_FAILURES = {       # what is injected -> how, changes of the metadata, what the line says
    "two GPU sessions run": (lambda k: setattr(k, "sessions", 2), {}, "count of 2 reached.; wait until one"),
    "rules not accepted": (lambda k: k.joined.clear(), {}, f"{COMPETITION}/rules, and push again"),
    "dataset dropped": (None, dict(dataset_sources=["a/gone"]), "runs without dataset a/gone"),
    "model dropped": (None, dict(model_sources=["a/m/pyTorch/v/1"]), "runs without model a/m/pyTorch/v/1"),
    "kernel dropped": (None, dict(kernel_sources=["a/other-kernel"]), "runs without kernel a/other-kernel"),
    "keyword dropped": (None, dict(keywords=["no-such-tag"]), "runs without keyword no-such-tag"),
    "empty reply": (reply("empty"), {}, "no version came back, so it may not be saved"),
    "a list for a reply": (reply("garbage"), {}, "no version came back, so it may not be saved"),
    "reply without a body": (reply("nothing"), {}, AGAIN),
    "HTML for a reply": (reply("html"), {}, "perhaps a web page"),
    "HTML with 503": (reply("html503"), {}, "refused (503): Service Unavailable; Kaggle is in trouble"),
    "reply cut": (reply("cut"), {}, AGAIN),
    "connection closed": (reply("close"), {}, "the connection failed"),
    "no reply in time": (reply("slow", seconds=5), {}, "no answer within 2 s"),
    "401": (reply(401, message="Unauthenticated"), {}, "refused (401): Unauthenticated; the log-in"),
    "403": (reply(403, message="Permission denied"), {}, "refused (403): Permission denied; perhaps"),
    "429": (reply(429, message="Too many"), {}, "refused (429): Too many; too many requests: wait"),
    "500": (reply(500, message="Internal"), {}, "refused (500): Internal; Kaggle is in trouble"),
    "phone not verified": (lambda k: setattr(k, "SaveKernel", lambda body: PHONE), {}, "verify your phone number"),
    "no GPU hours left": (lambda k: setattr(k, "quota", ("108000s",) * 2), {}, "not sent: no GPU hours are left"),
    "somebody else's kernel": (None, dict(id="other/tiny-kernel"), "is other's and someone is logged in"),
    "known not to run": (None, dict(title="another title"), "not sent, because it would fail: the title makes"),
}


@pytest.mark.parametrize("what", PUSH_FAILURES)
def test_push_fails_in_one_line(kaggle, cli, tiny, what):
    inject, changes, said = PUSH_FAILURES[what]
    if inject: inject(kaggle)
    lines = refused(cli("push", tiny(**changes), timeout=.5 if "time" in what else 20), said)
    assert len(lines) <= 2 and all(line.startswith(("GPU quota: ", "histokit: ")) for line in lines)


def test_a_kernel_must_be_one(cli, tiny, tmp_path):
    refused(cli("push", tmp_path/"nothing"), "holds no kernel; run: histokit kernels build")
    shutil.copytree(tiny(), tmp_path/"second")
    refused(cli("push", tmp_path), "holds 2 kernels; name one")


# --- watch ---------------------------------------------------------------------------------------------------------

def running(states=("QUEUED", "RUNNING", "RUNNING", "COMPLETE"), **more):
    return Version(dict(competitionDataSources=[COMPETITION]), list(states), **more)


def test_push_and_watch_until_it_is_over(kaggle, cli, tiny):
    kaggle.next = running(log=["epoch 1", "epoch 2", "wrote submission.csv"])
    kaggle.next.states = ["QUEUED", *["RUNNING"] * 8, "COMPLETE"]
    done = cli("push", tiny(), "--watch")
    assert done.exit_code == 0, done.output
    lines = [line.strip() for line in done.stderr.splitlines()][1:]
    assert [n for n in lines if n.startswith(KERNEL)] == [f"{KERNEL}/1: {s}" for s in ("queued", "running", "complete")]
    assert [n for n in lines if not n.startswith(KERNEL)] == ["epoch 1", "epoch 2", "wrote submission.csv"]
    assert {body["versionLabel"] for body in kaggle.sent("GetKernelSessionStatus")} == {"v1"}


def test_an_older_success_does_not_count(kaggle, cli):
    "Version 1 is complete and version 2 fails: watching 2 fails, with the last lines of its own log."
    log = [f"line {i}" for i in range(50)] + ["MemoryError: out of memory"]
    second = running(["RUNNING", "ERROR"], log=log, message="Notebook failed")
    kaggle.add(KERNEL, running(["COMPLETE"], log=["all well"]), second)
    lines = refused(cli("watch", f"{KERNEL}/2"), f"{KERNEL}/2 failed: Notebook failed; the last lines of its log")
    assert "    MemoryError: out of memory" in lines and "    all well" not in lines
    done = cli("watch", f"{KERNEL}/1")
    assert done.exit_code == 0 and "all well" in done.stderr and "out of memory" not in done.stderr
    refused(cli("watch", KERNEL), f"{KERNEL}/2 failed")                                   # the newest is meant
    refused(cli("watch", f"{KERNEL}/3"), f"{KERNEL}/3 does not exist; the newest version is 2")


@pytest.mark.parametrize("kind", ["cut", "close", "html", "html503", "nothing", 404, 429, 500])
def test_watching_outlasts_an_outage(kaggle, cli, kind):
    kaggle.add(KERNEL, running(log=["epoch 1"]))
    kaggle.fault("GetKernelSessionStatus", kind, times=3)
    done = cli("watch", KERNEL)
    assert done.exit_code == 0 and done.stderr.count("asking again") == 3, done.output


def test_watching_gives_up_and_says_that_it_runs_on(kaggle, cli):
    kaggle.add(KERNEL, running())
    kaggle.fault("GetKernelSessionStatus", 503, times=99)
    lines = refused(cli("watch", KERNEL, "--patience", "3"), "asked 3 times; the kernel runs on: https://www")
    assert len(lines) == 3
    kaggle.fault("GetKernelSessionStatus", "slow", times=99, seconds=2)
    refused(cli("watch", KERNEL, "--patience", "2", timeout=.5), "no answer within 1 s")
    kaggle.fault("GetKernelSessionStatus", 401, times=99, message="Unauthenticated")
    assert len(refused(cli("watch", KERNEL), "refused (401)")) == 1                       # at once


def test_a_log_that_breaks_off_is_shown_once(kaggle, cli):
    kaggle.add(KERNEL, running(["RUNNING"] * 12 + ["COMPLETE"], log=[f"epoch {i}" for i in range(9)]))
    kaggle.fault("stream", "cut", times=2)
    done = cli("watch", KERNEL)
    assert re.findall(r"epoch \d", done.stderr) == [f"epoch {i}" for i in range(9)], done.output


def test_cancelled_and_unknown(kaggle, cli):
    kaggle.add(KERNEL, running(["CANCEL_ACKNOWLEDGED"]))
    refused(cli("watch", KERNEL), "was cancelled")
    refused(cli("watch", "someone/other-kernel"), "refused (403): Permission 'kernels.get' was denied; perhaps")
    refused(cli("watch", "a b c"), "names no kernel; give OWNER/KERNEL")


def test_ctrl_c_says_that_the_kernel_runs_on(kaggle, tmp_path):
    kaggle.add(KERNEL, running(["RUNNING"]))
    command = [str(Path(sys.executable).parent/"histokit"), "kernels", "watch", KERNEL, "--every", ".1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 40
    while not kaggle.sent("GetKernelSessionStatus") and time.monotonic() < until: time.sleep(.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert f"{KERNEL}/1 runs on, its API cannot cancel; stop it at https://www.kaggle.com/code/{KERNEL}" in said, said


# --- fetch ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def finished(kaggle, tmp_path):
    "A version that is complete and left some files."
    files = {"submission.csv": answer_bytes(tmp_path), "report.html": HTML, "run/figures/fit.png": b"\x89PNG\r\n",
        "run/metrics.json": b'{"oof": []}', "weights.pt": b"w" * 5000}
    kaggle.add(KERNEL, running(["COMPLETE"], files=files))
    return files


def test_fetch_only_what_is_asked_for(kaggle, cli, finished, tmp_path):
    done = cli("fetch", KERNEL)
    assert done.stdout == "wrote runs/kaggle/tiny-kernel-1/submission.csv\n"
    assert Path("runs/kaggle/tiny-kernel-1/submission.csv").read_bytes() == finished["submission.csv"]
    assert kaggle.sent("GET") == [f"files/{KERNEL}/1/submission.csv"]
    cli("fetch", f"{KERNEL}/1", "-o", tmp_path/"out", "--file", "*.png", "--file", "report.html")
    assert sorted(p.name for p in (tmp_path/"out").rglob("*") if p.is_file()) == ["fit.png", "report.html"]
    assert len(kaggle.sent("ListKernelSessionOutput")) == 6                              # five files, two a page


def spoil(name, content):
    "An injector: the file holds this instead."
    def inject(kaggle): kaggle.kernels[KERNEL][0].files[name] = content
    return inject


def always(kind, **more): return lambda kaggle: kaggle.fault("submission.csv", kind, times=9, **more)


def state(name): return lambda kaggle: setattr(kaggle.kernels[KERNEL][0], "states", [name])


ANSWER = "submission.csv"
FETCH_FAILURES = {      # what is injected -> how, what is asked for, what the line says
    "still running": (state("RUNNING"), ANSWER, "is not complete but running"),
    "failed": (state("ERROR"), ANSWER, "is not complete but error; why, says histokit"),
    "no such file": (None, "model.pt", "left no model.pt; there is report.html"),
    "HTML for a file": (always("html"), ANSWER, "submission.csv: what came is a web page; nothing was written"),
    "error page for a file": (always("html503"), ANSWER, "refused (503): Service Unavailable; Kaggle is in trouble"),
    "link expired": (always(403, message="expired"), ANSWER, "refused (403): Forbidden"),
    "file cut": (always("cut"), ANSWER, "the connection failed"),
    "connection closed": (always("close"), ANSWER, "nothing was written"),
    "no file in time": (always("slow", seconds=2.5), ANSWER, "no answer within 1 s"),
    "empty file": (spoil(ANSWER, b""), ANSWER, "what came is empty"),
    "zeros for a file": (spoil("weights.pt", bytes(600)), "weights.pt", "what came is zeros only"),
    "an answer with a gap": (spoil(ANSWER, b"ID,C1\n0,1.5\n1,\n"), ANSWER, "was not kept: C1 of ID 1 is not finite"),
    "an ID twice": (spoil(ANSWER, b"ID,C1\n0,1.5\n0,2\n"), ANSWER, "was not kept: ID 0 is there twice"),
    "no picture": (spoil("run/figures/fit.png", b"GIF89a"), "*.png", "not a PNG picture"),
    "broken JSON": (spoil("run/metrics.json", b'{"oof": ['), "*.json", "was not kept: it is not readable JSON"),
    "a name that leads out": (spoil("../evil.csv", b"ID,C1\n0,1\n"), "*evil.csv", "leads out of out; it was not"),
    "HTML for the list": (lambda k: k.fault("ListKernelSessionOutput", "html"), ANSWER, "perhaps a web page"),
    "list cut": (lambda k: k.fault("ListKernelSessionOutput", "cut"), ANSWER, "the connection failed"),
}


@pytest.mark.parametrize("what", FETCH_FAILURES)
def test_fetch_fails_in_one_line_and_writes_nothing(kaggle, cli, finished, what):
    inject, wanted, said = FETCH_FAILURES[what]
    if inject: inject(kaggle)
    timeout = .5 if "time" in what else 20
    assert len(refused(cli("fetch", KERNEL, "-o", "out", "--file", wanted, timeout=timeout), said)) == 1
    assert [p for p in Path("out").rglob("*") if p.is_file()] == [] and not Path("evil.csv").exists()


def test_a_broken_download_is_tried_again_and_a_file_that_is_there_stays(kaggle, cli, finished):
    kaggle.fault("submission.csv", "cut", times=2)
    assert cli("fetch", KERNEL, "-o", "out").exit_code == 0
    Path("out/submission.csv").write_text("mine")
    refused(cli("fetch", KERNEL, "-o", "out"), "out/submission.csv is there already; give --overwrite")
    assert Path("out/submission.csv").read_text() == "mine"
    assert cli("fetch", KERNEL, "-o", "out", "--overwrite").exit_code == 0
    assert Path("out/submission.csv").read_bytes() == finished["submission.csv"]


# --- submit --------------------------------------------------------------------------------------------------------

@pytest.fixture
def answer(kaggle, tmp_path):
    "A valid answer, and a score that comes at the third question."
    answer_bytes(tmp_path)
    kaggle.scores = [dict(status="PENDING"), dict(status="PENDING"), dict(status="COMPLETE", publicScore="0.6433")]
    return tmp_path/"answer.csv"


def rung(name, value, kind): return dict(name=name, per_spot=value, low=value - .03, high=value + .03, kind=kind)


LADDER = dict(oof=[rung("constant: mean rank", .60, "constant"), rung("+ smoothing", .65, "model")])


def test_submit_a_file(kaggle, cli, answer):
    done = cli("submit", answer, "--competition", COMPETITION, "-m", "first try")
    assert done.exit_code == 0, done.output
    unknown = "the run's own expectation is not known here"
    assert done.stdout.splitlines() == ["submission 41: public score 0.6433", unknown]
    assert kaggle.sent("PUT") == [answer.read_bytes()]
    asked = dict(competitionName=COMPETITION, blobFileTokens="blob0", submissionDescription="first try")
    assert {name: kaggle.sent("CreateSubmission")[0][name] for name in asked} == asked


def test_submit_a_version_beside_what_it_expected(kaggle, cli, answer, finished):
    "The kernel's own competition; its answer is fetched, checked and sent; its ladder stands beside the score."
    kaggle.kernels[KERNEL][0].files["run/metrics.json"] = json.dumps(LADDER).encode()
    done = cli("submit", f"{KERNEL}/1")
    assert done.stdout.splitlines() == ["submission 41: public score 0.6433",
        "expected 0.6500 [0.620, 0.680] (+ smoothing, out of fold); the best constant 0.6000",
        "the score lies within the interval"], done.output
    assert kaggle.sent("PUT") == [finished["submission.csv"]]
    assert [g for g in kaggle.sent("GET") if "weights" in g] == []
    kaggle.scores = [dict(status="COMPLETE", publicScore="0.5500", privateScore="0.5600")]
    value = json.loads(cli("submit", f"{KERNEL}/1", "--json").stdout)
    assert (value["public"], value["private"], value["expected"]["value"]) == ("0.5500", "0.5600", .65)


def test_a_competition_that_takes_notebooks(kaggle, cli, answer, finished):
    kaggle.notebooks_only = {COMPETITION}
    refused(cli("submit", answer, "--competition", COMPETITION), "takes notebooks only; submit OWNER/KERNEL/VERSION")
    assert cli("submit", KERNEL, "--no-wait").stdout == "submission 41\n"
    asked = dict(kernelOwner="someone", kernelSlug="tiny-kernel", kernelVersion=1, fileName="submission.csv")
    assert {name: kaggle.sent("CreateCodeSubmission")[0][name] for name in asked} == asked
    assert not kaggle.sent("PUT")


def test_an_answer_in_a_run_is_held_against_its_data(kaggle, cli, answer, tmp_path):
    "A submission with a wrong number of rows for the slides that it answers never leaves."
    from histokit.spots.demo import smoke_demo
    lines = refused(cli("submit", answer, "--competition", COMPETITION, "--data", smoke_demo()))
    assert "rows" in lines[-1] or "column" in lines[-1], lines
    assert not kaggle.sent("PUT") and not kaggle.sent("CreateSubmission")


NO_COLUMN = dict(status="ERROR", errorDescription="Column C2 is missing")
MAY_COUNT = "it may count all the same: look at https://www.kaggle.com/competitions/el-hackathon-2025/submissions"
SUBMIT_FAILURES = {     # what is injected -> how, what the line says
    "rules not accepted": (lambda k: k.joined.clear(), "has not joined el-hackathon-2025; accept the rules at https://"),
    "none left today": (lambda k: setattr(k, "left", 0), "no submission to el-hackathon-2025 is left today, after 5"),
    "HTML for the competition": (lambda k: k.fault("GetCompetition", "html"), "perhaps a web page"),
    "upload refused": (lambda k: k.fault("PUT", 400, times=99), "was not handed in: its upload failed"),
    "upload in trouble": (lambda k: k.fault("PUT", "html503", times=99), "was not handed in: its upload failed"),
    "upload too slow": (lambda k: k.fault("PUT", "slow", times=99, seconds=5), "no answer within"),
    "empty reply": (lambda k: k.fault("CreateSubmission", "empty"), "no number came back, so it may not count"),
    "reply cut": (lambda k: k.fault("CreateSubmission", "cut"), MAY_COUNT),
    "HTML for a reply": (lambda k: k.fault("CreateSubmission", "html"), MAY_COUNT),
    "refused": (lambda k: k.fault("CreateSubmission", 403, message="The deadline passed"), "The deadline passed"),
    "not scored": (lambda k: setattr(k, "scores", [NO_COLUMN]), "submission 41 was refused: Column C2 is missing"),
    "no score in time": (lambda k: setattr(k, "scores", [dict(status="PENDING")]), "41 has no score after 0.01 min"),
}


@pytest.mark.parametrize("what", SUBMIT_FAILURES)
def test_submit_fails_in_one_line(kaggle, cli, answer, what):
    inject, said = SUBMIT_FAILURES[what]
    inject(kaggle)
    timeout = .5 if what == "upload too slow" else 20
    lines = refused(cli("submit", answer, "--competition", COMPETITION, "--minutes", ".01", timeout=timeout), said)
    assert len(lines) <= 2


def test_waiting_for_a_score_outlasts_an_outage(kaggle, cli, answer):
    for kind in ("cut", "html", 503):
        kaggle.scores = [dict(status="COMPLETE", publicScore="0.6433")]
        kaggle.fault("ListSubmissions", kind, times=2)
        done = cli("submit", answer, "--competition", COMPETITION)
        assert done.exit_code == 0 and done.stderr.count("asking again") == 2, done.output


def test_wrong_files_never_leave(kaggle, cli, tmp_path):
    (tmp_path/"gap.csv").write_text("ID,C1\n0,\n")
    refused(cli("submit", tmp_path/"gap.csv", "--competition", COMPETITION), "is not finite")
    refused(cli("submit", tmp_path/"gap.csv"), "give --competition SLUG")
    refused(cli("submit", tmp_path/"none.csv"), "none.csv does not exist; give a CSV")
    assert not kaggle.sent("PUT")


# --- wheels --------------------------------------------------------------------------------------------------------

def wheel(folder, name="nothing_at_all", version="1.0"):
    "A wheel with one empty module."
    folder.mkdir(exist_ok=True)
    info, path = f"{name}-{version}.dist-info", folder/f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(f"{name}.py", "")
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_fetched_and_shared(kaggle, cli, tmp_path, monkeypatch):
    "From pip to a private dataset that is ready; a package that is not to be had is one line."
    path = wheel(tmp_path/"index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path/"index"))
    done = cli("wheels", "nothing-at-all==1.0")
    assert done.exit_code == 0, done.output
    assert "is ready; build with: histokit kernels build --dataset someone/histokit-wheels" in done.stdout
    [made] = kaggle.sent("CreateDataset")
    assert made["isPrivate"] is True and made["slug"] == "histokit-wheels" and kaggle.sent("PUT") == [path.read_bytes()]
    refused(cli("wheels", "nothing-at-all==2.0"), "no wheels for Python 3.12: No matching distribution found")
    refused(cli("wheels"), "no package to share; name some")


@pytest.fixture
def share(kaggle, tmp_path):
    "Shares a folder of one wheel, impatiently."
    wheel(tmp_path/"wheels")
    quiet = dict(say=lambda line: None, every=.02, minutes=.02)
    return lambda: share_wheels(open_kaggle(20.), tmp_path/"wheels", **quiet)


def test_a_new_version_is_waited_for_and_the_same_is_not_sent_twice(kaggle, share, tmp_path):
    assert share() == "someone/histokit-wheels" and share() == "someone/histokit-wheels"
    assert len(kaggle.sent("CreateDataset")) == 1 and not kaggle.sent("CreateDatasetVersion")
    wheel(tmp_path/"wheels", version="1.1")
    kaggle.unpack = 3
    share()
    assert len(kaggle.sent("CreateDatasetVersion")) == 1
    assert len(kaggle.datasets["someone/histokit-wheels"]["files"]) == 2


def lose(kaggle): kaggle.loses = {"nothing_at_all-1.0-py3-none-any.whl"}


WHEEL_FAILURES = {      # what is injected -> how, what the line says
    "never ready": (lambda k: setattr(k, "unpack", 999), "someone/histokit-wheels is not ready after 0.02 min"),
    "a file is lost": (lose, "lacks nothing_at_all-1.0-py3-none-any.whl"),
    "upload refused": (lambda k: k.fault("PUT", 400, times=99), "nothing_at_all-1.0-py3-none-any.whl"),
    "refused": (lambda k: k.fault("CreateDataset", 400, message="Title is taken"), "refused (400): Title is taken"),
    "HTML for a reply": (lambda k: k.fault("CreateDataset", "html"), "perhaps a web page"),
    "empty reply": (lambda k: k.fault("CreateDataset", "empty"), "histokit-wheels: the reply is empty"),
    "status in trouble": (lambda k: k.fault("GetDatasetStatus", 503, times=99), "refused (503)"),
}


@pytest.mark.parametrize("what", WHEEL_FAILURES)
def test_sharing_wheels_fails_in_one_line(kaggle, share, what):
    inject, said = WHEEL_FAILURES[what]
    inject(kaggle)
    with pytest.raises(BadInput) as e: share()
    assert said in str(e.value) and "\n" not in str(e.value)


# --- what the README says ------------------------------------------------------------------------------------------

def readme_lines():
    "The lines of commands for kernels in the README's source."
    cells = read_json(REPO/"nbs"/"index.ipynb")["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.findall(r"(?m)^\s*(?:- run: )?histokit kernels (\w+.*)$", text)


def test_the_readme_names_options_that_there_are():
    "Each command of the section from clone to leaderboard, and each of its options."
    import typer
    commands = typer.main.get_command(app).commands["kernels"].commands
    lines = readme_lines()
    assert {line.split()[0] for line in lines} >= set(commands) - {"check", "watch"}
    for line in lines:
        command, *words = line.split()
        known = {o for p in commands[command].params for o in p.opts}
        assert {w for w in words if re.fullmatch(r"--?[a-z][a-z-]*", w)} <= known, line

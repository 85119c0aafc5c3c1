"""What several tests need: a tiny data file, one finished run at smoke size, and a browser without a screen."""
import os
import shutil
import signal
import tempfile
from multiprocessing.util import Finalize

# nohup and & start a program that ignores Ctrl-C, and so would the programs that the tests stop with it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # threads that spin while they wait slow each other down
os.environ.setdefault("MPLBACKEND", "agg")

import pytest


def pytest_configure(config):
    "What the tests write beside pytest's own folders lies in one folder, which goes when they end."
    if hasattr(config, "workerinput"): return                              # a worker has it from the one who started it
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # where pytest keeps what a failed test left
    folder = tempfile.mkdtemp(prefix="histokit-tests-")
    os.chmod(folder, 0o711)                                     # PostgreSQL runs as another user
    os.environ["TMPDIR"], tempfile.tempdir = folder, None
    # after multiprocessing has removed its own folder there (exitpriority -100)
    Finalize(None, shutil.rmtree, (folder, True), exitpriority=-200)


# the least that runs every stage
SMOKE = ["epochs=4", "stain_method=macenko", "views=none", "input_px=32", "smoothing=1"]


def smoke(data):
    "The parameters of the finished run."
    from histokit.spots.demo import demo_paths
    return [f"data_path={data}", f"truth_path={demo_paths(data).truth}", *SMOKE]


@pytest.fixture(scope="session")
def demo_file():
    from histokit.spots.demo import smoke_demo
    return str(smoke_demo())


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, demo_file):
    "A run folder with every stage done, not to be changed by a test."
    from histokit.pipeline import run_pipeline
    return run_pipeline("demo", smoke(demo_file), tmp_path_factory.mktemp("run")/"smoke", show=lambda line: None)


CHROMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")


@pytest.fixture(scope="module")       # while it is open, no other test of this process may run an event loop
def browser():
    "Chromium without a screen, driven by playwright; skips where either is missing."
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    found = os.environ.get("CHROME") or next(filter(None, map(shutil.which, CHROMES)), None)
    if not found: pytest.skip("no Chromium or Chrome on the PATH (or in $CHROME); the pages are not tried in a browser")
    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=quiet)
        yield chromium
        chromium.close()


# --- the review app: each test once on SQLite and once on a real PostgreSQL --------------------

@pytest.fixture(scope="session")
def postgres():
    "A PostgreSQL of its own; skips where its programs are missing."
    from review_tools import Postgres
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request):
    "A function that gives the address of an empty database; '' is SQLite in the study's folder."
    if request.param == "sqlite": return lambda: ""
    return request.getfixturevalue("postgres").new_database


@pytest.fixture
def store(database, tmp_path):
    "An empty study."
    from histokit.review.store import Store
    with Store(tmp_path/"study", database()) as opened: yield opened

"""What several tests need: a tiny data file, and one finished run at smoke size."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")   # threads that spin while they wait slow each other down
os.environ.setdefault("MPLBACKEND", "agg")

import pytest

# the least that runs every stage
SMOKE = ["epochs=4", "stain_method=macenko", "views=none", "input_px=32", "smoothing=1"]


@pytest.fixture(scope="session")
def demo_file():
    from histokit.spots.demo import smoke_demo
    return str(smoke_demo())


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, demo_file):
    "A run folder with every stage done, not to be changed by a test."
    from histokit.pipeline import run_pipeline
    return run_pipeline("demo", [f"data_path={demo_file}", *SMOKE], tmp_path_factory.mktemp("run")/"smoke",
        show=lambda line: None)

"The bench of GPUs, run on the CPU with tiny nets: its table is whole, and what goes wrong is a row."
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent/"bench"/"gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module                                     # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


def run_bench(*arguments):
    "Its exit status and what it printed."
    one_thread = os.environ | dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    command = [sys.executable, str(BENCH), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")/"gpu.json"
    status, printed = run_bench("--tiny", "--json", out)
    assert status == 0, printed
    return json.loads(out.read_text()), printed


def test_every_part_has_rows_and_none_failed(tiny_run):
    rows = tiny_run[0]["rows"]
    assert [r["what"] for r in rows if r["status"] != "measured"] == ["processes"]
    assert all(isinstance(r["value"], (int, float)) and r["unit"] for r in rows[:-1])
    text = "\n".join(r["what"] for r in rows)
    for what in ("copy in the device", "patches, augmented", "stain of a slide", "stain jitter", "test_convnext",
            "test_resnet", "bf16", "waiting for data", "peak memory", "predictions off", "out of memory", "killed and"):
        assert what in text, what


def test_rows_are_distinct_and_printed(tiny_run):
    found, printed = tiny_run
    names = [r["what"] for r in found["rows"]]
    assert len(set(names)) == len(names) and all(name in printed for name in names)
    assert set(found["rows"][0]) == {"what", "value", "unit", "seconds", "note", "status"}
    assert found["about"]["tiny"] is True and printed.rstrip().endswith("0 failed")


def value_of(rows, beginning):
    return next(r["value"] for r in rows if r["what"].startswith(beginning))


def test_results_stay_the_same(tiny_run):
    rows = tiny_run[0]["rows"]
    assert value_of(rows, "out of memory: batch") == 4 and value_of(rows, "out of memory: rows") == 1
    assert value_of(rows, "out of memory: weights") < 1
    assert value_of(rows, "killed and resumed") == 0
    assert value_of(rows, "test_convnext, float32: predictions") < .01
    assert 0 < value_of(rows, "test_convnext, 32 px, batch 4, bf16 (bf16 on the CPU): training")


@pytest.mark.slow
def test_two_processes_on_the_cpu(tmp_path):
    status, printed = run_bench("--tiny", "--parts", "processes", "--json", tmp_path/"two.json")
    assert status == 0, printed
    assert value_of(json.loads((tmp_path/"two.json").read_text())["rows"], "two processes") < 1


# what goes wrong

def measured(b):
    yield b.Row("one", 1., "things")
    yield b.Row("two", 2., "things")


class Stand:
    "Stands for the bench, with nothing to clean."
    def __init__(self, gpu): self.Row = gpu.Row
    def clean(self): pass


def rows_of(gpu, error):
    def part(b):
        yield b.Row("before", 1., "things")
        raise error
    return list(gpu.run_part(Stand(gpu), "part", part))


def test_an_exception_is_a_row_after_those_before_it(gpu):
    first, second = rows_of(gpu, ValueError("no\nsuch thing"))
    assert (first.what, first.status) == ("before", "measured")
    assert (second.what, second.status, second.note) == ("part", "failed", "ValueError: no such thing")


def test_what_is_missing_says_how_to_install_it(gpu):
    row = rows_of(gpu, ModuleNotFoundError("No module named 'PIL'", name="PIL"))[-1]
    assert (row.status, row.note) == ("skipped", "pip install pillow")


def test_what_cannot_be_had_is_skipped(gpu):
    row = rows_of(gpu, gpu.Skipped("needs two cards"))[-1]
    assert (row.status, row.note) == ("skipped", "needs two cards")


@pytest.mark.parametrize("status, code", [("measured", 0), ("failed", 1), ("skipped", 1)])
def test_exit_status(gpu, monkeypatch, capsys, tmp_path, status, code):
    row = gpu.Row("one", 1., "things", status=status)
    monkeypatch.setattr(gpu, "run_all", lambda names, tiny, written: [row])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--json", str(tmp_path/"out.json")])
    assert gpu.main() == code
    assert json.loads((tmp_path/"out.json").read_text())["rows"][0]["status"] == status
    assert f"1 {status}" in capsys.readouterr().out


def test_parts_go_on_in_a_new_process_after_an_error_of_the_card(gpu, monkeypatch):
    def broken(b):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield
    parts = dict(a=measured, b=broken, c=measured, d=measured)
    monkeypatch.setattr(gpu, "all_parts", lambda sizes: dict(parts))
    monkeypatch.setattr(gpu, "Bench", lambda tiny: Stand(gpu))
    monkeypatch.setattr(gpu, "run_in_fresh_process", lambda names, tiny: [gpu.Row(n, 3., "things") for n in names])
    rows = gpu.run_all([], False, lambda rows: None)
    assert [r.what for r in rows] == ["one", "two", "b", "c", "d"]


def test_without_a_card_it_says_so(gpu, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = gpu.run_all([], False, lambda rows: None)
    assert {r.status for r in rows} == {"skipped"} and "--tiny" in rows[0].note

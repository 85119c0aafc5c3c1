"Helpers that speed things up, and caches: without them the work is done all the same, and that is said once."
import errno
import os
import sys

import numpy as np
import pytest

from histokit.core import compute, text
from histokit.core.compute import can_compile, compile_chain
from histokit.core.files import cache_dir
from histokit.spots.patches import PatchSampler
from histokit.spots.sampling import compiled_patch
from histokit.tissue.normalise import pick_stain_engine
from histokit.tissue.repaint import compiled_repaint


def doubled(x): return 2 * x
def summed(values): return doubled(values.sum())


@pytest.fixture
def told(monkeypatch, capsys):
    "What is said from here on."
    monkeypatch.setattr(text, "_SAID", set())
    return lambda: capsys.readouterr().err.splitlines()


def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def cut_off(*args): raise EOFError("Ran out of input")
def no_locator(*args): raise RuntimeError("cannot cache function: no locator available")


@pytest.mark.parametrize("what,how", [("save", full), ("load", cut_off), ("enable", no_locator)])
def test_numba_without_a_cache_compiles_anew(what, how, told, monkeypatch):
    pytest.importorskip("numba")
    from numba.core import caching, dispatcher
    monkeypatch.setattr(caching.IndexDataCacheFile, "load", lambda *args: None)      # what an earlier test left
    owner = dispatcher.Dispatcher if what == "enable" else caching.IndexDataCacheFile
    monkeypatch.setattr(owner, "enable_caching" if what == "enable" else what, how)
    assert compile_chain(doubled, summed)(np.arange(4.)) == 12
    lines = told()
    assert len(lines) == 1 and "set NUMBA_CACHE_DIR to a folder that can be written to" in lines[0]


BROKEN = [("raise ImportError('Numba needs NumPy 2.3 or less')", "needs NumPy 2.3 or less"),
    ("raise OSError('libLLVM.so: cannot open')", "libLLVM.so"),
    ("class config: DISABLE_JIT = 1", "NUMBA_DISABLE_JIT")]


@pytest.mark.parametrize("code,said", BROKEN)
def test_a_numba_that_does_not_work_is_done_without(code, said, told, monkeypatch, tmp_path):
    (tmp_path/"numba.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    assert pick_stain_engine("auto", "macenko") == "torch"
    slide = {"a": np.full((40, 40, 3), 200, np.uint8)}
    assert PatchSampler(slide, 10).engine == "numpy" and not can_compile()
    lines = told()
    assert len(lines) == 1 and said in lines[0] and "going on with a slower engine" in lines[0]
    monkeypatch.delitem(sys.modules, "numba", raising=False)


def test_asked_for_by_name_a_missing_numba_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    for compiled in (compiled_patch, compiled_repaint):
        compiled.cache_clear()
        with pytest.raises(text.BadInput, match="numba is not installed; install the extra 'fast'"): compiled()
    assert compute._numba_fault() == "is not installed"


@pytest.mark.parametrize("environment", [dict(HISTOKIT_CACHE="/proc/none"), dict(XDG_CACHE_HOME="/proc/none"),
    dict(HOME="/proc/none")])
def test_without_a_place_for_the_cache_a_temporary_one_is_taken(environment, told, monkeypatch):
    for name in ("HISTOKIT_CACHE", "XDG_CACHE_HOME"): monkeypatch.setenv(name, "")
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    folder = cache_dir()
    assert folder.is_dir() and cache_dir() == folder and "/proc" not in str(folder)
    lines = told()
    assert len(lines) == 1 and "set HISTOKIT_CACHE to a folder that can be written to" in lines[0]

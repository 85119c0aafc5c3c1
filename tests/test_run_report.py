"The report of a run: what is in it, and how it looks on a desk, on a phone and in the dark."
import html
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from histokit.core.text import BadInput
from histokit.learn.scores import row_ranks, spearman_rows
from histokit.spots.run_figures import describe_spot, read_answered, worst_rows
from histokit.spots.run_report import write_run_report

HEADINGS = ["How good", "Which cell types", "Where on the tissue", "How sure", "The worst spots", "Together and apart",
    "How it was trained", "What was done to the slides", "What the checks found", "What was asked"]


@pytest.fixture(scope="module")
def report(finished_run): return finished_run/"report.html"


@pytest.fixture(scope="module")
def text(report): return report.read_text(encoding="utf-8")


def words(text):
    "What can be read on the page."
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"src='[^']*'", "", text))))


def test_every_run_leaves_one_file_that_needs_no_other(report, text):
    assert report.stat().st_size < 15e6
    assert re.findall("<h2>(.*?)</h2>", text) == HEADINGS
    sources = re.findall(r"(?:src|href)=['\"]([^'\"]{0,12})", text)
    assert len(sources) >= 15 and all(s.startswith("data:image/") for s in sources)
    assert "http" not in re.sub(r"base64,[^']*", "", text) and "/tmp/" not in words(text).split("What was asked")[0]


def test_what_it_says_is_what_was_measured(finished_run, text):
    said, metrics = words(text), json.loads((finished_run/"metrics.json").read_text())
    last, hidden = metrics["oof"][-1], metrics["test"][-1]
    for row in (last, hidden): assert f"{row['per_spot']:.3f} ({row['low']:.3f} to {row['high']:.3f})" in said
    for row in metrics["oof"]: assert row["name"] in said
    spots = pd.read_parquet(finished_run/"spots.parquet")
    assert f"{spots.split.eq('Train').sum()} spots of" in said and f"{spots.split.eq('Test').sum()} spots of" in said
    assert "nothing is known of how sure it is" in said                # one view of one fold saw each held-out spot
    for name in ("epochs", "stain_method", "macenko", "torch", "histokit", "00_data"): assert name in said
    for slide in spots.slide.unique(): assert slide in said
    assert "Grad-CAM" in said


def test_the_worst_spots_are_the_worst(finished_run, text):
    answered = read_answered(finished_run)
    scores = spearman_rows(answered.held_out, answered.true)
    rows = worst_rows(answered, 8)
    assert scores[rows[0]] == scores.min() and (np.diff(scores[rows]) >= 0).all()
    for row, spot in zip(rows, answered.train.iloc[rows].itertuples()):
        assert f"{spot.slide}, spot {spot.ID}: {scores[row]:.2f}" in words(text)
    off = row_ranks(answered.held_out) - row_ranks(answered.true)
    worst = answered.types[abs(off[rows[0]]).argmax()]
    assert f"rank off by {worst} " in describe_spot(answered, rows[0])


@pytest.mark.parametrize("spoil, says", [
    (lambda run: (run/"uncertainty.parquet").unlink(), "uncertainty.parquet"),
    (lambda run: (run/"oof_final.parquet").write_bytes(b"PAR1"), "is not readable"),
    (lambda run: (run/"submission.csv").write_text("ID,C1\n0,1\n"), "submission.csv"),
    (lambda run: (run/"metrics.json").unlink(), "metrics.json"),
    (lambda run: (run/"slides.h5").unlink(), "data_path")])
def test_a_run_that_lacks_something_says_so(finished_run, tmp_path, spoil, says):
    keep = shutil.ignore_patterns("*.ipynb", "last.pt", "demo", "report.html")
    run = shutil.copytree(finished_run, tmp_path/"run", ignore=keep)
    spoil(run)
    with pytest.raises(BadInput, match=says): write_run_report(run)
    assert not (run/"report.html").exists()


def opened(browser, path, width, scheme="light"):
    "The page in a window of this width, and what its console said."
    tab = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
    said = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda problem: said.append(str(problem)))
    tab.on("requestfailed", lambda request: said.append(request.url[:80]))
    tab.goto(path.as_uri())
    return tab, said


@pytest.mark.parametrize("width, scheme", [(390, "light"), (390, "dark"), (1200, "light"), (1200, "dark")])
def test_it_can_be_read_on_every_screen(browser, report, width, scheme):
    tab, said = opened(browser, report, width, scheme)
    assert said == []
    missing = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
    assert tab.evaluate(missing) == 0 and tab.evaluate("document.images.length") >= 15
    assert tab.evaluate("[...document.images].every(i => i.alt)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    for folded in tab.locator("details:not(.zoom) > summary").all(): folded.click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()

"""The case study: each mistake, alone in a sound pipeline, is named in its part; the page as saved holds the walk."""
import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

PAGE = Path(__file__).resolve().parent.parent/"nbs"/"case_study.ipynb"
# name of the mistake -> where it is, the broken value's name on the page, what the check says, part
MISTAKES = {
    "raw amounts": ("target", "'raw'", "of the squared error", "target"),
    "scaled twice": ("scale", "twice", "all is black", "patches"),
    "from the corner": ("cut", "from_corner", "they fit +0.5 patches in x and +0.5 in y", "patches"),
    "x and y swapped": ("place", "swapped", "they fit with x and y swapped", "patches"),
    "norms awake": ("network", "all_awake", "frozen batch-norms are in training mode", "network"),
    "layers forgotten": ("trained", "forgotten", "trainable parameters are not in the optimizer", "network"),
    "not inverted": ("answer", "as_learnt", "z-scores", "file"),
    "header lost": ("rows", "header_lost", "neighbouring spots have nothing to do with each other", "file"),
    "spots at random": ("split", "by_chance", "are split at random", "split"),
}


def code_cells(): return [c for c in json.loads(PAGE.read_text())["cells"] if c["cell_type"] == "code"]


def sound_pipeline(page):
    "The page's pipeline with every mistake mended."
    cut_patch, slides, side = page["cut_patch"], page["slides"], page["SIDE"]
    return page["Pipeline"](target="log", scale=lambda patches: patches,
        cut=lambda name, x, y: cut_patch(slides, name, x, y, side), place=lambda spots: spots[["x", "y"]],
        trained=lambda model: [w for w in model.parameters() if w.requires_grad], network=page["resnet18"],
        answer=lambda said, scale: scale.inverse(said), rows=lambda amounts: amounts,
        split=lambda spots: spots.slide.astype("category").cat.codes.to_numpy())


@pytest.fixture(scope="module")
def page():
    "What the page defines before it trains; its network is replaced by one that knows the truth but for noise."
    made = {"__name__": "case_study"}
    for cell in code_cells():
        source = "".join(cell["source"])
        if source.startswith("walk, p ="): break
        exec(compile(source, str(PAGE), "exec"), made)
    scales = {kind: made["TargetTransform"](kind, standardise=True).fit(made["known"]) for kind in ("log", "raw")}
    def learnt(p):
        scale, noise = scales[p.target], np.random.default_rng(0).normal(0, .3, made["hidden"].shape)
        return scale, None, [scale.transform(made["hidden"]) + noise]
    made["learnt"] = learnt
    return made


def test_a_sound_pipeline_is_quiet(page):
    assert not any(page["faults"](sound_pipeline(page)).values())


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_alone_is_named_in_its_part(page, name):
    where, broken, says, part = MISTAKES[name]
    found = page["faults"](replace(sound_pipeline(page), **{where: eval(broken, page)}))
    assert any(says in f.what for f in found[part]), found[part]
    if part != "target": assert [p for p, some in found.items() if some] == [part]


def test_the_page_mends_each_of_them_and_the_score_rises():
    "What is saved is what the page computes: nbdev_test executes it, with its own assertions."
    cells = code_cells()
    steps = [c for c in cells if "\np = step(" in "\n" + "".join(c["source"])]
    shown = ["".join(o["text"]) for c in steps for o in c["outputs"] if o["output_type"] == "stream"]
    assert len(steps) == len(shown) == len(MISTAKES)
    mends = [k.arg for c in steps for k in ast.parse("".join(c["source"])).body[-1].value.keywords]
    assert {*mends} - {"before"} == {where for where, *_ in MISTAKES.values()}
    numbers = [dict(re.findall(r"(claimed|score|network) (-?[\d.]+)", text)) for text in shown]
    final = {k: float(v) for k, v in numbers[-1].items()}
    told = next(o["data"]["text/plain"] for c in cells for o in c["outputs"] if o["output_type"] == "execute_result"
        and "the best constant scores" in "".join(o["data"]["text/plain"]))
    first, last, constant = map(float, re.findall(r"-?\d\.\d{3}", "".join(told)))
    assert first < constant < last == final["score"]
    for text in shown: assert re.match(r"(error|warning) ", text) and "mended: " in text

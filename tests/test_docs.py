"What a visitor reads: links that lead somewhere, a reference that has every name, a site that builds."
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [*ROOT.glob("*.md"), *(ROOT/"nbs").rglob("*.md"), *(ROOT/"docs"/"tutorials").glob("*.md")]


@pytest.fixture(scope="module")
def docs():
    "tools/docs.py as a module."
    spec = importlib.util.spec_from_file_location("build_docs", ROOT/"tools"/"docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def links(text):
    "Targets of links and pictures, code left out."
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text))


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in links(path.read_text(encoding="utf-8")):
        if re.match(r"https?:|mailto:|#", target): continue
        target = target.partition("#")[0]
        home = ROOT if target.startswith("/") else path.parent
        made = target in ("/index.md",)                                  # the site's front page is the README
        assert made or (home/target.lstrip("/")).exists(), target


def test_the_reference_has_every_public_function_with_its_comments(docs):
    page = ROOT/"nbs"/"learn"/"scores.ipynb"
    name, text = docs.reference_page("learn", page)
    module = importlib.import_module(name)
    for public in module.__all__: assert f"## {public}\n" in text, public
    defined = docs.definitions(module)
    assert "# (n, T)" in defined["mean_spearman"] and "def mean_spearman(" in defined["mean_spearman"]
    assert "return" not in defined["mean_spearman"].partition("```python")[2]     # the head, not the body


def test_every_page_has_its_module_or_none(docs):
    there = {docs.module_of(p) for wing in docs.WINGS for p in docs.notebooks(wing)} - {""}
    files = {p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in (ROOT/"histokit").rglob("*.py")
        if not p.name.startswith("_") and "_assets" not in p.parts}
    assert there == files


def test_anchors_and_directives(docs, tmp_path):
    assert docs.lower_anchors("see [it](learn/networks.ipynb#Saved-with-all-it-needs), [x](#The-stage)") == \
        "see [it](learn/networks.ipynb#saved-with-all-it-needs), [x](#the-stage)"
    assert docs.without_anchors("[The data](#The-data) and [b](c.ipynb)") == "The data and [b](c.ipynb)"
    assert docs.DIRECTIVE.sub("", "#| export\nx = 1") == "x = 1"
    assert docs.fixed_links("[a](bench/x.py) [b](nbs/y.ipynb)") == "a [b](nbs/y.ipynb)"


def test_the_site_has_every_notebook_that_the_readme_links_to(docs, tmp_path):
    there = {p for wing in docs.WINGS for p in docs.notebooks(wing)} | set(docs.executed_kernels())
    linked = {t.partition("#")[0] for t in links((ROOT/"README.md").read_text(encoding="utf-8"))}
    linked = {ROOT/t for t in linked if t.endswith(".ipynb")}
    assert linked <= there and set(docs.executed_kernels()) <= linked
    for page in docs.executed_kernels():
        docs.copy_notebook(page, tmp_path/page.name)
        nbformat.validate(nbformat.read(tmp_path/page.name, 4))
    assert docs.written("%%writefile {code}/params/x.yaml\na: 1") == "`params/x.yaml`\n\n````yaml\na: 1\n````"


def test_the_workflow_runs_what_the_script_knows():
    jobs = yaml.safe_load((ROOT/".github"/"workflows"/"test.yml").read_text())["jobs"]
    known = re.search(r"^names=\((.*)\)$", (ROOT/"tools"/"matrix.sh").read_text(), re.M)[1].split()
    assert jobs["matrix"]["strategy"]["matrix"]["run"] == known
    for name in known: assert re.search(rf"(?m)^    {name}\)", (ROOT/"tools"/"matrix.sh").read_text()), name
    said = subprocess.run([ROOT/"tools"/"matrix.sh", "no-such"], capture_output=True, text=True)
    assert said.returncode == 2 and "no run 'no-such'" in said.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link(tmp_path):
    made = subprocess.run([sys.executable, ROOT/"tools"/"docs.py", "--out", tmp_path], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    assert (tmp_path/"site"/"reference"/"histokit.learn.scores.html").is_file()

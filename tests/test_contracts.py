"""Promises between the parts of the project that no single notebook can check."""
import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from histokit.pipeline import STAGES, assets, find_recipe, pipeline_parameters, read_recipe, resolve, stage_parameters

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/"nbs").glob("*.ipynb"))
RECIPES = sorted((ROOT/"params").glob("*.yaml"))


def cells(notebook): return json.loads(Path(notebook).read_text())["cells"]


def test_nbdev_table_equals_settings_ini():
    "nbdev 3 reads only pyproject.toml; it must export the same bytes."
    ini = configparser.ConfigParser(); ini.read(ROOT/"settings.ini")
    table = tomllib.loads((ROOT/"pyproject.toml").read_text())["tool"]["nbdev"]
    assert {k: str(v) for k, v in table.items()} == {k: {"True": "True", "False": "False"}.get(v, v) for k, v in ini["DEFAULT"].items()}


def test_version_is_one():
    import histokit
    ini = configparser.ConfigParser(); ini.read(ROOT/"settings.ini")
    assert histokit.__version__ == ini["DEFAULT"]["version"]


@pytest.mark.parametrize("stage", STAGES)
def test_parameters_cell_is_what_papermill_sees(stage):
    import papermill
    notebook = assets("nbs")/f"{stage}.ipynb"
    mine = stage_parameters(notebook)
    seen = papermill.inspect_notebook(str(notebook))
    assert set(mine) == set(seen) and mine
    assert {n: p[0] for n, p in mine.items()} == {n: p["inferred_type_name"] for n, p in seen.items()}
    source = next("".join(c["source"]) for c in cells(notebook) if "parameters" in c["metadata"].get("tags", []))
    assert len(mine) == len(source.strip().splitlines()), "every line of a parameters cell is a typed literal with a comment"
    for name, (*_, about) in mine.items(): assert about, name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_light_and_portable(notebook):
    text = notebook.read_text()
    assert len(text) < 1_000_000
    assert json.loads(text)["metadata"]["kernelspec"]["language"] == "python"
    assert "eval: false" not in text and "!pip" not in text and "%pip" not in text
    assert not re.search(r"/(home|root|Users|work|tmp/runs)/\w", "".join("".join(c["source"]) for c in cells(notebook)))
    assert not any(o["output_type"] == "error" for c in cells(notebook) for o in c.get("outputs", []))


def test_notebooks_are_shown_with_their_outputs():
    for notebook in NOTEBOOKS:
        code = [c for c in cells(notebook) if c["cell_type"] == "code"]
        assert sum(bool(c["outputs"]) for c in code) >= len(code) / 8, f"{notebook.name} was saved without outputs: run `make notebooks`"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_resolve(recipe):
    params = resolve(read_recipe(recipe))
    assert set(params) == set(pipeline_parameters()) and find_recipe(recipe.stem).resolve() == recipe


def test_defaults_are_of_their_declared_types():
    "Also those that YAML would read as text, such as 3e-3."
    kinds = dict(int=int, float=float, str=str, bool=bool)
    assert not {n: d for n, (kind, d, *_) in pipeline_parameters().items() if type(d) is not kinds[kind]}


def test_package_imports_light():
    "What only notebooks, papermill or Kaggle need is not imported with the package."
    code = "import sys, histokit.pipeline, histokit.kaggle, histokit.data, histokit.train, histokit.stain, histokit.demo, histokit.debug_checks, histokit.tta_smoothing\n" \
           "print([m for m in ('nbdev', 'fastcore', 'papermill', 'kaggle', 'staintools', 'torchsort', 'matplotlib.pyplot') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_dependencies_point_one_way():
    below = dict(core=set(), data={"core"}, pictures={"core"}, stain={"core", "pictures"}, model={"core"}, losses={"core", "model"}, metrics={"core"}, train={"core", "model"}, demo={"core"},
                 register={"core", "data"}, patches={"core", "data", "stain"}, own_slides={"core", "data", "demo", "pictures", "stain"},
                 features={"core", "losses", "model", "patches", "train"}, context={"core", "features", "losses", "model", "train"}, kriging={"context", "core", "features", "metrics"},
                 tta_smoothing={"context", "core", "data", "metrics", "train"}, debug_checks={"core", "data", "losses", "metrics", "model", "stain", "train", "tta_smoothing"})
    for name, allowed in below.items():
        tree = ast.parse((ROOT/"histokit"/f"{name}.py").read_text())
        used = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1 and n.module}
        used |= {n.module.split(".")[1] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 0 and (n.module or "").startswith("histokit.")}
        assert used <= allowed, f"{name} imports {used - allowed}"


def test_committed_text_names_no_place():
    "No path of a machine and no registry host in what is committed."
    bad = re.compile(r"/(?:work|farm|root)/[\w./-]+|https?://[\w.-]*(?:pypi|npmjs|debian)[\w.-]*")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True).stdout.split()
    for name in listed or [str(p.relative_to(ROOT)) for p in NOTEBOOKS]:
        path = ROOT/name
        if path.suffix in {".py", ".ipynb", ".md", ".toml", ".ini", ".yaml", ".json", ".sh", ".txt", ""} and path.is_file() and path != Path(__file__):
            assert not bad.search(path.read_text(errors="ignore")), name


def assigned(tree):
    "Names that a cell binds at its top level."
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, (ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp)): continue
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id
        else: yield from assigned(node)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_overwrites_a_parameter(path):
    "A story that reuses a parameter's name would silently set it for the stage below."
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    given = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = set(assigned(ast.parse("".join(given[0]["source"])))) if given else set()
    for cell in cells:
        source = "".join(line for line in cell["source"] if not line.lstrip().startswith("%"))
        if cell not in given: assert not (set(assigned(ast.parse(source))) & names - {"data_path"}), source

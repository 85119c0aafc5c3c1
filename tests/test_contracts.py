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

from histokit.core.notebooks import names_used, stage_cells, stage_parameters
from histokit.core.runs import assets
from histokit.pipeline import STAGES, TASKS, check_values, find_recipe, read_recipe, recipe_task, resolve
from histokit.pipeline import task_parameters

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT/"histokit"
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if "checkpoint" not in str(p))
RECIPES = sorted((ROOT/"params").glob("*.yaml"))
# Each may import from those before it.
WINGS = ("core", "learn", "frozen", "pictures", "tissue", "spots", "retrieval", "reports", "review")
MODULES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))
           if p.name not in ("__init__.py", "_modidx.py") and "_assets" not in p.parts}
page = lambda path: path.relative_to(ROOT/"nbs").with_suffix("").as_posix()


def cells(notebook): return json.loads(Path(notebook).read_text())["cells"]


def test_nbdev_table_equals_settings_ini():
    "nbdev 3 reads only pyproject.toml; it must export the same bytes."
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
    table = tomllib.loads((ROOT/"pyproject.toml").read_text())["tool"]["nbdev"]
    assert {k: str(v) for k, v in table.items()} == {k: {"True": "True", "False": "False"}.get(v, v) for k,
        v in ini["DEFAULT"].items()}


def test_version_is_one():
    import histokit
    ini = configparser.ConfigParser()
    ini.read(ROOT/"settings.ini")
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
    assert len(mine) == len(source.strip().splitlines()), "each line of a parameters cell is a literal with a comment"
    for name, (*_, about) in mine.items(): assert about, name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=page)
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
        assert sum(bool(c["outputs"]) for c in code) >= len(code) / 8, f"{notebook.name}: run `make notebooks`"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_resolve(recipe):
    given = read_recipe(recipe)
    ask = resolve(given)
    assert set(ask) == set(recipe_task(given).names()) and find_recipe(recipe.stem).resolve() == recipe
    assert given["task"] in TASKS, "a recipe names its task"


def test_recipes_that_need_no_hub_hold_values_that_can_be_used():
    for recipe in RECIPES:
        given = read_recipe(recipe)
        check_values(recipe_task(given), resolve(given))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
def test_settings_hold_the_defaults_of_the_parameters_cells(task):
    "A stage's dataclass and its parameters cell say the same."
    import importlib
    from dataclasses import fields
    known = task_parameters(task)
    for stage in task.stages:
        if not stage.settings: continue
        module, _, name = stage.settings.partition(":")
        mine = {f.name: f.default for f in fields(getattr(importlib.import_module(module), name))}
        cell = {n: p.default for n, p in known[stage.name].items()}
        assert mine == {n: cell[n] for n in mine}, stage.name


def test_defaults_are_of_their_declared_types():
    "Also those that YAML would read as text, such as 3e-3."
    kinds = dict(int=int, float=float, str=str, bool=bool)
    for task in TASKS.values():
        for stage, params in task_parameters(task).items():
            assert not {n: p.default for n, p in params.items() if type(p.default) is not kinds[p.kind]}, stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_needs_nothing_of_the_story(stage):
    "A run executes imports, parameters and the stage; a name that only the story makes would be missing."
    import builtins
    code = [c for c in stage_cells(cells(assets("nbs")/f"{stage}.ipynb")) if c["cell_type"] == "code"]
    trees = [ast.parse("".join(c["source"])) for c in code]
    bound = set(dir(builtins)) | {"get_ipython", "__name__"}
    for tree in trees:
        for n in ast.walk(tree):
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): bound.add(n.id)
            if isinstance(n, ast.arg): bound.add(n.arg)
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)): bound.add(n.name)
            if isinstance(n, (ast.Import, ast.ImportFrom)): bound |= {(a.asname or a.name).split(".")[0]
                for a in n.names}
    used = set().union(*(names_used("".join(c["source"])) for c in code))
    assert used <= bound, sorted(used - bound)


def imported_at_the_top(text):
    "The first names of what a source imports outside functions, classes and `try`."
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import): found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"histokit"}


EVERY_STAGE = sorted({stage for task in TASKS.values() for stage in task.names()})


@pytest.mark.parametrize("stage", EVERY_STAGE)
def test_a_stage_imports_only_what_the_package_declares(stage):
    "Whoever installs the package alone, without what developers use, can execute every stage as it is."
    declared = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.match(r"[\w-]+", line)[0].lower() for line in declared}
    names |= {"matplotlib_inline", "ipython"} if "ipykernel" in names else set()       # it declares these two
    modules = dict(yaml="pyyaml", PIL="pillow", sklearn="scikit-learn", IPython="ipython")
    code = "\n".join("".join(c["source"]) for c in cells(assets("nbs")/f"{stage}.ipynb") if c["cell_type"] == "code")
    unknown = {m for m in imported_at_the_top(code) if modules.get(m, m).lower() not in names}
    assert not unknown, f"{stage} imports {unknown}, which nothing declares"


def test_package_imports_light():
    "What only notebooks, papermill or Kaggle need is not imported with the package."
    unwanted = ("nbdev", "fastcore", "papermill", "kaggle", "staintools", "torchsort", "matplotlib.pyplot", "fastapi",
        "transformers")
    modules = ", ".join(f"histokit.{m}" for m in MODULES)
    code = f"import sys, {modules}\nprint([m for m in {unwanted} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
        check=True).stdout.strip() == "[]"


def imported(module):
    "The modules of the package that a module imports, at its top or inside a function, in whatever form."
    for n in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(n, ast.Import): names = [a.name.removeprefix("histokit.") for a in n.names
            if a.name.startswith("histokit.")]
        elif isinstance(n, ast.ImportFrom):
            base = n.module or ""
            if n.level: base = ".".join([*module.split(".")[:-n.level], *([base] if base else [])])
            elif base.split(".")[0] == "histokit": base = base[len("histokit."):]
            else: continue
            names = [base, *(f"{base}.{a.name}".strip(".") for a in n.names)]
        else: continue
        yield from (m for m in names if m in MODULES and m != module)


def wing(module): return WINGS.index(module.split(".")[0]) if "." in module else len(WINGS)


def test_wings_import_from_wings_below():
    "The order of the wings is the order of the drawing; the top level stands above all of them."
    up = [(m, t) for m in MODULES for t in imported(m) if wing(t) > wing(m)]
    assert not up


def test_no_circle_of_imports():
    edges, done = {m: set(imported(m)) for m in MODULES}, set()
    def walk(m, path):
        assert m not in path, " -> ".join([*path[path.index(m):], m])
        if m in done: return
        for t in sorted(edges[m]): walk(t, [*path, m])
        done.add(m)
    for m in MODULES: walk(m, [])


def test_every_wing_is_known():
    assert {p.name for p in PACKAGE.iterdir() if (p/"__init__.py").exists()} <= set(WINGS)


def exports(module):
    "What a module makes and says that it exports."
    tree, names, mine = ast.parse(MODULES[module].read_text()), set(), set()
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): mine.add(n.name)
        if isinstance(n, ast.Assign):
            targets = {t.id for x in n.targets for t in ast.walk(x) if isinstance(t, ast.Name)}
            if "__all__" in targets: names = set(ast.literal_eval(n.value))
            mine |= targets
    return names & mine


# What the pipeline asks of each task's module.
TASK_NAMES = {"prepare", "report", "check_settings", "find_data", "open_data", "check_answer", "needs"}


def test_no_exported_name_means_two_things():
    seen = {}
    for m in MODULES:
        own = TASK_NAMES if m in {t.module.removeprefix("histokit.") for t in TASKS.values()} else set()
        for name in set(exports(m)) - own: seen.setdefault(name, []).append(m)
    assert {n: m for n, m in seen.items() if len(m) > 1} == {}


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_lines_hold_one_idea(module):
    import io
    import tokenize
    text, count = MODULES[module].read_text(), {}
    skip = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT)
    for t in tokenize.generate_tokens(io.StringIO(text).readline):
        if t.type not in skip: count[t.start[0]] = count.get(t.start[0], 0) + 1
    assert len(text.splitlines()) < 650
    assert sum(n > 40 for n in count.values()) <= max(1, .01 * len(count)), [i for i, n in count.items() if n > 40]
    long = [n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)
        and n.end_lineno - n.lineno >= 40]
    assert not long, long


def test_formulas_have_single_backslashes():
    "A doubled backslash before a TeX command shows as a line break on the page."
    for path in NOTEBOOKS:
        for c in cells(path):
            text = "".join(c["source"])
            if c["cell_type"] == "markdown": assert not re.search(r"\$[^$]*\\\\[a-zA-Z]", text), (page(path), text[:80])


def test_outputs_hold_no_terminal_colours():
    for path in NOTEBOOKS: assert "\\u001b[" not in path.read_text(), page(path)


def test_pages_begin_with_a_title_and_a_plain_line():
    for path in NOTEBOOKS:
        first = next("".join(c["source"]) for c in cells(path) if c["cell_type"] == "markdown")
        assert re.match(r"# \S.*\n\n> \S", first) and "SUBTITLE" not in first, page(path)


def test_links_between_pages_lead_somewhere():
    for path in NOTEBOOKS:
        for c in cells(path):
            if c["cell_type"] != "markdown": continue
            for target in re.findall(r"\]\(([\w./]+\.ipynb)\)", "".join(c["source"])):
                home = ROOT if page(path) == "index" else path.parent
                assert (home/target).resolve().is_file(), (page(path), target)


def test_committed_text_names_no_place():
    "No path of a machine and no registry host in what is committed."
    bad = re.compile(r"/(?:work|farm|root)/[\w./-]+|https?://[\w.-]*(?:pypi|npmjs|debian)[\w.-]*")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True).stdout.split()
    for name in listed or [str(p.relative_to(ROOT)) for p in NOTEBOOKS]:
        path = ROOT/name
        if path.suffix in {".py", ".ipynb", ".md", ".toml", ".ini", ".yaml", ".json", ".sh", ".txt",
            ""} and path.is_file() and path != Path(__file__):
            assert not bad.search(path.read_text(errors="ignore")), name


def assigned(tree):
    "Names that a cell binds at its top level."
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, (ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp)): continue
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id
        else: yield from assigned(node)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page)
def test_no_cell_overwrites_a_parameter(path):
    "A story that reuses a parameter's name would silently set it for the stage below."
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    given = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = set(assigned(ast.parse("".join(given[0]["source"])))) if given else set()
    for cell in cells:
        source = "".join(line for line in cell["source"] if not line.lstrip().startswith("%"))
        if cell not in given: assert not (set(assigned(ast.parse(source))) & names - {"data_path"}), source

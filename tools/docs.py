"""The documentation site: README, tutorials, every page as it is saved, the reference, a gallery; built by Sphinx.

    python tools/docs.py [--out _docs]

Nothing is executed and nothing is fetched. A link that leads nowhere stops it.
"""
import argparse
import ast
import base64
import importlib
import inspect
import json
import re
import shutil
import sys
import textwrap
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WINGS = {"": "What runs", "review": "The review app", "reports": "Drafted reports", "retrieval": "Similar cases",
    "spots": "Cell types at spots", "tissue": "Stains", "pictures": "Classes of pictures",
    "frozen": "Encoders run once", "learn": "What learning needs", "core": "What everything uses"}


def notebooks(wing):
    "The pages of a wing."
    return [p for p in sorted((ROOT/"nbs"/wing).glob("*.ipynb")) if p.stem != "index"]


def title_of(page):
    "The title and the line below it."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    text = next("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    title, about = re.match(r"# (.*)\n\n> (.*)", text).groups()
    return title, about


def toctree(entries, caption="", hidden=False):
    "A table of contents in MyST."
    options = [f":caption: {caption}"] if caption else []
    if hidden: options.append(":hidden:")
    return "\n".join(["```{toctree}", *options, ":maxdepth: 1", "", *entries, "```", ""])


# Directives of nbdev say what is exported; a reader of the page need not see them.
DIRECTIVE = re.compile(r"^#\| ?[\w_]+.*\n?", re.M)


def lower_anchors(text):
    "Links to a heading as Sphinx names it; Jupyter keeps capitals, and both put dashes for spaces."
    slug = lambda m: f"]({m[1]}#{re.sub(r'[^a-z0-9_-]', '', m[2].lower())})"
    return re.sub(r"\]\(([\w./]*)#([^)]+)\)", slug, text)


def without_anchors(text):
    "What a cell shows of another notebook: its headings are not on this page."
    return re.sub(r"\[([^\]]*)\]\(#[^)]*\)", r"\1", text)


def written(source):
    "A cell that writes a file, as text in the file's language."
    head, _, text = source.partition("\n")
    name = head.rpartition("{code}/")[2]
    language = dict(py="python", yaml="yaml").get(name.rpartition(".")[2], "text")
    return f"`{name}`\n\n````{language}\n{text}\n````"


def copy_notebook(page, to):
    "A page without directives, its anchors as the site has them."
    nb = json.loads(page.read_text(encoding="utf-8"))
    for c in nb["cells"]:
        source = "".join(c["source"])
        source = DIRECTIVE.sub("", source) if c["cell_type"] == "code" else lower_anchors(source)
        c["source"] = source
        if source.startswith("%%writefile"):
            c.update(cell_type="markdown", source=written(source))
            for key in ("outputs", "execution_count"): del c[key]
        for output in c.get("outputs", []):
            shown = output.get("data", {})
            if "text/markdown" in shown: shown["text/markdown"] = without_anchors("".join(shown["text/markdown"]))
    nb["cells"] = [c for c in nb["cells"] if c["source"].strip() or c.get("outputs")]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(nb), encoding="utf-8")


def code(text): return f"```python\n{textwrap.dedent(text).rstrip()}\n```"


def head_of(node, lines):
    "The lines of a definition before its docstring or body: a signature with a comment for each parameter."
    first = node.body[0]
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    if first.lineno == node.lineno: return lines[node.lineno - 1].rpartition(":")[0] + ":"
    return "\n".join(lines[start - 1:first.lineno - 1])


def class_lines(node, lines):
    "A class's head, the fields that it declares with their comments, and the signature of its `__init__`."
    parts = [head_of(node, lines)]
    for item in node.body:
        if isinstance(item, ast.AnnAssign): parts.append("\n".join(lines[item.lineno - 1:item.end_lineno]))
        if getattr(item, "name", "") == "__init__": parts.append(head_of(item, lines))
    return "\n".join(parts)


def definitions(module):
    "Name -> what the reference says of it, for each function and class that a module's source defines."
    source = Path(module.__file__).read_text(encoding="utf-8")
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef): text = head_of(node, lines)
        elif isinstance(node, ast.ClassDef): text = class_lines(node, lines)
        else: continue
        found[node.name] = f"{ast.get_docstring(node) or ''}\n\n{code(text)}"
    return found


def methods(value):
    "The public methods and properties that a class brings itself."
    for name, member in vars(value).items():
        inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(inner) or not inspect.getdoc(inner): continue
        kind = "property" if isinstance(member, property) else f"method, `{name}{inspect.signature(inner)}`"
        yield f"- **{name}** ({kind}): {inspect.getdoc(inner)}".replace("\n", " ")


def module_of(page):
    "The module that a page exports, or '' where it exports none."
    found = re.search(r"#\| ?default_exp ([\w.]+)", page.read_text(encoding="utf-8"))
    there = found and (ROOT/"histokit"/f"{found[1].replace('.', '/')}.py").is_file()
    return f"histokit.{found[1]}" if there else ""


def elsewhere(value, module):
    "A name that a module hands on, or a constant."
    home = getattr(value, "__module__", None)
    if home in (None, module.__name__) or not home.startswith("histokit."): return f"A `{type(value).__name__}`."
    return f"From [{home}]({home}.md)."


def reference_page(wing, page):
    "The public names of a module."
    module = importlib.import_module(module_of(page))
    known = definitions(module)
    parts = [f"# {module.__name__}", title_of(page)[1], f"The page: [{title_of(page)[0]}](/nbs/{wing}/{page.name})"]
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        parts.append(f"## {public}\n\n{known.get(public) or elsewhere(value, module)}")
        if inspect.isclass(value): parts.append("\n".join(methods(value)))
    return module.__name__, "\n\n".join(parts).replace("//", "/") + "\n"


def write_reference(out):
    "A page for each module that exports something."
    made = {}
    for wing in WINGS:
        for page in notebooks(wing):
            if not module_of(page): continue
            name, text = reference_page(wing, page)
            (out/"reference").mkdir(parents=True, exist_ok=True)
            (out/"reference"/f"{name}.md").write_text(text, encoding="utf-8")
            made.setdefault(wing, []).append(name)
    parts = ["# Reference", "Every public name, module by module, with its parameters, shapes and errors."]
    parts += [f"## {WINGS[wing]}\n\n{toctree(names)}" for wing, names in made.items()]
    (out/"reference"/"index.md").write_text("\n\n".join(parts), encoding="utf-8")


def pictures_of(page):
    "The pictures that a page's cells have drawn, as bytes."
    for c in json.loads(page.read_text(encoding="utf-8"))["cells"]:
        for output in c.get("outputs", []):
            if png := output.get("data", {}).get("image/png"): yield base64.b64decode("".join(png))


def write_gallery(out):
    "The first picture of every page that has one, with the line below its title."
    parts, folder = ["# Gallery", "A picture of each page that draws one; it leads to the page."], out/"gallery"
    folder.mkdir(parents=True, exist_ok=True)
    for wing, name in WINGS.items():
        rows = []
        for page in notebooks(wing):
            data = next(pictures_of(page), None)
            if data is None: continue
            file = f"{wing or 'top'}-{page.stem}.png"
            (folder/file).write_bytes(data)
            title, about = title_of(page)
            link = f"/nbs/{wing}/{page.name}".replace("//", "/")
            rows.append(f"### {title}\n\n[![{title}](gallery/{file})]({link})\n\n{about}")
        if rows: parts += [f"## {name}", *rows]
    (out/"gallery.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_encoders(out):
    "Which encoder: the table of those that go by name, from the table that builds them."
    from histokit.learn.encoders import ENCODERS, PACKAGES
    text = (ROOT/"docs"/"tutorials"/"encoders.md").read_text(encoding="utf-8")
    head = ["| name | where from | dimension | trained at | licence | gated |", "|---|---|---|---|---|---|"]
    rows = [f"| `{n}` | package `{p['package']}` | {width(n)} | {p['input_px']} px photographs | {p['licence']} | no |"
        for n, p in PACKAGES.items()]
    rows += [f"| `{n}` | `{e['hub']}` | {e['width']} | {e['patch_px']} px at {e['um_per_px']} µm/px | {e['licence']} | "
        f"{'yes' if e['gated'] else 'no'} |" for n, e in ENCODERS.items()]
    (out/"tutorials"/"encoders.md").write_text(text.replace("{{ENCODERS}}", "\n".join(head + rows)), encoding="utf-8")


def width(name):
    "How many numbers an encoder makes of a picture."
    import timm
    return timm.create_model(name, pretrained=False, num_classes=0).num_features


def fixed_links(text):
    "Links of the README to files that are no pages of the site, as plain text."
    def one(match):
        target = match[2].partition("#")[0]
        keep = re.match(r"https?:|mailto:|#", match[2]) or target.endswith((".ipynb", ".md", ".png", ".jpg"))
        return match[0] if keep else match[1]
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)", one, text)


def executed_kernels():
    "The copies of kernels that were executed on synthetic data."
    return sorted((ROOT/"kaggle_kernels").glob("*/executed.ipynb"))


def gather(out):
    "All sources in one folder."
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(ROOT/"docs"/"conf.py", out)
    shutil.copytree(ROOT/"docs"/"_static", out/"_static")
    shutil.copytree(ROOT/"docs"/"tutorials", out/"tutorials")
    if (ROOT/"README_files").is_dir(): shutil.copytree(ROOT/"README_files", out/"README_files")
    for wing in WINGS:
        for page in notebooks(wing): copy_notebook(page, out/"nbs"/wing/page.name)
    for page in executed_kernels(): copy_notebook(page, out/page.relative_to(ROOT))
    for extra in (ROOT/"nbs").rglob("*.md"): shutil.copy(extra, out/extra.relative_to(ROOT))
    for folder in (ROOT/"nbs").rglob("pictures"):
        if folder.is_dir() and not list(folder.glob("*.ipynb")): shutil.copytree(folder, out/folder.relative_to(ROOT))
    write_encoders(out)
    write_gallery(out)
    write_reference(out)
    write_indexes(out)


def write_indexes(out):
    "The front page and the list of all pages."
    tutorials = [f"tutorials/{p.stem}" for p in sorted((ROOT/"docs"/"tutorials").glob("*.md"))]
    more = [p.relative_to(ROOT).with_suffix("").as_posix() for p in sorted((ROOT/"nbs").rglob("*.md"))]
    kernels = [p.relative_to(ROOT).with_suffix("").as_posix() for p in executed_kernels()]
    trees = [toctree([*tutorials, *more], "Tutorials", True), toctree(kernels, "Kernels, executed", True),
        toctree(["pages", "gallery", "reference/index", "changelog"], "More", True)]
    readme = fixed_links((ROOT/"README.md").read_text(encoding="utf-8"))
    (out/"index.md").write_text(readme + "\n" + "\n".join(trees), encoding="utf-8")
    parts = ["# All pages", "Every page is documentation, library and test at once."]
    parts += [f"## {name}\n\n" + toctree([f"nbs/{wing}/{p.stem}".replace("//", "/") for p in notebooks(wing)])
        for wing, name in WINGS.items() if notebooks(wing)]
    (out/"pages.md").write_text("\n\n".join(parts), encoding="utf-8")
    (out/"changelog.md").write_text((ROOT/"CHANGELOG.md").read_text(encoding="utf-8"), encoding="utf-8")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default=str(ROOT/"_docs"))
    a = p.parse_args()
    warnings.simplefilter("ignore")
    from sphinx.cmd.build import build_main
    source, site = Path(a.out)/"source", Path(a.out)/"site"
    gather(source)
    code = build_main(["-q", "-W", "--keep-going", "-j", "2", "-b", "html", str(source), str(site)])
    if code: sys.exit("docs: the warnings above say which page or link is wrong")
    print(f"{site/'index.html'}: {len(list(site.rglob('*.html')))} pages")


if __name__ == "__main__": main()

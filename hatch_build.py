"""The build of wheel and sdist puts the review page in. A package without it says so, here and when it is used."""
import importlib.util
import shutil
import subprocess
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LINE = "this package was built without the review page; build it with `make web`, then the package again"


class ReviewPage(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version, build_data):
        "Adds web/dist; builds it first where Node is at hand."
        if version == "editable": return
        place = "histokit/_assets/web" if self.target_name == "wheel" else "web/dist"
        if self._page_is_there():
            build_data["force_include"]["web/dist"] = place
            return
        self.app.display_warning(LINE)
        if self.target_name == "wheel": build_data["force_include"][str(self._note())] = f"{place}/MISSING.txt"

    def _page_is_there(self):
        root = Path(self.root)
        current = _sources(root).is_current
        if current(root): return True
        if shutil.which("npm") is None: return False
        done = subprocess.run(["bash", str(root / "tools/web.sh")], capture_output=True, text=True)
        if done.returncode: self.app.display_warning(f"the review page could not be built: {done.stderr.strip()}")
        return current(root)

    def _note(self):
        path = Path(self.directory) / "review-page-missing.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LINE + "\n")
        return path


def _sources(root):
    "tools/web_sources.py as a module."
    spec = importlib.util.spec_from_file_location("web_sources", root / "tools/web_sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

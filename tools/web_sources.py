"""A digest of the page's sources: whether web/dist was built of the sources that lie beside it."""
import hashlib
import sys
from pathlib import Path

BUILT = "web/dist/.sources"      # the digest of the sources of which the built page was made


def sources(root):
    "Every file that the built page depends on, in one order."
    web = Path(root) / "web"
    single = ["package.json", "package-lock.json", "index.html", "tsconfig.json", "vite.config.ts"]
    below = [p for folder in ("src", "public") for p in (web / folder).rglob("*") if p.is_file()]
    return [web / name for name in single] + sorted(below)


def digest(root):
    "One word for the sources' names and bytes."
    total = hashlib.sha256()
    for path in sources(root):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def is_current(root):
    "Whether the built page is there and is that of the sources."
    built = Path(root) / BUILT
    return built.is_file() and (built.parent / "index.html").is_file() and built.read_text().strip() == digest(root)


if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    if sys.argv[1:] == ["current"]: sys.exit(not is_current(here))
    print(digest(here))

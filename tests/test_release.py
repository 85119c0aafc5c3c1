"The release script looks before it does anything: what it refuses, and what it says of it."
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {"settings.ini": "[DEFAULT]\nversion = 1.2.3\n", "histokit/__init__.py": '__version__ = "1.2.3"\n',
    "pyproject.toml": '[tool.nbdev]\nversion = "1.2.3"\n', "CITATION.cff": "version: 1.2.3\n",
    "CHANGELOG.md": "# Changelog\n\n## 1.2.3\n\n- All new.\n"}


def git(repo, *words):
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
    return subprocess.run(["git", *who, *words], cwd=repo, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(tmp_path):
    "A small project that is ready to be released."
    home = tmp_path/"project"
    for name, text in FILES.items():
        (home/name).parent.mkdir(parents=True, exist_ok=True)
        (home/name).write_text(text)
    (home/"tools").mkdir()
    shutil.copy(ROOT/"tools/release.sh", home/"tools")
    git(home.parent, "init", "-q", "-b", "main", home)
    git(home, "add", ".")
    git(home, "commit", "-qm", "ready")
    return home


def release(repo, *words):
    return subprocess.run(["bash", "tools/release.sh", *words], cwd=repo, capture_output=True, text=True)


def test_what_is_ready_is_said_and_nothing_is_done(repo):
    done = release(repo, "1.2.3", "--check")
    assert done.returncode == 0 and done.stdout.startswith("1.2.3 can be released"), done.stderr
    assert git(repo, "tag") == "" and git(repo, "status", "--porcelain") == ""


def change(name, text):
    def put(repo): (repo/name).write_text(text)
    return put


def commit(name, text):
    def put(repo):
        (repo/name).write_text(text)
        git(repo, "commit", "-qam", "changed")
    return put


def upstream_ahead(repo):
    other = repo.parent/"other"
    git(repo.parent, "clone", "-q", repo, other)
    git(other, "commit", "-q", "--allow-empty", "-m", "ahead")
    git(repo, "remote", "add", "origin", other)
    git(repo, "fetch", "-q", "origin")
    git(repo, "branch", "-q", "--set-upstream-to=origin/main")


@pytest.mark.parametrize("spoil, words, said", [
    (lambda repo: None, [], "give a version such as 0.2.0"),
    (lambda repo: None, ["v1.2.3"], "give a version such as 0.2.0"),
    (lambda repo: None, ["1.2.3", "--now"], "'--now' is neither --check nor --upload"),
    (change("CHANGELOG.md", "other"), ["1.2.3"], "these are not committed: CHANGELOG.md"),
    (change("new.txt", "new"), ["1.2.3"], "these are not committed: new.txt"),
    (lambda repo: git(repo, "switch", "-qc", "idea"), ["1.2.3"], "this is branch idea; release from main"),
    (lambda repo: git(repo, "tag", "v1.2.3"), ["1.2.3"], "v1.2.3 is there already"),
    (upstream_ahead, ["1.2.3"], "main and origin/main differ"),
    (commit("settings.ini", "version = 1.2.30\n"), ["1.2.3"], "settings.ini does not say 1.2.3"),
    (commit("histokit/__init__.py", '__version__ = "1.2.2"\n'), ["1.2.3"], "histokit/__init__.py does not say 1.2.3"),
    (commit("pyproject.toml", ""), ["1.2.3"], "pyproject.toml does not say 1.2.3"),
    (commit("CITATION.cff", "version: 1x2x3\n"), ["1.2.3"], "CITATION.cff does not say 1.2.3"),
    (commit("CHANGELOG.md", "## Unreleased\n"), ["1.2.3"], "CHANGELOG.md does not say 1.2.3")])
def test_what_is_not_ready_is_one_line(repo, spoil, words, said):
    spoil(repo)
    tags = git(repo, "tag")
    done = release(repo, *words)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"no release: {said}") and done.stderr.count("\n") == 1, done.stderr
    assert git(repo, "tag") == tags

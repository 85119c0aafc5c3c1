#!/usr/bin/env bash
# A release from what is committed: checks, gates, package in empty environments, tag. tools/release.sh VERSION [--check|--upload]
# --check ends after the checks. --upload sends dist/ with twine, which asks for a token; without it nothing leaves this machine.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
stop() { echo "no release: $*" >&2; exit 1; }

version=${1:-}; how=${2:-}
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || stop "give a version such as 0.2.0: tools/release.sh VERSION [--check|--upload]"
[[ $how =~ ^(|--check|--upload)$ ]] || stop "'$how' is neither --check nor --upload"
[ -z "$(git status --porcelain)" ] || stop "these are not committed: $(git status --porcelain | head -5 | awk '{print $2}' | paste -sd ' '); commit or remove them"
[ "$(git branch --show-current)" = main ] || stop "this is branch $(git branch --show-current); release from main"
! git rev-parse -q --verify "refs/tags/v$version" >/dev/null || stop "v$version is there already; choose the next version"
if git rev-parse -q --verify '@{upstream}' >/dev/null 2>&1; then
  [ "$(git rev-parse HEAD)" = "$(git rev-parse '@{upstream}')" ] || stop "main and $(git rev-parse --abbrev-ref '@{upstream}') differ; pull and push first"
fi
says() { grep -qE "$2" "$1" || stop "$1 does not say $version; write it there ($3)"; }
dotted=${version//./\\.}
says settings.ini "^version *= *$dotted\$" "version = $version"
says histokit/__init__.py "^__version__ = \"$dotted\"" "nbdev_export writes it from settings.ini"
says pyproject.toml "^version = \"$dotted\"" "[tool.nbdev] version"
says CITATION.cff "^version: \"?$dotted\"?\$" "version: $version"
says CHANGELOG.md "^## $dotted" "a heading above what has changed"
echo "$version can be released: $(git rev-parse --short HEAD) is clean, and all files name it"
[ "$how" != --check ] || exit 0

BIN="$BIN" tools/gates.sh
BIN="$BIN" tools/package.sh
git tag -a "v$version" -m "histokit $version"
if [ "$how" = --upload ]; then
  "$BIN/python" -m pip install --quiet twine
  "$BIN/python" -m twine check dist/*
  "$BIN/python" -m twine upload dist/*
fi
echo "v$version is tagged; publish it with: git push origin v$version"

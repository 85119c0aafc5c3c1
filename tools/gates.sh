#!/usr/bin/env bash
# Every gate that a change must pass; pytest comes last, so that its closing line closes the output.
set -euo pipefail
step() { printf '\n== %s\n' "$*"; }
# Whatever the gates write lies in one folder, which goes when they end; PostgreSQL runs as another user, who must get through.
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
mkdir -m 711 "$tmp/tmp"; chmod 711 "$tmp"; export TMPDIR="$tmp/tmp"
free=$(df -Pk "$tmp" | awk 'NR == 2 {print int($4 / 1024)}')
[ "$free" -ge "${LEAST_MB:=6000}" ] || { echo "the gates write up to $LEAST_MB MB into $(dirname "$tmp"), and $free MB are free; free some space, or name another folder: make test TMPDIR=FOLDER" >&2; exit 1; }
content() { find nbs histokit -type f \( -name '*.ipynb' -o -name '*.py' \) -not -path '*checkpoint*' -print0 | sort -z | xargs -0 sha256sum; }

step "nbdev_clean changes nothing"
content > "$tmp/before"; "$BIN/nbdev_clean"; content > "$tmp/after"
diff "$tmp/before" "$tmp/after" >/dev/null || { echo "these notebooks were not clean; commit them as they are now:"; diff "$tmp/before" "$tmp/after" | sed -n 's/^> [0-9a-f]*//p'; exit 1; }

step "nbdev_export changes nothing"
"$BIN/nbdev_export"; content > "$tmp/after"
diff "$tmp/before" "$tmp/after" >/dev/null || { echo "the package was not the notebooks'; commit these as they are now:"; diff "$tmp/before" "$tmp/after" | sed -n 's/^> [0-9a-f]*//p'; exit 1; }

step "README matches index.ipynb"
tools/readme.sh "$tmp"
diff -u README.md "$tmp/README.md" || { echo "run: make readme"; exit 1; }
if [ -d README_files ] || [ -d "$tmp/README_files" ]; then diff -r README_files "$tmp/README_files" || { echo "run: make readme"; exit 1; }; fi

step "ruff"
"$BIN/ruff" check --no-cache histokit nbs tests bench
"$BIN/ruff" check --no-cache --select F821 histokit

step "the demo, by papermill with parameters"
"$BIN/histokit" demo --run-dir "$tmp/demo" -p epochs=2
"$BIN/histokit" validate "$tmp/demo/submission.csv" --data "$tmp/demo/demo/demo.h5"

step "nbdev_test"
HISTOKIT_DEMO_RUN="$tmp/demo" "$BIN/nbdev_test" --n_workers 2 --timing

step "pytest"
tree() { git status --porcelain 2>/dev/null || true; }
before=$(tree)
"$BIN/python" -m pytest -n 2 --dist worksteal ${PYTEST_ARGS:--m "not slow"}
after=$(tree)
[ "$after" = "$before" ] || { echo "the tests left these behind: $(comm -13 <(sort <<<"$before") <(sort <<<"$after"))"; exit 1; }

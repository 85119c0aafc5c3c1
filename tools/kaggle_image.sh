#!/usr/bin/env bash
# The kernels' tests with another Python and the versions of Kaggle's image: tools/kaggle_image.sh PYTHON REQUIREMENTS [pytest's words]
#   tools/kaggle_image.sh python3.12 tests/kaggle_image.txt
#   tools/kaggle_image.sh python3.13 tests/kaggle_next.txt
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
[ $# -ge 2 ] || { echo "usage: tools/kaggle_image.sh PYTHON REQUIREMENTS [pytest's words]" >&2; exit 2; }
python=$1; packages=$2; shift 2
"$python" --version >/dev/null || { echo "$python is not here" >&2; exit 1; }
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT; trap 'exit 130' INT TERM
"$python" -m venv "$tmp/image"
"$tmp/image/bin/python" -m pip install --quiet --disable-pip-version-check -r "$packages"
echo "== kernels on $("$tmp/image/bin/python" --version), versions of $packages"
if [ $# -eq 0 ]; then set -- tests/test_kaggle.py tests/test_kaggle_parts.py -k "runs_as_on_kaggle or run_as_on_kaggle or finds_the or master_runs or fair"; fi
HISTOKIT_KAGGLE_PYTHON="$tmp/image/bin/python" "$BIN/python" -m pytest -n 2 "$@"

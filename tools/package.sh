#!/usr/bin/env bash
# Wheel and sdist of the committed tree, each installed into an empty environment of every Python that is here, where the demo
# and the probe run: tools/package.sh [python3.11 …]. dist/ holds the two files afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=$(cd "${BIN:-.venv/bin}" && pwd)
if [ $# -eq 0 ]; then set -- python3.11 python3.12 python3.13; fi
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT; trap 'exit 130' INT TERM
free=$(df -Pk "$tmp" | awk 'NR == 2 {print int($4 / 1024)}')
[ "$free" -ge "${LEAST_MB:=12000}" ] || { echo "an environment with PyTorch needs up to $LEAST_MB MB in $(dirname "$tmp"), and $free MB are free; free some space, or set TMPDIR" >&2; exit 1; }

echo "== build, from a clone of what is committed"
git clone -q --no-hardlinks . "$tmp/source"
BIN="$BIN" "$tmp/source/tools/web.sh"
"$BIN/python" -m build --outdir "$tmp/dist" "$tmp/source" >"$tmp/build.log" 2>&1 || { tail -20 "$tmp/build.log" >&2; exit 1; }
mkdir -p dist; rm -f dist/histokit-*; cp "$tmp"/dist/* dist/
wheel=$(ls "$tmp"/dist/*.whl); sdist=$(ls "$tmp"/dist/*.tar.gz)

try() {                          # what a stranger would type, in a folder of its own, with the package alone
  local env=$1 what=$2 home=$tmp/home-$2
  mkdir -p "$home"; cd "$home"
  "$env/bin/python" -c 'import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) for m in ("fastcore", "nbdev", "pytest")))' || { echo "the package brings what only developers use" >&2; exit 1; }
  "$env/bin/histokit" demo --run-dir demo -p epochs=1
  "$env/bin/histokit" run probe --run-dir probe -p data_path=demo/demo/demo.h5
  "$env/bin/histokit" validate probe/submission.csv --data demo/demo/demo.h5
  "$env/bin/python" -c 'from histokit.core.runs import assets; assert (assets("nbs")/"03_train.ipynb").is_file()'
  cd "$OLDPWD"; rm -rf "$home"
}

tried=0
for python in "$@"; do
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "== $python is not here, and is left out"; continue; fi
  echo "== $("$python" --version): wheel into an empty environment"
  "$python" -m venv "$tmp/env"
  "$tmp/env/bin/python" -m pip install --quiet --disable-pip-version-check ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
  "$tmp/env/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel[encoders]"
  "$tmp/env/bin/python" -m pip check
  try "$tmp/env" wheel
  echo "== $("$python" --version): sdist in its place"
  "$tmp/env/bin/python" -m pip uninstall --quiet --yes histokit
  "$tmp/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$sdist"
  try "$tmp/env" sdist
  ${AFTER:+bash -c "$AFTER" after "$tmp/env"}
  rm -rf "$tmp/env"; tried=$((tried + 1))
done
[ "$tried" -gt 0 ] || { echo "none of these is here: $*" >&2; exit 1; }
echo "wheel and sdist ran on $tried Python(s); they lie in dist/"

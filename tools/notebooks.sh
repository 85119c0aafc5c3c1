#!/usr/bin/env bash
# Execute every notebook in place, save its outputs, and clean what changes from run to run.
set -euo pipefail
[ -f runs/demo/metrics.json ] || "$BIN/histokit" demo --run-dir runs/demo      # index shows this run
for nb in ${ONLY:-$(find nbs -name '*.ipynb' -not -path '*checkpoint*' | sort)}; do
  echo "$nb"
  "$BIN/jupyter" nbconvert --log-level=ERROR --to notebook --execute --inplace --ExecutePreprocessor.timeout=1200 \
    --ExecutePreprocessor.store_widget_state=False "$nb"
done
"$BIN/nbdev_clean"
"$BIN/nbdev_export"
BIN="$BIN" tools/readme.sh .

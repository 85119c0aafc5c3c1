#!/usr/bin/env bash
# README.md from nbs/index.ipynb, into the folder given: nbconvert, with the pictures beside it.
set -euo pipefail
out=$1
rm -rf "$out/README_files"
"$BIN/jupyter" nbconvert --log-level=ERROR --to markdown --output-dir "$out" --output README nbs/index.ipynb \
  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=hide --TagRemovePreprocessor.remove_input_tags=hide-input
# One blank line at the end, none doubled, so that git and editors leave it alone.
"$BIN/python" - "$out/README.md" <<'P'
import re, sys
p = sys.argv[1]; s = re.sub(r"[ \t]+\n", "\n", open(p).read()); open(p, "w").write(re.sub(r"\n{3,}", "\n\n", s).strip() + "\n")
P

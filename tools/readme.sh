#!/usr/bin/env bash
# README.md from nbs/index.ipynb, into the folder given: nbconvert, with the pictures beside it.
set -euo pipefail
out=$1
rm -rf "$out/README_files"
"$BIN/jupyter" nbconvert --log-level=ERROR --to markdown --output-dir "$out" --output README nbs/index.ipynb \
  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=hide --TagRemovePreprocessor.remove_input_tags=hide-input
# A picture's caption, the line in italics below it, is its text for those who cannot see it.
# One blank line at the end, none doubled, so that git and editors leave it alone.
"$BIN/python" - "$out/README.md" <<'P'
import re, sys
p = sys.argv[1]; s = re.sub(r"[ \t]+\n", "\n", open(p).read())
s = re.sub(r"!\[png\](\([^)]*\)\s+\*([^*\n]+)\*)", r"![\2]\1", s)
s = re.sub(r"(?ms)^```(\w*)\n(.*?)^```$", lambda m: f"```{m[1] or 'python'}\n{m[2]}```", s)
open(p, "w").write(re.sub(r"\n{3,}", "\n\n", s).strip() + "\n")
P

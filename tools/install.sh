#!/usr/bin/env bash
# Create a virtual environment and install histokit in it with everything its notebooks and tests use.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "histokit needs Python 3.11 or newer; $("$python" --version) found. Give one with: make PYTHON=python3.12" >&2; exit 1; }
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# uv is taken where it is there; it reads UV_INDEX_URL, not the settings of pip. INSTALLER=pip or uv decides.
installer=${INSTALLER:-$(command -v uv >/dev/null && echo uv || echo pip)}
case $installer in
  uv) pip=(uv pip install --quiet --python "$venv/bin/python") ;;
  pip) pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet) ;;
  *) echo "INSTALLER=$installer is neither pip nor uv" >&2; exit 1 ;;
esac

echo "installing into $venv with $installer (a few minutes the first time)"
"${pip[@]}" --upgrade pip setuptools wheel
# torch and torchvision go first and together, so that they match each other; torchsort compiles against the torch that is there.
# TORCH_INDEX: another index for these two, such as the one with builds for processors only.
"${pip[@]}" -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision
"${pip[@]}" -c constraints.txt -e '.[dev]'

if ! "$venv/bin/python" -c 'import torchsort' 2>/dev/null; then
  # torchsort builds CUDA kernels when it sees nvcc. Without a GPU that build fails for want of an architecture, so nvcc is hidden from it.
  path=$PATH
  if ! { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }; then
    path=$(tr ':' '\n' <<<"$PATH" | while read -r d; do [ -x "$d/nvcc" ] || printf '%s:' "$d"; done)
    path=${path%:}
    unset CUDA_HOME CUDA_PATH
  fi
  hidden=$(mktemp -d); trap 'rm -rf "$hidden"' EXIT
  for tool in gcc g++ cc c++ ld as ninja; do t=$(command -v "$tool" || true); [ -z "$t" ] || ln -sf "$t" "$hidden/$tool"; done   # they may live beside nvcc
  PATH="$path:$hidden" "${pip[@]}" -c constraints.txt --no-build-isolation torchsort \
    || echo "torchsort could not be compiled; soft_spearman uses its pure-torch engine (engine=auto records which ran)" >&2
fi
# Notebooks that two people changed are merged cell by cell in this clone (.gitattributes names the driver).
if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
  git config --local merge.nbdev-merge.name "notebooks, cell by cell"
  git config --local merge.nbdev-merge.driver "$venv/bin/nbdev_merge %O %A %B %P"
fi
touch "$venv/.installed"

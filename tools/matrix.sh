#!/usr/bin/env bash
# Recipes x variants by papermill, on toy data, each to a validated answer: tools/matrix.sh NAME [NAME …], or all.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=${BIN:-.venv/bin}
small=(-p backbone=test_resnet.r160_in1k -p weights=none)
names=(spots-finetune spots-losses spots-ridge spots-pls spots-kriging spots-blocks images-probe images-finetune images-balanced retrieve reports)

run() {
  local name=$1; shift
  printf '\n== %s\n' "$name"
  "$BIN/histokit" run "$@" --run-dir "runs/matrix/$name"
}

one() {
  case $1 in
    spots-finetune)  run "$1" demo -p epochs=2 ;;
    spots-losses)    run "$1" demo -p epochs=2 -p "loss=0.5*soft_spearman+0.5*mse" -p target=rank -p scheduler=plateau -p views=dihedral -p ensemble=auto ;;
    spots-ridge)     run "$1" probe -p data_path=demo -p input_px=64 "${small[@]}" ;;
    spots-pls)       run "$1" probe -p data_path=demo -p input_px=64 -p method=pls -p views=none "${small[@]}" ;;
    spots-kriging)   run "$1" best -p data_path=demo -p input_px=64 -p pca=64 "${small[@]}" ;;
    spots-blocks)    run "$1" probe -p data_path=demo -p input_px=64 -p split=blocks "${small[@]}" ;;
    images-probe)    run "$1" image_probe -p data_path=demo ;;
    images-finetune) run "$1" tb -p data_path=demo -p input_px=64 -p epochs=2 -p folds=3 -p patient_pattern= -p site_pattern= "${small[@]}" ;;
    images-balanced) run "$1" pneumonia -p data_path=demo -p input_px=64 -p epochs=2 -p folds=3 -p patient_pattern= "${small[@]}" ;;
    retrieve)        run "$1" retrieve -p data_path=demo ;;
    reports)         run "$1" reports -p data_path=demo ;;
    *) echo "no run '$1'; there are: ${names[*]}" >&2; exit 2 ;;
  esac
  case $1 in
    spots-*)  "$BIN/histokit" validate "runs/matrix/$1/submission.csv" --data "runs/matrix/$1" ;;
    images-*) "$BIN/histokit" validate "runs/matrix/$1/submission.csv" --data "runs/matrix/$1" ;;
  esac
}

[ $# -gt 0 ] || { echo "usage: tools/matrix.sh NAME [NAME …], or all; names: ${names[*]}" >&2; exit 2; }
if [ "$1" = all ]; then set -- "${names[@]}"; fi
for name in "$@"; do one "$name"; done

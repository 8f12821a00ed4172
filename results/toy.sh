#!/usr/bin/env bash
# The study on toy:  [SEEDS="0 1 2 3 4"] bash results/toy.sh          one row of it:  bash results/toy.sh deeplab/uniform
# What ran, and which seeds of it: results/toy.json and avx2.json.
OUT=runs/study-toy
SEEDS=${SEEDS:-0 1 2 3 4}
DATA=(--data toy)
SCORE=(--limit 300)
MASKS=(--split train)
source "$(dirname "$0")/common.sh"

rows() {
  # Does AReAM repair the deep layers, with which weights?
  row reactivation/none "" --reactivation none
  row reactivation/uniform reactivation/none --reactivation uniform --pair-labels two-views
  row reactivation/entropy reactivation/none --pair-labels two-views
  # the same with labels from the training pass
  row reactivation/uniform-shared reactivation/none --reactivation uniform --pair-labels shared
  row reactivation/entropy-shared reactivation/none --pair-labels shared

  # Does it reach masks and segmentation?
  for kind in none uniform entropy; do
    masks   "deeplab/$kind" "reactivation/$kind"
    segment "deeplab/$kind" "deeplab/$kind"
  done
}

study "$@"

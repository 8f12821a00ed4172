#!/usr/bin/env bash
# The study on toy:  [SEEDS="0 1 2 3 4"] bash results/toy.sh
# What ran, and which seeds of it: results/toy.json and avx2.json.
OUT=runs/study-toy
SEEDS=${SEEDS:-0 1 2 3 4}
DATA=(--data toy)
SCORE=(--limit 300)
MASKS=(--split train)
source "$(dirname "$0")/common.sh"
WARM=(--branch-from "$OUT/reactivation/none/%SEED%/cls/warmup.pt")

# Does AReAM repair the deep layers, with which weights?
row reactivation/none --reactivation none
row reactivation/uniform "${WARM[@]}" --reactivation uniform
row reactivation/entropy "${WARM[@]}"
# uniform weights, and labels without a pass of their own
row reactivation/uniform-shared "${WARM[@]}" --reactivation uniform --labels shared

# Does it reach masks and segmentation?
deeplab deeplab/none reactivation/none
deeplab deeplab/uniform reactivation/uniform
deeplab deeplab/entropy reactivation/entropy

study

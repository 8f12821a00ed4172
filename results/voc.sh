#!/usr/bin/env bash
# The study on VOC:  VOC_ROOT=<holds VOCdevkit> [DEIT_TINY=<file>] [SEEDS="0 1 2"] bash results/voc.sh
# DeiT-Tiny, 224 px, batch 16, on `train`. One core takes 25 to 45 minutes for a run of 30 epochs (bfloat16).
# Writes results/voc.json; runs go to runs/study-voc.
OUT=runs/study-voc
SEEDS=${SEEDS:-0 1 2}
DATA=(--data VOC2012 --data-root "${VOC_ROOT:-data}" --split train)
SCORE=(--limit 400)
MASKS=(--limit 500)
source "$(dirname "$0")/common.sh"
TINY=(--preset deit_tiny --pretrained "${DEIT_TINY:-auto}" --batch 16 --lr 3e-4)
RELEASE=("${TINY[@]}" --augment release)
THIRTY=("${RELEASE[@]}" --epochs 30 --warmup-epochs 10)
WARM=(--branch-from "$OUT/schedule/none/%SEED%/cls/warmup.pt")

# Which crops? (10 epochs, the plain classifier)
row augment/jitter  "${TINY[@]}" --epochs 10 --reactivation none --augment jitter
row augment/release "${TINY[@]}" --epochs 10 --reactivation none --augment release

# 30 epochs, the last 20 with the loss, all from the same warm-up
row schedule/none          "${THIRTY[@]}" --reactivation none
row schedule/uniform-split "${THIRTY[@]}" "${WARM[@]}" --reactivation uniform --coupling split --labels shared
row schedule/entropy-split "${THIRTY[@]}" "${WARM[@]}" --entropy static --coupling split --labels shared
row schedule/entropy-all   "${THIRTY[@]}" "${WARM[@]}" --labels shared

# Six more epochs after the 30: AReAM on a classifier that has converged
MORE=("${RELEASE[@]}" --epochs 36 --warmup-epochs 30 --branch-from "$OUT/schedule/none/%SEED%/cls/last.pt")
row more/none          "${MORE[@]}" --reactivation none
row more/uniform-split "${MORE[@]}" --reactivation uniform --coupling split --labels shared

# Does it reach masks and segmentation?
VIT=(--arch deeplabv3_vit --size 224 --epochs 5 --scales 1)
deeplab deeplab/none          schedule/none          "${VIT[@]}"
deeplab deeplab/uniform-split schedule/uniform-split "${VIT[@]}"

# Do deep layers over-smooth at other depths? (Figure 1)
row depth/6  "${RELEASE[@]}" --epochs 10 --reactivation none --depth 6
row depth/8  "${RELEASE[@]}" --epochs 10 --reactivation none --depth 8
row depth/10 "${RELEASE[@]}" --epochs 10 --reactivation none --depth 10

# How is the seed refined best? (beta 1.000001: one step, rows normalised)
score walk/2-steps      schedule/none --steps 2
score walk/squared      schedule/none --beta 2
score walk/normalised   schedule/none --beta 1.000001
score walk/three-scales schedule/none --scales 0.5 1 1.5

# Does bfloat16 change anything? (3 epochs)
SHORT=("${RELEASE[@]}" --epochs 3 --warmup-epochs 1 --coupling split)
row precision/none-float32     "${SHORT[@]}" --reactivation none --precision float32
row precision/none-bfloat16    "${SHORT[@]}" --reactivation none --precision bfloat16
row precision/uniform-float32  "${SHORT[@]}" --reactivation uniform --precision float32
row precision/uniform-bfloat16 "${SHORT[@]}" --reactivation uniform --precision bfloat16
masks precision-masks/float32  schedule/none --precision float32
masks precision-masks/bfloat16 schedule/none --precision bfloat16

"$PYTHON" evaluate.py --what study --out $OUT --records results/voc.json

#!/usr/bin/env bash
# The study on VOC:  VOC_ROOT=<holds VOCdevkit> [DEIT_TINY=<file>] [MOBILENET=<file>] [SEEDS="0 1 2"] bash results/voc.sh
#     one row of it:  … bash results/voc.sh schedule/uniform-split        (VOC of 320 px: python -m results.shrink)
# DeiT-Tiny, 224 px, batch 16, on `train`. A run of 30 epochs takes 35 to 45 minutes on one core with native bfloat16.
# What ran, and which seeds of it: results/voc.json, voc_h200.json and avx2.json.
OUT=runs/study-voc
SEEDS=${SEEDS:-0 1 2}
SCORE=(--limit 400)
source "$(dirname "$0")/common.sh"
TINY=(--preset deit_tiny --pretrained "${DEIT_TINY:-auto}" --batch 16)
THIRTY=("${TINY[@]}" --epochs 30 --warmup-epochs 10 --lr 1e-4)
PLAIN=("${THIRTY[@]}" --reactivation none)
AREAM=("${THIRTY[@]}" --pair-labels shared)
UNIFORM=("${AREAM[@]}" --reactivation uniform --coupling split)

rows() {
  DATA=(--data VOC2012 --data-root "${VOC_ROOT:-data}" --split train)
  MASKS=(--limit 500)

  # 30 epochs, the last 20 with the loss, all from the same warm-up
  row schedule/none               ""            "${PLAIN[@]}"
  row schedule/uniform-split      schedule/none "${UNIFORM[@]}"
  row schedule/entropy-split      schedule/none "${AREAM[@]}" --entropy static --coupling split
  row schedule/entropy-all        schedule/none "${AREAM[@]}" --affinity-weight 0.1
  # how much loss? (0.1 above; 0.3 over all 12 layers gives a deep one what 0.1 over the 5 deep ones does)
  row schedule/uniform-split-0.03 schedule/none "${UNIFORM[@]}" --affinity-weight 0.03
  row schedule/uniform-split-0.3  schedule/none "${UNIFORM[@]}" --affinity-weight 0.3
  row schedule/entropy-all-0.3    schedule/none "${AREAM[@]}" --affinity-weight 0.3
  # the defaults of train_cls.py
  row schedule/entropy-all-0.3-two-views schedule/none "${AREAM[@]}" --affinity-weight 0.3 --pair-labels two-views
  # the labels with PAR's nearer neighbours
  NEAR=(--par-dilations 1 2 4 8)
  row schedule/uniform-split-near schedule/none "${UNIFORM[@]}" "${NEAR[@]}"
  # the plain classifier with three times the learning rate, with the other augmentation
  row schedule/none-3e-4          ""            "${PLAIN[@]}" --lr 3e-4
  row schedule/none-jitter        ""            "${PLAIN[@]}" --augment jitter
  # the plain classifier, trained for the paper's number of epochs
  row schedule/none-60            ""            "${PLAIN[@]}" --epochs 60

  # Does it reach the masks?
  masks masks/none                     schedule/none
  masks masks/none-normalised          schedule/none          --rows normalised
  masks masks/uniform-split            schedule/uniform-split
  masks masks/uniform-split-normalised schedule/uniform-split --rows normalised

  # How far may PAR's neighbours be? As released (for photographs of 500 px), near, and the released ones times the
  # photograph's longer side over 500
  for side in 320 160; do
    masks par-reach/$side-release schedule/none --max-side $side
    masks par-reach/$side-near    schedule/none --max-side $side "${NEAR[@]}"
  done
  masks par-reach/320-scaled schedule/none --max-side 320 --par-dilations 1 3 5 8 15
  masks par-reach/160-scaled schedule/none --max-side 160 --par-dilations 1 3 4 8

  # Do deep layers over-smooth at other depths? (Figure 1; 12 is schedule/none)
  row depth/6  "" "${PLAIN[@]}" --depth 6
  row depth/8  "" "${PLAIN[@]}" --depth 8
  row depth/10 "" "${PLAIN[@]}" --depth 10

  # Do patches' draws from class tokens spoil the refinement? (rows of patch blocks normalised)
  score rows/none          schedule/none          --rows normalised
  score rows/uniform-split schedule/uniform-split --rows normalised
  score rows/entropy-split schedule/entropy-split --rows normalised
  score rows/entropy-all-0.3 schedule/entropy-all-0.3 --rows normalised
  score rows/entropy-all-0.3-two-views schedule/entropy-all-0.3-two-views --rows normalised
  score rows/uniform-split-near schedule/uniform-split-near --rows normalised

  # How else is the seed refined?
  score walk/2-steps      schedule/none --steps 2
  score walk/squared      schedule/none --beta 2
  score walk/three-scales schedule/none --scales 0.5 1 1.5

  # Does bfloat16 change anything? (3 epochs)
  SHORT=("${TINY[@]}" --lr 3e-4 --epochs 3 --warmup-epochs 1 --coupling split --reactivation none)
  row precision/float32  "" "${SHORT[@]}" --precision float32
  row precision/bfloat16 "" "${SHORT[@]}" --precision bfloat16
  masks precision-masks/float32  schedule/none --precision float32
  masks precision-masks/bfloat16 schedule/none --precision bfloat16

  # More images (two and a half hours a row); of a flag given twice the last counts
  DATA+=(--split trainaug_6293)
  MASKS=(--split trainaug_6293)
  row trainaug/none          ""            "${PLAIN[@]}"
  row trainaug/uniform-split trainaug/none "${UNIFORM[@]}"
  score trainaug-rows/none          trainaug/none          --rows normalised
  score trainaug-rows/uniform-split trainaug/uniform-split --rows normalised
  masks trainaug-masks/none                     trainaug/none
  masks trainaug-masks/uniform-split            trainaug/uniform-split
  masks trainaug-masks/uniform-split-normalised trainaug/uniform-split --rows normalised

  # Masks with PAR's nearer neighbours, and segmentation
  VIT=(--arch deeplabv3_vit --size 224 --epochs 3 --scales 1)
  masks   trainaug-near/none                     trainaug/none          "${NEAR[@]}"
  masks   trainaug-near/uniform-split-normalised trainaug/uniform-split "${NEAR[@]}" --rows normalised
  segment trainaug-near/none                     trainaug-near/none                     "${VIT[@]}"
  segment trainaug-near/uniform-split-normalised trainaug-near/uniform-split-normalised "${VIT[@]}"

  # Masks decided everywhere
  DECIDED=(--low 0.45 --high 0.45)
  masks   trainaug-decided/none                     trainaug/none          "${DECIDED[@]}" "${NEAR[@]}"
  masks   trainaug-decided/uniform-split-normalised trainaug/uniform-split "${DECIDED[@]}" "${NEAR[@]}" --rows normalised
  segment trainaug-decided/none                     trainaug-decided/none                     "${VIT[@]}"
  segment trainaug-decided/uniform-split-normalised trainaug-decided/uniform-split-normalised "${VIT[@]}"

  # Another network on these masks
  MOBILE=(--arch deeplabv3_mobilenet_v2 --pretrained "${MOBILENET:-auto}" --size 224 --epochs 5 --scales 1)
  segment trainaug-mobilenet/none                     trainaug-near/none                     "${MOBILE[@]}"
  segment trainaug-mobilenet/uniform-split-normalised trainaug-near/uniform-split-normalised "${MOBILE[@]}"

  # The ViT's predictions at three scales
  THREE=(--scales 0.75 1 1.25)
  predict trainaug-near-scales/none                     trainaug-near/none                        "${THREE[@]}"
  predict trainaug-near-scales/uniform-split-normalised trainaug-near/uniform-split-normalised    "${THREE[@]}"

  # What does PAR do? (masks decided everywhere)
  DECIDED+=(--split train)
  masks par/none                             trainaug/none          "${DECIDED[@]}"
  masks par/none-near                        trainaug/none          "${DECIDED[@]}" "${NEAR[@]}"
  masks par/none-without                     trainaug/none          "${DECIDED[@]}" --par-iterations 0
  masks par/uniform-split-normalised         trainaug/uniform-split "${DECIDED[@]}" --rows normalised
  masks par/uniform-split-normalised-near    trainaug/uniform-split "${DECIDED[@]}" --rows normalised "${NEAR[@]}"
  masks par/uniform-split-normalised-without trainaug/uniform-split "${DECIDED[@]}" --rows normalised --par-iterations 0
}

study "$@"

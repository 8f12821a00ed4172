# The steps of a study; sourced by toy.sh and voc.sh, which name their rows in a function rows() and end with
#   study "$@"      all rows, or those that are named, with what they go on from
# A row is a folder $OUT/<question>/<row>/<seed>; what is there is skipped, so that an interrupted study goes on.
# SEEDS, OUT and the arrays DATA, SCORE, MASKS (flags) come from there.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # the number of cores does not change the rounding
PYTHON="${PYTHON:-.venv/bin/python}"
declare -A FROM=() WANTED=()  # row -> the row it goes on from; the rows to make, none: all
PLAN=1

# wanted NAME OF: in the first pass take note of the row and of what it goes on from; then: is it to be made?
wanted() {
  if [ "$PLAN" ]; then
    [ "$1" = "$2" ] || FROM[$1]=$2
    return 1
  fi
  [ "${#WANTED[@]}" = 0 ] || [ "${WANTED[$1]:-}" ]
}

# row NAME OF [flags of train_cls.py]: train, from the warm-up of row OF ("": from the start), and score each layer
row() {
  local name=$1 of=$2 seed out; shift 2
  wanted "$name" "$of" || return 0
  for seed in $SEEDS; do
    out=$OUT/$name/$seed
    if [ ! -f "$out/layers.json" ]; then
      "$PYTHON" train_cls.py "${DATA[@]}" "$@" ${of:+--branch-from "$OUT/$of/$seed/cls/warmup.pt"} \
        --seed "$seed" --out "$out" --resume
      "$PYTHON" evaluate.py "${DATA[@]}" "${SCORE[@]}" --split train --what layers --out "$out"
    fi
  done
}

# copy NAME OF SEED [PART]: the classifier of row OF, or another part of it
copy() {
  local to=$OUT/$1/$3 from=$OUT/$2/$3 part=${4:-cls}
  if [ ! -d "$to/$part" ]; then
    mkdir -p "$to"
    rm -rf "$to/$part.tmp"
    cp -r "$from/$part" "$to/$part.tmp"
    mv "$to/$part.tmp" "$to/$part"
  fi
}

# score NAME OF [flags of evaluate.py]: another way to refine with the classifiers of row OF
score() {
  local name=$1 of=$2 seed out; shift 2
  wanted "$name" "$of" || return 0
  for seed in $SEEDS; do
    out=$OUT/$name/$seed
    if [ ! -f "$out/layers.json" ]; then
      copy "$name" "$of" "$seed"
      "$PYTHON" evaluate.py "${DATA[@]}" "${SCORE[@]}" --split train --what layers --out "$out" "$@"
    fi
  done
}

# unscored NAME WHAT: the seeds of a row that have no such score yet
unscored() {
  local seed
  for seed in $SEEDS; do
    grep -qs "\"$2\"" "$OUT/$1/$seed/results.json" || echo "$seed"
  done
}

# masks NAME OF [flags of refine.py]: pseudo-masks of the classifiers of row OF
masks() {
  local name=$1 of=$2 seed out; shift 2
  wanted "$name" "$of" || return 0
  for seed in $(unscored "$name" pseudo); do
    out=$OUT/$name/$seed
    copy "$name" "$of" "$seed"
    "$PYTHON" refine.py "${DATA[@]}" "${MASKS[@]}" --out "$out" --resume "$@"
    "$PYTHON" evaluate.py "${DATA[@]}" "${MASKS[@]}" --split train --what pseudo --out "$out"
  done
}

# val OUT [flags of train_seg.py]: stage 3, and its score on val
val() {
  local out=$1; shift
  "$PYTHON" train_seg.py "${DATA[@]}" "${MASKS[@]}" --out "$out" --resume "$@"
  "$PYTHON" evaluate.py "${DATA[@]}" "${MASKS[@]}" --split val --what pred --out "$out"
}

# segment NAME OF [flags of train_seg.py]: a DeepLab trained on the masks of row OF
segment() {
  local name=$1 of=$2 seed; shift 2
  wanted "$name" "$of" || return 0
  for seed in $(unscored "$name" pred); do
    copy "$name" "$of" "$seed"
    val "$OUT/$name/$seed" --masks "$OUT/$of/$seed/pseudo" --seed "$seed" "$@"
  done
}

# predict NAME OF [flags of train_seg.py]: the DeepLabs of row OF predict val in another way
predict() {
  local name=$1 of=$2 seed; shift 2
  wanted "$name" "$of" || return 0
  for seed in $(unscored "$name" pred); do
    copy "$name" "$of" "$seed"
    copy "$name" "$of" "$seed" seg
    val "$OUT/$name/$seed" --predict-only "$@"
  done
}

# study [ROW ...]: make the rows, gather the scores of all that are there in $OUT/records.json, print them as tables
study() {
  local name
  rows  # takes note of what goes on from what
  for name in "$@"; do
    if [ -z "${FROM[$name]+known}" ]; then
      echo "error: no row $name; there are: ${!FROM[*]}" >&2
      exit 2
    fi
    while [ "$name" ]; do
      WANTED[$name]=1
      name=${FROM[$name]}
    done
  done
  PLAN=
  rows
  "$PYTHON" -m results.study gather "$OUT" "$OUT/records.json"
}

# The four steps of a study; sourced by toy.sh and voc.sh. A row is a folder $OUT/<question>/<row>/<seed>; what is there is
# skipped, so that an interrupted study goes on. SEEDS, PYTHON, DATA (flags) and SCORE (flags of evaluate.py) come from there.
set -eu
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread rounds the same anywhere
PYTHON="${PYTHON:-.venv/bin/python}"

# row NAME [flags of train_cls.py]: train, and score each layer. @ stands for the seed.
row() {
  name=$1; shift
  for seed in $SEEDS; do
    out=$OUT/$name/$seed
    if [ ! -f "$out/layers.json" ]; then
      $PYTHON train_cls.py $DATA ${*//@/$seed} --seed "$seed" --out "$out" --resume
      $PYTHON evaluate.py $DATA $SCORE --what layers --out "$out"
    fi
  done
}

# score NAME OF [flags of evaluate.py]: another way to refine with the classifiers of row OF
score() {
  name=$1 of=$2; shift 2
  for seed in $SEEDS; do
    out=$OUT/$name/$seed
    if [ ! -f "$out/layers.json" ]; then
      mkdir -p "$out"; cp -r "$OUT/$of/$seed/cls" "$out"
      $PYTHON evaluate.py $DATA $SCORE --what layers --out "$out" "$@"
    fi
  done
}

# masks NAME OF [flags of refine.py]: pseudo-masks of the classifiers of row OF
masks() {
  name=$1 of=$2; shift 2
  for seed in $SEEDS; do
    out=$OUT/$name/$seed
    if ! grep -qs '"pseudo"' "$out/results.json"; then
      mkdir -p "$out"; cp -r "$OUT/$of/$seed/cls" "$out"
      $PYTHON refine.py $DATA $MASKS --out "$out" --resume "$@"
      $PYTHON evaluate.py $DATA $MASKS --what pseudo --out "$out"
    fi
  done
}

# deeplab NAME OF [flags of train_seg.py]: and a DeepLab trained on them, scored on val
deeplab() {
  name=$1 of=$2; shift 2
  masks "$name" "$of"
  for seed in $SEEDS; do
    out=$OUT/$name/$seed
    if ! grep -qs '"pred"' "$out/results.json"; then
      $PYTHON train_seg.py $DATA $MASKS --seed "$seed" --out "$out" --resume "$@"
      $PYTHON evaluate.py $DATA ${MASKS/--split train/} --what pred --out "$out"
    fi
  done
}

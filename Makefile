# make demo: environment, four stages on `toy`, a table, runs/toy/demo.png.   make test: environment, pytest (SLOW=1: all).
# make speed: the speed table, on this CPU.                 make gpu: profile, kernels and tests on a CUDA card.
PYTHON ?= python3
PY := .venv/bin/python
ifdef SMOKE
TRAIN := --epochs 2 --warmup-epochs 1 --limit 64
SEG := --epochs 1 --limit 64
LIMIT := --limit 64
endif

.PHONY: demo test speed gpu clean

# one thread: the number of cores does not change the rounding
demo: export OMP_NUM_THREADS = 1
demo: .venv/ready
	$(PY) train_cls.py --data toy --reactivation none --out runs/toy/plain --overwrite $(TRAIN)
	$(PY) train_cls.py --data toy --branch-from runs/toy/plain/cls/warmup.pt --overwrite $(TRAIN)
	$(PY) evaluate.py --data toy --what layers --out runs/toy/plain --limit 300 $(LIMIT)
	$(PY) evaluate.py --data toy --what layers --before runs/toy/plain --limit 300 $(LIMIT)
	$(PY) refine.py --data toy --overwrite $(LIMIT)
	$(PY) evaluate.py --data toy --what pseudo $(LIMIT)
	$(PY) train_seg.py --data toy --overwrite $(SEG)
	$(PY) evaluate.py --data toy --what pred $(LIMIT)
	$(PY) evaluate.py --data toy --what demo --before runs/toy/plain

test: .venv/ready
	AREAM_SLOW=$(SLOW) $(PY) -m pytest -q -rs test_aream.py

speed: .venv/ready
	$(PY) test_aream.py

gpu: .venv/ready
	$(PY) train_cls.py --data toy --preset deit_small --pretrained none --size 224 --batch 64 --precision bfloat16 --profile 20
	$(PY) test_aream.py kernels
	$(PY) -m pytest -q -rs test_aream.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt pytest
	touch $@

clean:
	rm -rf .venv .venv-lowest

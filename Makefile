# make photo: the shipped model on photographs, one picture (PHOTOS="holiday/ beach.jpg": on your own).
# make demo: four stages on `toy`, a table, runs/toy/pictures.png.   make test: pytest (SLOW=1: all).
# make speed: the speed table, on this CPU.   make gpu: profiles and tests on a CUDA card.
# Each makes an environment .venv first (5.5 GB), but with PY=python, which names a Python that has what it needs.
PYTHON ?= python3
MODEL ?= models/voc_deit_tiny
PHOTOS ?= assets/photos
ifdef PY
READY :=
else
PY := .venv/bin/python
READY := .venv/ready
endif
ifdef SMOKE
TRAIN := --epochs 2 --warmup-epochs 1 --limit 64
SEG := --epochs 1 --limit 64
LIMIT := --limit 64
endif

.PHONY: photo demo test speed gpu clean

# one thread: the number of cores does not change the rounding
photo demo: export OMP_NUM_THREADS = 1
photo: $(READY)
	$(PY) evaluate.py --what pictures --photos $(PHOTOS) --rows normalised --out $(MODEL)

demo: $(READY)
	$(PY) train_cls.py --data toy --reactivation none --out runs/toy/plain --overwrite $(TRAIN)
	$(PY) train_cls.py --data toy --branch-from runs/toy/plain/cls/warmup.pt --overwrite $(TRAIN)
	$(PY) evaluate.py --data toy --what layers --out runs/toy/plain --limit 300 $(LIMIT)
	$(PY) evaluate.py --data toy --what layers --before runs/toy/plain --limit 300 $(LIMIT)
	$(PY) refine.py --data toy --overwrite $(LIMIT)
	$(PY) evaluate.py --data toy --what pseudo $(LIMIT)
	$(PY) train_seg.py --data toy --overwrite $(SEG)
	$(PY) evaluate.py --data toy --what pred $(LIMIT)
	$(PY) evaluate.py --data toy --what pictures --before runs/toy/plain --limit 5
	$(PY) -m results.study demo runs/toy/plain runs/toy

test: $(READY)
	AREAM_SLOW=$(SLOW) $(PY) -m pytest -q -rs test_aream.py

speed: $(READY)
	$(PY) -m results.speed table

gpu: $(READY)
	$(PY) -m results.speed profile --preset deit_small --batch 64 --precision bfloat16 --device cuda
	$(PY) -m pytest -q -rs test_aream.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt pytest
	touch $@

clean:
	rm -rf .venv .venv-lowest

# make demo: environment, four stages on `toy`, one table, runs/toy/demo.png.   make test: environment, pytest.
PYTHON ?= python3
PY := .venv/bin/python
SMOKE ?=

.PHONY: demo test clean
demo: .venv/ready
	$(PY) train_cls.py --data toy --reactivation none --out runs/toy/plain --overwrite $(SMOKE)
	$(PY) train_cls.py --data toy --branch-from runs/toy/plain/cls/warmup.pt --overwrite $(SMOKE)
	$(PY) evaluate.py --data toy --what layers --out runs/toy/plain $(LIMIT)
	$(PY) evaluate.py --data toy --what layers $(LIMIT)
	$(PY) refine.py --data toy --overwrite $(LIMIT)
	$(PY) evaluate.py --data toy --what pseudo $(LIMIT)
	$(PY) train_seg.py --data toy --overwrite $(SEG)
	$(PY) evaluate.py --data toy --what pred $(LIMIT)
	$(PY) evaluate.py --data toy --what demo --before runs/toy/plain

test: .venv/ready
	$(PY) -m pytest -q test_aream.py

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt pytest
	touch $@

clean:
	rm -rf .venv runs

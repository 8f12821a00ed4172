# make demo: environment, four stages on `toy`, one table, runs/toy/demo.png.   make test: environment, pytest.
PYTHON ?= python3
PY := .venv/bin/python
SMOKE ?=
SLOW ?=
SEEDS ?= 0 1 2

.PHONY: demo test study-toy study-voc clean
demo: .venv/ready
	$(PY) train_cls.py --data toy --reactivation none --out runs/toy/plain --overwrite $(SMOKE)
	$(PY) train_cls.py --data toy --branch-from runs/toy/plain/cls/warmup.pt --overwrite $(SMOKE)
	$(PY) evaluate.py --data toy --what layers --out runs/toy/plain --limit 300 $(LIMIT)
	$(PY) evaluate.py --data toy --what layers --before runs/toy/plain --limit 300 $(LIMIT)
	$(PY) refine.py --data toy --overwrite $(LIMIT)
	$(PY) evaluate.py --data toy --what pseudo $(LIMIT)
	$(PY) train_seg.py --data toy --overwrite $(SEG)
	$(PY) evaluate.py --data toy --what pred $(LIMIT)
	$(PY) evaluate.py --data toy --what demo --before runs/toy/plain

test: .venv/ready
	AREAM_SLOW=$(SLOW) $(PY) -m pytest -q -rs test_aream.py

# The study. $(call row,folder,settings of train_cls.py,settings of evaluate.py) makes <folder>/<seed> for every seed, @
# standing for the seed, and skips what is there: run it again to go on. One thread: rounding then is the same anywhere.
row = $(foreach s,$(SEEDS),{ test -f $(1)/$(s)/layers.json || { $(PY) train_cls.py $(subst @,$(s),$(2)) --seed $(s) --out $(1)/$(s) --resume && $(PY) evaluate.py --what layers $(3) --out $(1)/$(s); }; } &&) true
# $(call score,folder,folder of the run,settings of evaluate.py): another way to refine with the same classifier
score = $(foreach s,$(SEEDS),{ test -f $(1)/$(s)/layers.json || { mkdir -p $(1)/$(s) && cp -r $(2)/$(s)/cls $(1)/$(s) && $(PY) evaluate.py --what layers $(3) --out $(1)/$(s); }; } &&) true
# $(call masks,folder,folder of the run,settings of refine.py,of evaluate.py): pseudo-masks of a classifier
# $(call deeplab,...,settings of train_seg.py): and a DeepLab trained on them
with = mkdir -p $(1)/$(s) && cp -r $(2)/$(s)/cls $(1)/$(s) && $(PY) refine.py $(3) --out $(1)/$(s) --resume && $(PY) evaluate.py --what pseudo $(4) --out $(1)/$(s)
masks = $(foreach s,$(SEEDS),{ test -f $(1)/$(s)/results.json || { $(with); }; } &&) true
deeplab = $(foreach s,$(SEEDS),{ grep -qs '"pred"' $(1)/$(s)/results.json || { $(with) && $(PY) train_seg.py $(5) --seed $(s) --out $(1)/$(s) --resume && $(PY) evaluate.py --what pred $(subst --split train,,$(4)) --out $(1)/$(s); }; } &&) true

T := runs/study-toy
TOY := --data toy --branch-from $T/1.none/@/cls/warmup.pt
TOYS := --data toy --limit 300
study-toy: export OMP_NUM_THREADS = 1
study-toy: .venv/ready
	$(call row,$T/1.none,--data toy --reactivation none,$(TOYS))
	$(call row,$T/1.uniform,$(TOY) --reactivation uniform,$(TOYS))
	$(call row,$T/1.entropy,$(TOY),$(TOYS))
	$(call row,$T/2.entropy-split,$(TOY) --coupling split,$(TOYS))
	$(call row,$T/2.entropy-static,$(TOY) --entropy static,$(TOYS))
	$(call row,$T/4.one-view,$(TOY) --labels one-view,$(TOYS))
	$(call row,$T/4.shared,$(TOY) --labels shared,$(TOYS))
	$(call row,$T/3.weight-0.5,$(TOY) --affinity-weight 0.5,$(TOYS))
	$(call row,$T/3.weight-1,$(TOY) --affinity-weight 1,$(TOYS))
	$(call row,$T/3.weight-4,$(TOY) --affinity-weight 4,$(TOYS))
	$(call row,$T/3.uniform-weight-1,$(TOY) --reactivation uniform --affinity-weight 1,$(TOYS))
	$(call row,$T/3.split-deep-from-1,$(TOY) --coupling split --deep-from 1,$(TOYS) --deep-from 2)
	$(call row,$T/3.split-deep-from-4,$(TOY) --coupling split --deep-from 4,$(TOYS) --deep-from 2)
	$(call score,$T/5.steps-2,$T/1.entropy,$(TOYS) --steps 2)
	$(call score,$T/5.steps-4,$T/1.entropy,$(TOYS) --steps 4)
	$(call score,$T/5.beta-2,$T/1.entropy,$(TOYS) --beta 2)
	$(call score,$T/5.three-scales,$T/1.entropy,$(TOYS) --scales 0.5 1 1.5)
	$(call row,$T/6.depth-3,--data toy --reactivation none --depth 3,$(TOYS))
	$(call row,$T/6.depth-4,--data toy --reactivation none --depth 4,$(TOYS))
	$(call row,$T/6.depth-5,--data toy --reactivation none --depth 5,$(TOYS))
	$(call masks,$T/7.band,$T/1.entropy,--data toy,--data toy)
	$(call masks,$T/7.one-threshold,$T/1.entropy,--data toy --low 0.45 --high 0.45,--data toy)
	$(call masks,$T/7.without-par,$T/1.entropy,--data toy --par-iterations 0,--data toy)
	$(call deeplab,$T/8.none,$T/1.none,--data toy,--data toy,--data toy)
	$(call deeplab,$T/8.uniform,$T/1.uniform,--data toy,--data toy,--data toy)
	$(call deeplab,$T/8.entropy,$T/1.entropy,--data toy,--data toy,--data toy)
	$(call deeplab,$T/8.weight-4,$T/3.weight-4,--data toy,--data toy,--data toy)
	$(call deeplab,$T/8.uniform-weight-1,$T/3.uniform-weight-1,--data toy,--data toy,--data toy)
	$(PY) evaluate.py --what study --out $T --records results/toy.json

V := runs/study-voc
VOC_ROOT ?= data
THREADS ?= 1
DEIT_TINY ?= auto
VOCT := --data VOC2012 --data-root $(VOC_ROOT) --split train
VOC := $(VOCT) --preset deit_tiny --batch 16
VOCB := $(VOC) --lr 1.3e-3 --epochs 12 --warmup-epochs 10 --affinity-weight 0.5 --coupling split --branch-from $V/0.warm-up/@/cls/last.pt
THREE := --lr 7e-4 --epochs 13
VOCE := $(VOCT) --limit 400
VOCS := $(VOCE) --scales 1
VOCF := $(VOCT) --limit 500
VOCM := $(VOCF) --scales 1
VOCD := $(VOCM) --arch deeplabv3_vit --size 224 --epochs 5
study-voc: export OMP_NUM_THREADS = $(THREADS)
study-voc: .venv/ready
	$(call row,$V/0.warm-up,$(VOC) --lr 3e-4 --epochs 10 --reactivation none --pretrained $(DEIT_TINY),$(VOCS))
	$(call row,$V/1.none,$(VOCB) $(THREE) --reactivation none,$(VOCS))
	$(call row,$V/1.uniform,$(VOCB) $(THREE) --reactivation uniform,$(VOCS))
	$(call row,$V/1.entropy,$(VOCB) $(THREE),$(VOCS))
	$(call row,$V/2.none,$(VOCB) --reactivation none,$(VOCS))
	$(call row,$V/2.uniform,$(VOCB) --reactivation uniform,$(VOCS))
	$(call row,$V/2.entropy,$(VOCB),$(VOCS))
	$(call row,$V/2.entropy-all,$(VOCB) --coupling all,$(VOCS))
	$(call row,$V/2.entropy-static,$(VOCB) --entropy static,$(VOCS))
	$(call row,$V/3.weight-0.1,$(VOCB) --affinity-weight 0.1,$(VOCS))
	$(call row,$V/3.weight-1,$(VOCB) --affinity-weight 1,$(VOCS))
	$(call row,$V/3.uniform-weight-0.4,$(VOCB) --reactivation uniform --affinity-weight 0.4,$(VOCS))
	$(call row,$V/3.deep-from-5,$(VOCB) --deep-from 5,$(VOCS) --deep-from 7)
	$(call row,$V/3.deep-from-9,$(VOCB) --deep-from 9,$(VOCS) --deep-from 7)
	$(call row,$V/4.one-view,$(VOCB) --labels one-view,$(VOCS))
	$(call row,$V/4.shared,$(VOCB) --labels shared,$(VOCS))
	$(call score,$V/5.steps-2,$V/1.entropy,$(VOCS) --steps 2)
	$(call score,$V/5.steps-4,$V/1.entropy,$(VOCS) --steps 4)
	$(call score,$V/5.beta-2,$V/1.entropy,$(VOCS) --beta 2)
	$(call score,$V/5.three-scales,$V/1.entropy,$(VOCS) --scales 0.5 1 1.5)
	$(call row,$V/6.depth-6,$(VOC) --lr 3e-4 --epochs 10 --reactivation none --pretrained $(DEIT_TINY) --depth 6,$(VOCS) --deep-from 4)
	$(call row,$V/6.depth-8,$(VOC) --lr 3e-4 --epochs 10 --reactivation none --pretrained $(DEIT_TINY) --depth 8,$(VOCS) --deep-from 5)
	$(call row,$V/6.depth-10,$(VOC) --lr 3e-4 --epochs 10 --reactivation none --pretrained $(DEIT_TINY) --depth 10,$(VOCS) --deep-from 6)
	$(call masks,$V/7.band,$V/1.entropy,$(VOCS),$(VOCE))
	$(call masks,$V/7.one-threshold,$V/1.entropy,$(VOCS) --low 0.45 --high 0.45,$(VOCE))
	$(call masks,$V/7.without-par,$V/1.entropy,$(VOCS) --par-iterations 0,$(VOCE))
	$(call deeplab,$V/8.none,$V/1.none,$(VOCM),$(VOCF),$(VOCD))
	$(call deeplab,$V/8.uniform,$V/1.uniform,$(VOCM),$(VOCF),$(VOCD))
	$(call deeplab,$V/8.entropy,$V/1.entropy,$(VOCM),$(VOCF),$(VOCD))
	$(PY) evaluate.py --what study --out $V --records results/voc.json

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt pytest
	touch $@

clean:
	rm -rf .venv runs

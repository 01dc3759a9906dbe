# TinyJEPA. `make help` lists the targets; every stage can also be run by hand, see the README.
PYTHON ?= python3
ROOT ?= demo
PY = .venv/bin/python
LAPTOP = --root $(ROOT)

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

install: .venv/installed  ## .venv with requirements.txt in it

demo: .venv/installed  ## every stage small, into demo/: from nothing to a driven lap on two cores
	$(PY) collect_race_data.py $(LAPTOP) --frames 24000 --pace 0
	$(PY) collect_recovery_data.py $(LAPTOP) --frames 36000 --pace 0
	$(PY) collect_data.py $(LAPTOP) --frames 16000
	$(PY) train_encoder.py $(LAPTOP) --width 0.25 --dim 256 --epochs 8 --steps_per_epoch 220 --batch_size 96
	$(PY) train_decoder.py $(LAPTOP) --once --newest --steps 500
	$(PY) train_predictor.py $(LAPTOP) --epochs 6 --steps_per_epoch 200 --batch_size 512
	$(PY) train_cost_model.py $(LAPTOP) --epochs 2
	$(PY) demo_energy.py $(LAPTOP) --headless --steps 400
	$(PY) drive_mpc.py $(LAPTOP) --episodes 3 --track_seed 100000 --compare --json $(ROOT)/visuals/drive_mpc.json

test: .venv/installed  ## the tests, under ten minutes on two cores
	$(PY) -m pytest

test-all: .venv/installed  ## the slow ones too
	$(PY) -m pytest -m ''

all: .venv/installed  ## the whole plan at full scale: 5.8 million frames, a GPU and patience
	$(PY) collect_race_data.py --pace 0
	$(PY) collect_recovery_data.py --pace 0
	$(PY) collect_data.py
	$(PY) train_encoder.py --epochs 50 --batch_size 256
	$(PY) train_decoder.py --once --newest
	$(PY) train_predictor.py --epochs 50
	$(PY) train_cost_model.py
	$(PY) demo_energy.py --headless
	$(PY) drive_mpc.py --episodes 100 --track_seed 100000 --compare --json visuals/drive_mpc.json

.PHONY: help install demo test test-all all

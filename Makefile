# TinyJEPA. `make help` lists the targets; every stage can also be run by hand, see the README.
PYTHON ?= python3
ROOT ?= demo
PY = .venv/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
LAPTOP = --root "$(ROOT)"
# pip's index for torch and torchvision; the one that .venv was made with, unless another is given
TORCH_WAS := $(shell cat .venv/torch_index 2>/dev/null)
TORCH_INDEX ?= $(TORCH_WAS)
# shares of a batch: expert, recovery, random
SHARES = --shares 0.35 0.45 0.2
# the small encoder of a laptop
ENCODER = --channels 16 --batch_size 96 --lr 2e-3
# and its predictor
PREDICTOR = --batch_size 512 --lr 2e-3

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12
	@echo
	@echo 'Every target takes ROOT=folder (of demo and pretrained) and TORCH_INDEX=URL, on a machine with:'
	@echo '  an AMD GPU     make install TORCH_INDEX=https://download.pytorch.org/whl/rocm6.4   (or newer)'
	@echo '  an NVIDIA GPU  make install                      (6 GB; or .../whl/cu126 for an older driver)'
	@echo '  no GPU         make install TORCH_INDEX=https://download.pytorch.org/whl/cpu       (1 GB)'

# torch comes first, from its own index and no other; the rest of requirements.txt then keeps it
.venv/installed: requirements.txt requirements-factory.txt $(if $(filter-out $(TORCH_WAS),$(TORCH_INDEX)),other-torch)
	$(PYTHON) -m venv .venv
ifneq ($(TORCH_INDEX),)
	PIP_CONFIG_FILE=/dev/null PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= $(PIP) \
	    $(if $(filter-out $(TORCH_WAS),$(TORCH_INDEX)),--force-reinstall) --index-url "$(TORCH_INDEX)" torch torchvision
endif
	$(PIP) -r requirements.txt
	echo "$(TORCH_INDEX)" > .venv/torch_index
	touch $@

other-torch:

install: .venv/installed  ## .venv with requirements.txt in it

demo: .venv/installed  ## every stage small, into demo/: from nothing to a driven lap on two cores
	$(PY) collect_race_data.py $(LAPTOP) --frames 60000 --pace 0.35 --max_offset 2
	$(PY) collect_recovery_data.py $(LAPTOP) --frames 80000
	$(PY) collect_data.py $(LAPTOP) --frames 30000
	$(PY) train_encoder.py $(LAPTOP) $(SHARES) $(ENCODER) --dim 256 --scene_pca 128 --strides 2 2 2 1 --epochs 4 --steps_per_epoch 150
	$(PY) train_decoder.py $(LAPTOP) --once --newest --steps 320
	$(PY) train_predictor.py $(LAPTOP) $(SHARES) $(PREDICTOR) --hidden 256 --state 128 --epochs 3 --steps_per_epoch 700
	$(PY) train_cost_model.py $(LAPTOP) --epochs 3
	$(PY) demo_energy.py $(LAPTOP) --headless --steps 400
	$(PY) drive_mpc.py $(LAPTOP) --headless --episodes 3 --track_seed 100000 --compare random no_model expert --json "$(ROOT)/visuals/drive_mpc.json"

# the predictor learns from an expert of all paces, and from own drives with plans followed to their
# end: what its rollouts got wrong. The second own drives are of a better driver, and replace the first.
# Two processes drive half of the tracks each
DRIVEN = --data data_race paces/data_race data_recovery data
OWN_SHARES = --shares 0.12 0.18 0.3 0.1 0.3
OWN = --env fast --save_data --no_video --open_loop 0.06 --samples 64 --iterations 4

# the cost model is --fresh, because a predictor that has learned on needs another one
pretrained: ROOT = pretrained
pretrained: .venv/installed  ## four and a half hours on two cores: weights like those that come with the code, in pretrained/
	$(PY) collect_race_data.py $(LAPTOP) --frames 260000
	$(PY) collect_recovery_data.py $(LAPTOP) --frames 800000
	$(PY) collect_data.py $(LAPTOP) --frames 800000
	$(PY) collect_race_data.py --root "$(ROOT)/paces" --pace 0.65 1 --seed 1 --frames 140000
	$(PY) train_encoder.py $(LAPTOP) $(SHARES) $(ENCODER) --dim 512 --strides 1 2 2 2 --mirror 0.5 --congeal 25 --pred 30 --cov 2 --epochs 8 --steps_per_epoch 500
	$(PY) train_decoder.py $(LAPTOP) --once --newest --steps 2000 --autoencoder_steps 2000
	$(PY) train_predictor.py $(LAPTOP) $(DRIVEN) --shares 0.17 0.26 0.43 0.14 $(PREDICTOR) --hidden 384 --epochs 4 --steps_per_epoch 3000
	$(PY) train_cost_model.py $(LAPTOP) --fresh
	$(PY) drive_mpc.py $(LAPTOP) $(OWN) --episodes 60 --track_seed 10000000 & first=$$!; \
	    $(PY) drive_mpc.py $(LAPTOP) $(OWN) --episodes 60 --track_seed 10000060 && wait $$first
	$(PY) train_predictor.py $(LAPTOP) $(DRIVEN) data_mpc $(OWN_SHARES) $(PREDICTOR) --hidden 384 --epochs 6 --steps_per_epoch 3000
	$(PY) train_cost_model.py $(LAPTOP) --fresh
	mkdir -p "$(ROOT)/own"
	$(PY) drive_mpc.py --root "$(ROOT)/own" --models "$(ROOT)/models" $(OWN) --episodes 120 --track_seed 10000200 & first=$$!; \
	    $(PY) drive_mpc.py --root "$(ROOT)/own" --models "$(ROOT)/models" $(OWN) --episodes 120 --track_seed 10000320 && wait $$first
	$(PY) train_predictor.py $(LAPTOP) $(DRIVEN) own/data_mpc $(OWN_SHARES) $(PREDICTOR) --hidden 384 --epochs 12 --steps_per_epoch 3000
	$(PY) train_cost_model.py $(LAPTOP) --fresh
	$(PY) collect_data.py --root "$(ROOT)/long" --seed 1 --frames 400000 --steps 1000
	$(PY) train_dream.py $(LAPTOP) --data data_race data_recovery data long/data --shares 0.35 0.45 0.07 0.13 --batch_size 30 --epochs 8 --steps_per_epoch 1000

test: .venv/installed  ## the tests, under ten minutes on two cores
	$(PY) -m ruff format --check . && $(PY) -m ruff check .
	$(PY) -m pytest

test-all: .venv/installed  ## the slow ones too
	$(PY) -m pytest -m ''

all: .venv/installed  ## the whole plan at full scale: 5.8 million frames, a GPU and patience
	$(PY) collect_race_data.py
	$(PY) collect_recovery_data.py
	$(PY) collect_data.py
	$(PY) train_encoder.py --epochs 50 --batch_size 256
	$(PY) train_decoder.py --once --newest
	$(PY) train_predictor.py --epochs 50
	$(PY) train_cost_model.py
	$(PY) collect_data.py --frames 1900000 --steps 1000
	$(PY) train_dream.py --epochs 20 --steps_per_epoch 5000
	$(PY) evaluate.py
	$(PY) demo_energy.py --headless
	$(PY) drive_mpc.py --headless --episodes 100 --track_seed 100000 --compare random no_model untrained expert --json visuals/drive_mpc.json

.PHONY: other-torch help install demo pretrained test test-all all

# Everything runs in .venv, which is made on first use, or with PYTHON=... in an environment of your own, as it is.
# make results METHOD=lcft DATA=toy runs a part of it.
VENV := .venv
READY := $(if $(PYTHON),,$(VENV)/ready)
PYTHON ?= $(VENV)/bin/python
.PHONY: demo test bench bench-gpu backbone results

demo: $(READY)
	$(PYTHON) curec.py --data toy --backbone tiny --align-steps 60 --run runs/demo --overwrite

test: $(addsuffix -test,$(READY))
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 tests

bench-gpu: $(addsuffix -bench,$(READY))
	$(PYTHON) tests/bench/gpu.py

bench: $(addsuffix -bench,$(READY))
	$(PYTHON) tests/bench/bench.py

backbone: $(READY)
	$(PYTHON) -m common.make_tiny --out common/tiny

results: $(READY)
	$(PYTHON) -m common.results --method "$(METHOD)" --data "$(DATA)"

$(VENV)/bin/python:
	python3 -m venv $(VENV)

$(VENV)/ready: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/ready-test: requirements-dev.txt $(VENV)/ready
	$(VENV)/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

$(VENV)/ready-bench: requirements-bench.txt $(VENV)/ready-test
	$(VENV)/bin/python -m pip install -q -r requirements-bench.txt
	$(VENV)/bin/python -m pip install -q --no-deps deepctr-torch==0.3.0
	touch $@

# OFL-SAM2 for MONAI. `make` lists the targets.
#
# Variables, given as `make <target> NAME=value`:
#   PYTHON       interpreter for the environment: python 3.10, 3.11 (tested) or 3.12
#   TORCH_INDEX  extra package index for torch, for example PyTorch's CPU builds:
#                https://download.pytorch.org/whl/cpu
#   DATA         `download` lets the demo fetch its data
#   WORKERS      test processes (default: one a core, at most 4)
#   ARGS         further arguments for pytest, for example ARGS="-k volume", or for the server
#   STUDIES      what `make serve` serves: a folder of images, or the URL of a DICOMweb server
#   PORT         where it listens on 127.0.0.1
# OFL_SAM2_DATA (environment): folder with real volumes; by default ../shared/data where it exists.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS := build-constraints.txt
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.10; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
WORKERS ?= logical --maxprocesses 4
PORT ?= 8000
OFL_SAM2_DATA ?= $(if $(wildcard ../shared/data/.),$(CURDIR)/../shared/data)
ifneq ($(OFL_SAM2_DATA),)
export OFL_SAM2_DATA
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test e2e campaign lint bench bundle clean

help: ## List the targets
	@sed -n 's/^\([a-z0-9]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: $(STAMP) ## Create .venv with every dependency and this package (about 3 minutes; then instant)

demo: $(STAMP) ## Learn from a few labelled volumes, segment the rest, write a report to demo_output/
	$(BIN)/python -m ofl_sam2 demo --output demo_output $(if $(filter download,$(DATA)),--download)

serve: $(STAMP) ## Start the annotation server for 3D Slicer and OHIF: make serve STUDIES=path/to/images
	@test -n "$(STUDIES)" || { echo "Which images? Run: make serve STUDIES=/path/to/images" >&2; exit 1; }
	@case "$(STUDIES)" in http*://*) ;; *) test -d "$(STUDIES)" || { echo "$(STUDIES) is no folder." >&2; exit 1; };; esac
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)/apps/ofl_sam2" $(BIN)/python -m monailabel.main start_server \
		--app apps/ofl_sam2 --studies "$(STUDIES)" --host 127.0.0.1 --port $(PORT) --uvicorn_app server.app:app $(ARGS)

test: $(STAMP) ## Run the test suite, doctests included
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

e2e: $(STAMP) ## Drive OHIF in Chromium on Orthanc (minutes; on Debian as root, installs what is missing)
	@tools/e2e.sh $(BIN)/python -m pytest -m e2e tests/e2e $(ARGS)

campaign: $(STAMP) ## Run the long tests: crash campaigns, load, real data (minutes to hours)
	@$(BIN)/python -m pytest -m campaign $(ARGS)

lint: $(STAMP) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## Run the benchmarks; results go to benchmarks/results/ (label_efficiency.py takes a day: by hand)
	@set -e; for script in $(filter-out benchmarks/label_efficiency.py, $(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script; done

bundle: $(STAMP) ## Write the MONAI bundle to dist/ as a zip that `monai.bundle download` takes
	$(BIN)/python tools/bundle.py

clean: ## Remove caches, build products and demo_output/ (.venv stays)
	rm -rf demo_output build dist bundle/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find bundle apps tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# pip before 25.3 reads PIP_CONSTRAINT while it builds sam2, later versions read PIP_BUILD_CONSTRAINT: set both.
$(STAMP): requirements.txt requirements-dev.txt $(CONSTRAINTS) pyproject.toml | $(BIN)/pip
	SAM2_BUILD_CUDA=0 PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS) \
		$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

$(BIN)/pip:
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' || { \
		echo "No Python 3.10, 3.11 or 3.12 found. Install one (3.11 is tested) and run: make setup PYTHON=/path/to/python" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot create environments: its venv or ensurepip module is missing." >&2; \
		echo "On Debian and Ubuntu: apt-get install python3-venv. Then run make setup again." >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

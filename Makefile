# GroundThink. `make` lists the commands. Works with GNU make 3.81 (macOS) and later.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# Modules live at the root and notebooks one folder below: every kernel finds them through this.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# How long an idle OpenMP thread spins before it sleeps. At GNU's default of 300,000 turns one busy neighbour on a two-core
# machine makes training 19 times slower (1.31 s a step instead of 0.07); at 10,000 4 times, and nothing is lost alone.
export GOMP_SPINCOUNT ?= 10000

.PHONY: help report test test-gpu lab bench format clean
.DEFAULT_GOAL := help

help:
	@echo "make report   run the notebooks (full on a CUDA GPU, else smoke) and write reports/index.html"
	@echo "make test     lint, tests, and every notebook in the smoke profile"
	@echo "make test-gpu the tests that need a CUDA GPU; their outcome goes to results/gpu_tests.jsonl"
	@echo "make lab      JupyterLab on notebooks/00_start_here.ipynb (as root: LAB_ARGS=--allow-root)"
	@echo "make bench    time the delta rule on this machine: on the CPU and, where there is one, on the GPU"
	@echo "make format   fix what ruff can fix"
	@echo "make clean    remove reports and caches (keeps $(VENV), runs/ and results/)"
	@echo "Some notebooks only: make report NOTEBOOKS=\"00 02\".  Another Python: rm -r $(VENV), then make report PYTHON=python3.12"

# The stamp is written last, so an install that was cut off is taken up again. All that pip says is in the log; what is
# shown is one line that moves. `sh` has no pipefail: pip's status travels through the pipe as its last line.
$(VENV)/.stamp: requirements.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1 || ! $(BIN)/python -c '$(SUPPORTED)'; then \
	  for python in $(PYTHON) python3.13 python3.12 python3.11; do \
	    if $$python -c '$(SUPPORTED)' >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "GroundThink needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Install one of them, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "installing requirements.txt into $(VENV) (a few minutes the first time)"
	@{ $(BIN)/python -m pip install --disable-pip-version-check --no-input -r requirements.txt 2>&1; echo "status $$?"; } \
	| tee $(VENV)/install.log | { \
	  count=0; \
	  while IFS= read -r line; do \
	    case $$line in \
	      Collecting*) count=$$((count + 1)); text="$$count packages: $${line#Collecting }" ;; \
	      Installing*) text="unpacking $$count packages" ;; \
	      ERROR*) printf '\n%s\n' "$$line" >&2; continue ;; \
	      status*) printf '\n'; status=$${line#status }; continue ;; \
	      *) continue ;; \
	    esac; \
	    if [ -t 1 ]; then printf '\r  %-70.70s' "$$text"; fi; \
	  done; \
	  if [ "$$status" != 0 ]; then echo "pip failed; its words are in $(VENV)/install.log" >&2; fi; \
	  exit $$status; \
	}
	@touch $@

report: $(VENV)/.stamp
	@$(BIN)/python report.py $(NOTEBOOKS)

# tests/test_notebooks.py runs every notebook through nbval, so pytest is all there is to call.
test: $(VENV)/.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest

# CI has no GPU: what these found is a line of results/gpu_tests.jsonl, with revision, device and versions.
test-gpu: $(VENV)/.stamp
	$(BIN)/python -m pytest -m gpu --record=results/gpu_tests.jsonl

# The server listens on this machine alone and asks for the token that is in the address it prints.
lab: $(VENV)/.stamp
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/python -m jupyter lab --ip=127.0.0.1 $(LAB_ARGS) notebooks/00_start_here.ipynb

bench: $(VENV)/.stamp
	$(BIN)/python bench_cpu.py
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  echo; $(BIN)/python bench_gpu.py; \
	else \
	  echo; echo "no CUDA GPU: bench_gpu.py, which measures the Triton kernels beside their peers, is left out"; \
	fi

format: $(VENV)/.stamp
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf reports .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__
	rm -rf notebooks/.ipynb_checkpoints .ipynb_checkpoints

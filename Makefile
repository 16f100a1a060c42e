PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help venv demo test test-all lint format bench clean

help:
	@echo "make demo    train a small ConMamba on a synthetic corpus and score it (15 minutes on 2 cores)"
	@echo "make test    run the test-suite (under 10 minutes on 2 cores)     make test-all  slow tests too"
	@echo "make venv    create $(VENV) with everything the other commands need"
	@echo "make lint    ruff and mypy: lint, format check, types             make format    ruff: rewrite"
	@echo "make bench   speed of scan, encoders, decoding, CTC search and preparation, on an idle machine;"
	@echo "             about 12 minutes, with reports in benchmarks/reports"

venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else "Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v)'
	@echo "Installing PyTorch, SpeechBrain and the rest into $(VENV): some minutes, 5 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install --progress-bar off -qq -e '.[dev,demo,media,wandb,tensorboard]'
	@# kenlm is compiled on installation: where no compiler is at hand everything but the n-gram works.
	-@$(BIN)/python -m pip install --progress-bar off -qq -e '.[ngram]' 2>/dev/null || echo "kenlm was not installed (no compiler?): n-gram decoding stays off"
	@touch $@

demo: venv
	$(BIN)/python -m tools.demo

test: venv
	$(BIN)/python -m pytest -m "not slow"

test-all: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each part with its minutes on two idle cores.
BENCH := "scan 2 --report" "encoder 4 --report" "decode 3 --report" "ctc_search 1 --report" "streaming 1 --report" "prepare 1 --report"

bench: venv
	@set -- $(BENCH); count=$$#; left=0; parts=; \
	for part; do set -- $$part; left=$$((left + $$2)); parts="$$parts, $$1 $$2"; done; \
	echo "make bench takes about $$left minutes on two idle cores: $${parts#, }"; number=0; \
	for part in $(BENCH); do \
		set -- $$part; name=$$1; minutes=$$2; shift 2; begun=$$(date +%s); number=$$((number + 1)); \
		echo "== $$number of $$count: $$name, about $$minutes min (python -m benchmarks.bench_$$name $$*)"; \
		$(BIN)/python -m benchmarks.bench_$$name "$$@" || exit; \
		left=$$((left - minutes)); \
		echo "== $$name took $$(( $$(date +%s) - begun )) s; about $$left min are left"; \
	done

clean:
	rm -rf $(VENV) results/demo

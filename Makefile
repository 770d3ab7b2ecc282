# make train   train on the built-in coins:      make train CONFIG=my.yaml ARGS='--model.base_channels 16'
# make test    lint, types and the whole test suite
# make test-fast   what needs no Ray, MLflow or server, in about two minutes
# make newcomer   a fresh clone with an empty home: make train, make test; the log goes to build/newcomer.  BUSY=2: beside two busy processes
# make test-package   the wheel, a checkout and an editable installation, each in an environment of its own; the log goes to build/package
# make stress SEED=1   30 short trainings beside busy processes, with a slow tracking server and clocks that jump; ends in JSON
# make stream-faults SEED=1   40 generations are appended while a training follows, and its processes and S3 break; logs go to build/stream-faults
# make bench-attacks   seconds and megabytes of what strangers can send
# make shortage   every command on machines that are short of disk, rights, memory or descriptors; root alone can
# make stream-demo   coins arrive in a folder, a training follows, its score climbs and a server takes it over: two minutes
# make test-hashes   requirements-cluster.txt against the index, and an installation by it
# make test-faults   every fault by itself over real Ray nodes
# make test-next   the GPU launches of run.kernels: next, interpreted, built and counted
# make test-pages   every code block of the pages, and the examples
# make test-browser  the server's page in Chromium (Debian: apt-get install chromium)
# make screenshots   README, docs, MLflow, the server's page and a terminal as pictures, by Chromium (Debian: apt-get install chromium)
# make test-readers   webdataset, Hugging Face datasets, Ray Data and Energon read packed coins, in an environment of its own (.venv-readers)
# make test-oldest   the lowest version of Ray in pyproject.toml, in an environment of its own (.venv-oldest); another: ARGS=2.59.0
# make chaos   random faults for 15 minutes:      make chaos ARGS='--minutes 5 --seed 1'; the report goes to docs/chaos.md
# make docs    the site of docs/, into build/site
# make setup   the virtual environment alone
# make compare-smoke   two networks beside one another, two seeds, at toy size
# make bench   the kernels and the network beside others, in an environment of its own (.venv-bench-kernels)
# make bench-data   the stream beside other readers, in an environment of its own (.venv-bench)
# make bench-jobs   Ray Train and the trainer beside a bare loop
# make bench-serve  the server under wrk, which must be installed (Debian: apt-get install wrk)
PYTHON ?= python3
CONFIG ?= jobs/configs/coins.yaml
ARGS ?=
BUSY ?= 0

SHELL := bash
.SHELLFLAGS := -o pipefail -c
VENV := .venv
# what trainings need is there, and what tests do
TRAINING := $(VENV)/.training
INSTALLED := $(VENV)/.installed

.PHONY: train test test-fast stress stream-faults bench-attacks shortage stream-demo test-hashes newcomer test-package test-faults test-next test-pages test-readers test-oldest chaos compare-smoke docs test-browser screenshots lint setup lock bench bench-data bench-jobs bench-serve clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@grep -E '^# make' Makefile | cut -c3-

setup: $(INSTALLED)

# the stamp is written last, so an installation cut short is done again. requirements.lock is read as constraints:
# the cuda packages it pins are installed only where pip picks torch's cuda build.
$(TRAINING): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"DeepSkip needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12")'
	@echo "setting up $(VENV) (a minute or two, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(call install,train)
	@touch $@

$(INSTALLED): $(TRAINING)
	@echo "setting up what the tests need (about a minute, once)"
	@$(call install,test)
	@touch $@

# uv takes two thirds of pip's time, and compiles what it installs, without which every process of Ray imports twice as slowly;
# where it is not to be had, or does not reach what pip does, pip installs
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-input
UV = UV_FIND_LINKS="$$PIP_FIND_LINKS" UV_COMPILE_BYTECODE=1 $(VENV)/bin/uv pip install --python $(VENV)/bin/python
WHAT = --constraint requirements.lock --editable '.[$(1)]'
# of what uv says, the large packages as they come and the three steps
SHOWN = sed -un -e '/^Downloading\|^Prepared\|^Installed\|^Bytecode/s/^/  /p'
install = ($(PIP) uv 2>$(VENV)/pip.log && $(UV) $(WHAT) 2>&1 | tee $(VENV)/uv.log | $(SHOWN)) || \
  (echo "uv cannot (see $(VENV)/uv.log), pip installs: minutes without a word" && $(PIP) $(WHAT))

train: $(TRAINING)
	@$(VENV)/bin/deepskip train --config $(CONFIG) $(ARGS)

# Two processes take a module at a time, so that its fixtures are made once; what takes longest comes first. Each has one thread:
# two that have two each wait for one another for half as long again. xdist's loadgroup does not group with pytest 9.2.
TWO := -n 2 --dist loadscope --no-loadscope-reorder
# what starts Ray's nodes waits much, so it goes beside its like, the longest first
RAY := $(addprefix tests/,$(addsuffix .py,jobs/test_end_to_end cluster/test_faults \
	$(addprefix jobs/test_,stream_faults preemption compare) cluster/test_local jobs/prediction/test_resuming))
LONGEST := $(addprefix tests/,test_doc_blocks.py kernels jobs deepskip attacks data_shards)
FOLDERS := $(LONGEST) $(filter-out $(LONGEST) tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)) $(wildcard tests/test_*.py))

test: setup lint
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(TWO) $(addprefix --ignore=,$(RAY)) $(FOLDERS)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(TWO) $(RAY)

test-fast: setup
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(TWO) -m 'not faults and not browser and not slow' \
	  tests/data_shards tests/deepskip tests/kernels tests/test_imports.py tests/jobs/test_settings.py tests/jobs/test_runs.py

stream-faults: setup
	@$(VENV)/bin/python -m tests.jobs.stream_faults $(if $(SEED),--seed $(SEED)) $(ARGS)

stress: setup
	@$(VENV)/bin/python -m tests.stress $(if $(SEED),--seed $(SEED)) $(ARGS)

stream-demo: setup
	@$(VENV)/bin/python -m tests.stream_demo $(ARGS)

bench-attacks: setup
	@$(VENV)/bin/python -m tests.attacks.bench $(ARGS)

shortage: setup
	@$(VENV)/bin/python -m tests.attacks.shortage --out build/shortage.md $(ARGS)

newcomer:
	@tests/newcomer.sh build/newcomer $(BUSY)

test-package:
	@tests/package.sh build/package

test-faults: setup
	@$(VENV)/bin/python -m pytest -m faults tests/cluster

test-next: setup
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(TWO) -m new_launches --timeout=1200 tests/kernels

test-pages: setup
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(TWO) -m pages tests/test_examples.py tests/test_doc_blocks.py

test-readers:
	@$(PYTHON) -m venv .venv-readers
	@.venv-readers/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r tests/readers/requirements.txt
	@.venv-readers/bin/python -m pytest --noconftest -m readers tests/readers $(ARGS)

test-oldest:
	@PYTHON=$(PYTHON) tests/oldest.sh $(ARGS)

test-browser: setup
	@$(VENV)/bin/python -m pytest -m browser tests/jobs

screenshots: setup
	@$(VENV)/bin/python -m tests.screenshots build/screenshots $(ARGS)

chaos: setup
	@$(VENV)/bin/python -m tests.cluster.chaos $(ARGS)

compare-smoke: setup
	@rm -rf build/compare-smoke
	@$(VENV)/bin/deepskip pack coins --out build/compare-smoke/coins --train 16 --val 4 --test 4
	@$(VENV)/bin/deepskip compare --config jobs/configs/compare.yaml --categories '{coins: jobs/configs/coins.yaml}' \
	  --out build/compare-smoke/out --seeds '[0, 1]' --only '[deepskip, unet]' --workers 2 --settings \
	  '{data: {path: build/compare-smoke/coins}, optim: {steps: 2}, run: {tracking_uri: none}, cluster: {gpu: false}}' $(ARGS)

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

lint: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@mkdir -p build/types/deepskip && ln -sfn $(addprefix $(CURDIR)/,cluster data_shards jobs kernels $(wildcard deepskip/*)) build/types/deepskip/
	@$(VENV)/bin/mypy
	@$(VENV)/bin/python -m tests.words README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md docs cluster data_shards deepskip jobs kernels tests
	@$(VENV)/bin/bandit -q -r -c pyproject.toml cluster data_shards deepskip jobs kernels

# pins what is new and keeps the other pins; `make lock UPGRADE=--upgrade` pins everything anew. The local version of a cpu
# build is no version that others can install.
lock:
	@$(PYTHON) -m pip install --quiet uv
	@cp requirements.lock requirements.lock.new
	@$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --extra test --no-annotate --no-header $(UPGRADE) \
	  --output-file requirements.lock.new pyproject.toml
	@(grep '^# Every version' requirements.lock; sed 's/+cpu//' requirements.lock.new) > requirements.lock.newer
	@mv requirements.lock.newer requirements.lock && rm requirements.lock.new

test-hashes: setup
	@tests/hashes.sh check

bench:
	@$(PYTHON) -m venv .venv-bench-kernels
	@.venv-bench-kernels/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r kernels/bench/requirements.txt
	@.venv-bench-kernels/bin/python -m deepskip.kernels.bench kernels/bench deepskip/bench $(ARGS)

bench-data:
	@$(PYTHON) -m venv .venv-bench
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-input -r data_shards/bench/requirements.txt
	@.venv-bench/bin/python -m deepskip.data_shards.bench $(ARGS)

bench-jobs: setup
	@$(VENV)/bin/python -m deepskip.jobs.bench $(ARGS)

bench-serve: setup
	@$(VENV)/bin/python -m deepskip.jobs.bench.serving $(ARGS)

clean:
	@rm -rf $(VENV) .venv-bench .venv-bench-kernels .venv-readers .venv-oldest *.egg-info

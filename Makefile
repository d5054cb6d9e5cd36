# make quickstart: set up and run the main job on this machine.   make test: set up and run the tests.
# make test-ecosystem: other libraries' loops around our model: HF Trainer, lm-eval, PEFT.
# make loss-compare BASE=REVISION: does the working tree train as BASE did, bit for bit?
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# quickstart and tests start two ranks: on the CPU, unless there are GPUs for both.
ifneq ($(filter 0 1,$(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')),)
export DS_ACCELERATOR ?= cpu
endif
# The launcher starts ranks by names found on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: quickstart test test-slurm test-hosts test-ecosystem lint loss-compare clean

quickstart: $(VENV)/installed data/quickstart/train.jsonl
	deepspeed -q --num_gpus 2 recipes/clm.py +config=quickstart
	@echo '  (in a new shell, first: source $(BIN)/activate)'

test: $(VENV)/installed-test
	python -m pytest

# A real Slurm of two nodes on this machine, built and taken down: needs root, slurmctld, slurmd, slurm-client, munge.
test-slurm: $(VENV)/installed-test
	python -m pytest -m slurm tests/cluster/test_slurm.py

# Two hosts with ssh, in network namespaces: needs root, openssh-server, openssh-client, pdsh, iproute2.
test-hosts: $(VENV)/installed-test
	python -m pytest -m hosts tests/cluster/test_hosts.py

test-ecosystem: $(VENV)/installed-test
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[ecosystem]'
	python -m pytest -m ecosystem

lint: $(VENV)/installed-test
	ruff check .
	ruff format --check .
	mypy
	codespell

loss-compare: $(VENV)/installed
	@test -n '$(BASE)' || { echo 'error: name the revision to compare with: make loss-compare BASE=main' >&2; exit 2; }
	python scripts/loss_compare.py '$(BASE)'

data/quickstart/train.jsonl: scripts/quickstart_corpus.py | $(VENV)/installed
	python scripts/quickstart_corpus.py data/quickstart

# torch comes first: the packages after it are content with the build that is there.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with make PYTHON=python3.11 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) data/quickstart runs/quickstart

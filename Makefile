# Everything a developer or a new user types. Each target sets up what it needs in .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable
HOROVOD := $(BIN)/python -m hpc_hdb.run.install_horovod

export PATH := $(CURDIR)/$(BIN):$(PATH)
# Lets mpirun start more ranks than there are cores, and as root (in a container).
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: help install horovod demo test lint bench docs clean

help:
	@echo "make install   set up .venv with hdb, torch and an MPI (5 GB the first time)"
	@echo "make horovod   build Horovod against that torch and MPI (minutes the first time, then cached)"
	@echo "make demo      train on real images: a server, two large-batch workers, a small-batch one"
	@echo "make test      the whole test suite"
	@echo "make lint      ruff and mypy"
	@echo "make bench     the benchmarks, each beside a peer"
	@echo "make docs      the documentation as a site, in site/"

install: .venv/installed

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: setup.py pyproject.toml | .venv/bin/python
	@echo "installing torch, MPI and hpc-hdb into .venv ..."
	$(INSTALL) '.[mpi]'
	@touch $@

.venv/installed-test: .venv/installed
	@echo "installing DALI and the test tools into .venv ..."
	$(INSTALL) '.[mpi,dali,horovod,test]'
	@$(HOROVOD) || echo "going on without Horovod: its tests will be skipped"
	@touch $@

.venv/installed-docs: .venv/installed
	$(INSTALL) '.[docs]'
	@touch $@

horovod: .venv/installed
	$(INSTALL) '.[horovod]'
	$(HOROVOD)

demo: install
	mpirun -n 4 hdb train digits

test: .venv/installed-test
	$(BIN)/python -m pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-test
	$(BIN)/python benchmarks/commit.py
	$(BIN)/python benchmarks/servers.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/worker_overhead.py
	$(BIN)/python benchmarks/batch_time.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/resolution_switch.py
	$(BIN)/python benchmarks/conventional.py

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv build site *.egg-info

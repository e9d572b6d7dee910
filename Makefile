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

.PHONY: soak help install horovod demo test lint bench study docs module clean

help:
	@echo "make install   set up .venv with hdb, torch and an MPI (5 GB the first time)"
	@echo "make horovod   build Horovod against that torch and MPI (minutes the first time, then cached)"
	@echo "make demo      train on real images: a server, two large-batch workers, a small-batch one"
	@echo "make test      the whole test suite"
	@echo "make soak      half an hour of training among accidents, in ASP and in BSP"
	@echo "make lint      ruff and mypy"
	@echo "make bench     the benchmarks, each beside a peer"
	@echo "make study     the accuracy of every scheme on CIFAR-10 (hours; goes on where it was)"
	@echo "make docs      the documentation as a site, in site/"
	@echo "make module PREFIX=/sw   install into /sw/hpc-hdb/VERSION, with modulefiles for it"

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

# Where this may install packages, the tests of Slurm and of modulefiles get what they need.
.venv/installed-slurm: | .venv/bin/python
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Slurm and Lmod for the tests ..."; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes \
			--no-install-recommends slurm-wlm munge libpmix-dev lmod >/dev/null && touch $@ \
			|| echo "apt did not install them: their tests will be skipped"; \
	else \
		echo "not root, or no apt: tests of Slurm and modulefiles run where both are installed"; \
	fi

# Beside .venv's own MPI, for the test of srun.
.venv/mpich: | .venv/bin/python
	@echo "installing MPICH for the tests ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --prefix $@ 'mpich>=5' \
		|| echo "going on without MPICH: its test will be skipped"

# Compiled once, not by every rank that a test starts.
.PHONY: compiled
compiled: .venv/installed-test
	@$(BIN)/python -m compileall -q hpc_hdb dali_pipelines tests

# Two files at a time, and beside them those that mostly wait: first Slurm's, which have deadlines.
WAITING = tests/test_slurm_jobs.py tests/faults/test_lock.py tests/faults/test_disks.py \
	tests/faults/test_soak.py tests/test_benchmarks.py

test: compiled .venv/installed-slurm .venv/mpich
	@$(BIN)/python -m pytest $(WAITING) >.venv/waiting-tests.log 2>&1 & waiting=$$!; \
	nice $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		$(addprefix --ignore ,$(WAITING)); others=$$?; \
	wait $$waiting; waiting=$$?; cat .venv/waiting-tests.log; exit $$((others | waiting))

soak: .venv/installed-test
	HDB_SOAK_SECONDS=1800 $(BIN)/python -m pytest -s tests/faults/test_soak.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Photographs of 224x224 pixels or more; a user brings own ones.
data/imagenette:
	@test -f ../shared/data/imagenette-224-subset.tar || \
		{ echo "bring photographs as data/imagenette/train/<class>/<image>.jpg" >&2; exit 2; }
	@mkdir -p $@.part && tar -xf ../shared/data/imagenette-224-subset.tar -C $@.part && mv $@.part $@

bench: .venv/installed-test | data/cifar10-jpeg data/imagenette
	$(BIN)/python benchmarks/commit.py
	$(BIN)/python benchmarks/servers.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/worker_overhead.py
	$(BIN)/python benchmarks/batch_time.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/shard_formats.py
	$(BIN)/python benchmarks/resolution_switch.py
	$(BIN)/python benchmarks/conventional.py
	$(BIN)/python benchmarks/fault_tolerance.py

# From the archive that developers have, or from torchvision.
data/cifar10-jpeg: | .venv/installed-test
	@if [ -f ../shared/data/cifar10-jpeg.tar.xz ]; then \
		mkdir -p $@.part && tar -xJf ../shared/data/cifar10-jpeg.tar.xz -C $@.part && mv $@.part $@; \
	else \
		$(BIN)/python benchmarks/cifar10_jpeg.py $@; \
	fi

study: .venv/installed-test | data/cifar10-jpeg
	$(BIN)/python benchmarks/accuracy/study.py --save

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict --quiet

# A versioned folder with a Python of its own, and modulefiles for Lmod and environment-modules.
# EXTRAS= leaves the MPI out, for a site whose own is loaded when this is made and used.
EXTRAS ?= mpi,dali
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' hpc_hdb/__init__.py)
HOME_OF_MODULE = $(abspath $(PREFIX))/hpc-hdb/$(VERSION)
MODULEFILE = sed -e 's|@PREFIX@|$(HOME_OF_MODULE)|' -e 's|@VERSION@|$(VERSION)|' \
	$(if $(findstring mpi,$(EXTRAS)),,-e '/@MPI@/d') -e 's| *[-;\#]* @MPI@$$||'

module:
	@test -n "$$PREFIX" || { echo "say where: make module PREFIX=/sw" >&2; exit 2; }
	@case $$PREFIX in *[!A-Za-z0-9/._+-]*) \
		echo "PREFIX=$$PREFIX: letters, digits and / . _ + - only" >&2; exit 2 ;; esac
	$(PYTHON) -m venv --clear $(HOME_OF_MODULE)
	$(HOME_OF_MODULE)/bin/python -m pip install --quiet --disable-pip-version-check '.[$(EXTRAS)]'
	mkdir -p $(PREFIX)/modulefiles/hpc-hdb
	$(MODULEFILE) slurm/modulefiles/hpc-hdb.lua >$(PREFIX)/modulefiles/hpc-hdb/$(VERSION).lua
	$(MODULEFILE) slurm/modulefiles/hpc-hdb.tcl >$(PREFIX)/modulefiles/hpc-hdb/$(VERSION)
	@echo "now: module use $(abspath $(PREFIX))/modulefiles && module load hpc-hdb"

clean:
	rm -rf .venv build site *.egg-info

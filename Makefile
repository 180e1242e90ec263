# make run         serve the demo model on this machine (CONFIG=FILE: serve what it says)
# make test        the gate: everything but long tests and those that need a GPU
#                  ENGINES=native leaves out what boots vLLM or SGLang, ENGINES=none what boots any real engine;
#                  ARGS="-k name" goes to pytest
# make test-long   what is too long for the gate
# make check       ruff and mypy --strict
# make format      let ruff rewrite the sources
# make install     into prefix=/usr/local, below DESTDIR if that is set (WITH=native: torch and transformers, too)
# make uninstall   and out of there again; a configuration that was changed stays
# make deb         build a Debian package into dist/
# make clean       remove .venv and caches here; what is in ~/.cache/flexpiped stays, the tests' engines too

PYTHON ?= python3
prefix ?= /usr/local
sysconfdir ?= /etc
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
CONSTRAINTS := etc/constraints.txt

ENGINES ?= all
WITHOUT_all :=
WITHOUT_native := and not vllm and not sglang
WITHOUT_none := and not vllm and not sglang and not engine
ifeq ($(origin WITHOUT_$(ENGINES)),undefined)
$(error ENGINES is all, native or none, not "$(ENGINES)")
endif
# Real vLLM and SGLang for the CPU, in environments of their own outside the checkout: built by the first run that needs them.
REAL := $(if $(filter all,$(ENGINES)),vllm="$$($(BIN)/python -m tests.engines.install_vllm)" && \
	sglang="$$($(BIN)/python -m tests.engines.install_sglang)" && \
	FLEXPIPED_VLLM_PYTHON="$$vllm" FLEXPIPED_SGLANG_PYTHON="$$sglang")

# Tests without an engine run in several processes; those with one in two lanes: vLLM's beside the native engine's and then
# SGLang's. With a space in the place of =, pytest would take "engines" for the folder of that name.
GATE := $(BIN)/python -m pytest -q -m "not long and not gpu $(WITHOUT_$(ENGINES))"
NO_TESTS := 5

.PHONY: run test test-long check format install uninstall deb clean

run: $(VENV)/run.stamp
	@exec $(BIN)/flexpiped $(if $(CONFIG),--config "$(CONFIG)")

test: $(VENV)/dev.stamp
	@$(GATE) --part=others -n auto --maxprocesses 4 --dist loadfile $(ARGS) || [ $$? -eq $(NO_TESTS) ]
	@$(REAL) $(GATE) --part=engines -n auto --maxprocesses 2 $(ARGS) || [ $$? -eq $(NO_TESTS) ]

test-long: $(VENV)/dev.stamp
	@$(REAL) $(BIN)/python -m pytest -q -m "long $(WITHOUT_$(ENGINES))" $(ARGS)

check: $(VENV)/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

format: $(VENV)/dev.stamp
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

install uninstall:
	@DESTDIR="$(DESTDIR)" PREFIX="$(prefix)" SYSCONFDIR="$(sysconfdir)" PYTHON="$(PYTHON)" WITH="$(WITH)" packaging/install.sh $@

deb:
	@packaging/build_deb.sh dist

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

# torch first and by its exact version: where there is no GPU, that version is offered as a CPU build.
$(VENV)/run.stamp: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch and flexpiped into $(VENV): once, a minute or two"
	@$(PIP) install "$$(grep '^torch==' $(CONSTRAINTS))"
	@$(PIP) install --editable '.[native]' --constraint $(CONSTRAINTS)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	@echo "installing what tests and checks need"
	@$(PIP) install --editable '.[native,dev]' --constraint $(CONSTRAINTS)
	@touch $@

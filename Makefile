# On a machine with Python and make, `make train`, `make demo` and `make test` do everything.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: train demo test gpu docs clean

train: .venv/.installed-hae
	$(BIN)/memopt train examples/hae_v2 --resume

# Trains for longer, then segments the test patients: about half an hour on 2 cores.
demo: .venv/.installed-hae
	$(BIN)/memopt train examples/hae_v2 --steps 1500 --out runs/demo --resume
	$(BIN)/memopt run examples/hae_v2 translate --checkpoint runs/demo --passes outer_product,inference_mode,amp

test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist worksteal

gpu: .venv/.installed-dev
	$(BIN)/python -m pytest tests/gpu

docs: .venv/.installed-docs
	$(BIN)/mkdocs build --strict

# torch first: nothing that is installed after it may then ask for another version.
.venv/.installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e ".[$*]"
	touch $@

clean:
	rm -rf .venv .tox .mypy_cache .ruff_cache .pytest_cache site

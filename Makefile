# `make quickstart` for a first result, `make test` for every test; both set up what they need.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# The set-up is repeated only when what it installs has changed.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
CORE := $(VENV)/.core-$(KEY)
DEV := $(VENV)/.dev-$(KEY)

.PHONY: help quickstart demo test check format data teacher clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

quickstart: $(CORE) ## compress the embedded teacher and write a report (about 15 minutes, no GPU)
	$(BIN)/pocketclip run recipes/emoji/quickstart.yaml
	@echo "Open $(CURDIR)/runs/quickstart/report.html"

demo: $(CORE) ## search the embedded emoji in your browser (npm fetches its runtime once)
	test -f bundles/demo/bundle.json || $(BIN)/pocketclip export recipes/emoji/teacher --to web --out bundles/demo
	$(BIN)/pocketclip serve bundles/demo

test: $(DEV) ## run every test, WORKERS files at a time (2)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(DEV) ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## put the code in its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: $(CORE) ## build the embedded shards again from their packages (needs npm and the network)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[data]'
	$(BIN)/python recipes/emoji/build_data.py

teacher: $(CORE) ## train the embedded teacher again (about two hours and a half)
	$(BIN)/pocketclip run recipes/emoji/teacher.yaml
	rm -rf recipes/emoji/teacher
	cp -r runs/emoji-teacher/export/open_clip-fp16 recipes/emoji/teacher

clean: ## remove the environment; run folders stay
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(CORE): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(DEV): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,all]'
	@touch $@ $(CORE)

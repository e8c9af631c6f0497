# The commands of a newcomer; what they do stands in tools/setup.sh. `make` alone lists them.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help setup engine run test bench soak lint packages install uninstall clean

# Slow downloads (the engine, container trees) are kept here, outside of the tree: a fresh clone need not repeat them.
ifneq ($(XDG_CACHE_HOME),)
VLLMD_DEV_CACHE ?= $(XDG_CACHE_HOME)/vllmd-dev
else
VLLMD_DEV_CACHE ?= $(HOME)/.cache/vllmd-dev
endif
ENGINES ?= $(VLLMD_DEV_CACHE)/engines
PORT ?= 8000
export VLLMD_DEV_CACHE ENGINES PORT MODEL PYTHON ENGINE_FLAGS

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo "  variables: MODEL=/path and PORT=N for run; ARGS='-k name' for test; PYTHON=P for setup"

setup: ## everything that run and test need: .venv, the engine; seconds when nothing changed
	@tools/setup.sh venv engine

engine: ## the real vLLM, in an environment of its own
	@tools/setup.sh venv engine

run: ## serve a tiny demo model with the real vLLM until Ctrl-C (MODEL=/path serves that one)
	@tools/setup.sh venv engine demo
	@exec .venv/bin/vllmd --root .local run demo

test: ## all tests (ARGS='-m unit' runs some)
	@tools/setup.sh venv engine test
	@VLLMD_TEST_ENGINES="$(ENGINES)" exec tools/test.sh $(ARGS)

# Status 5 is pytest's "none selected": ARGS may choose tests of one part only.
soak: ## the tests that take longer than make test may, and the system tests on Debian 13
	@tools/setup.sh venv engine test
	@VLLMD_TEST_ENGINES="$(ENGINES)" .venv/bin/pytest -m "soak or matrix" $(ARGS) || [ $$? -eq 5 ]
	@VLLMD_TEST_SUITE=trixie .venv/bin/pytest tests/system -m "not engine and not soak" $(ARGS) || [ $$? -eq 5 ]

bench: ## measure the figures side by side with what one would otherwise use
	@tools/setup.sh venv engine
	@VLLMD_TEST_ENGINES="$(ENGINES)" exec .venv/bin/python -m bench $(ARGS)

lint: ## ruff and mypy
	@tools/setup.sh venv
	@.venv/bin/ruff check . && .venv/bin/mypy

packages: ## dist/*.deb and *.rpm, for amd64 and arm64, reproducibly (ARGS='--arch amd64 --kind deb')
	@tools/setup.sh venv
	@.venv/bin/python -m tools.package $(ARGS)

install: ## install on this host (root): program, units, /etc/vllmd
	@tools/install.sh

uninstall: ## undo make install
	@tools/install.sh --uninstall

clean: ## remove what was made in the tree, save .venv; the cache outside of it stays
	@rm -rf .local build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

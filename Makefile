# Each target works on a fresh machine that has Python and nothing else: it makes .venv, installs, runs.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# The models here are too small to gain from threads, which wait for each other as soon as the machine has other work.
export OMP_NUM_THREADS ?= 1

.PHONY: pretrain test test-slow test-browser test-oldest lint types docs format
pretrain: $(INSTALLED)
	$(BIN)/hf-mim pretrain training/recipes/textures_mae.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -n auto --timeout 3600

# The demo and the report in a browser. PyPI has none; any Chromium or Chrome on the PATH will do.
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-browser: .venv-browser/installed
	@test -n "$(CHROMIUM)" || { echo "no Chromium here; on Debian: apt-get install chromium" >&2; exit 1; }
	.venv-browser/bin/python -m pytest -m slow --timeout 900 tests/demo/test_browser.py tests/report/test_in_browser.py tests/hub/test_card_in_browser.py

# The same fast tests with the oldest releases that setup.cfg allows.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github/workflows
	$(BIN)/hadolint Dockerfile

types: $(INSTALLED)
	$(BIN)/mypy

# The pages of docs/ and the reference from the docstrings, into site/. A dead link is an error.
docs: .venv-docs/installed
	.venv-docs/bin/python .ci/docs.py
	.venv-docs/bin/zensical build --clean --strict

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and by its exact version alone: a CPU build that is offered locally (2.13.0+cpu) is then taken.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e .[dev]
	touch $@

# Without constraints.txt: gradio takes older releases of Pillow than the other tests do.
.venv-browser/installed: setup.cfg pyproject.toml
	test -x .venv-browser/bin/python || $(PYTHON) -m venv .venv-browser
	.venv-browser/bin/python -m pip install torch==2.13.0
	.venv-browser/bin/python -m pip install -e .[browser]
	touch $@

.venv-oldest/installed: setup.cfg pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install torch==2.13.0
	.venv-oldest/bin/python -m pip install -c constraints-oldest.txt -e .[dev]
	touch $@

# The extra `docs` alone, without torch and hf_mim: the docstrings are read, not imported.
.venv-docs/installed: setup.cfg constraints.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	$(PYTHON) -c "import configparser as c; s = c.ConfigParser(); s.read('setup.cfg'); print(s['options.extras_require']['docs'])" \
	    > .venv-docs/extra_docs.txt
	.venv-docs/bin/python -m pip install -c constraints.txt -r .venv-docs/extra_docs.txt
	touch $@

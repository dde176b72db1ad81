# Every target makes .venv when it needs one, and again when setup.cfg or constraints.txt changed.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DEPENDENCIES := setup.cfg pyproject.toml constraints.txt

.PHONY: help quickstart test test-all test-min quality format docs clean distclean
.PHONY: bench bench-quality bench-speed bench-train bench-rules bench-results bench-check

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#=]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

# $(call install,EXTRA): an environment with the package, editable, and one extra.
define install
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Installing cbd_hub[$(1)] into $(VENV) (minutes the first time) ..."
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
	@touch $@
endef

$(VENV)/.installed-test: $(DEPENDENCIES)
	$(call install,test)

$(VENV)/.installed-dev: $(DEPENDENCIES) | $(VENV)/.installed-test
	$(call install,dev)

quickstart: $(VENV)/.installed-test ## build a small chain from real text and make models of sizes in between
	$(RUN) examples/quickstart.py

# Two processes of one thread each: tiny models gain nothing from more threads.
test test-all: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-test ## the quick tests (minutes)
	$(RUN) -m pytest -n 2

test-all: $(VENV)/.installed-test ## every test
	$(RUN) -m pytest -n 2 -m ""

# An environment of its own, with the declared lower bound of everything.
MIN := .venv-min
$(MIN)/.installed: $(DEPENDENCIES) .ci/min_constraints.py
	@test -x $(MIN)/bin/python || $(PYTHON) -m venv $(MIN)
	$(MIN)/bin/python .ci/min_constraints.py test > $(MIN)/constraints.txt
	$(MIN)/bin/python -m pip install -qq --disable-pip-version-check -c $(MIN)/constraints.txt -e '.[test]'
	@touch $@

test-min: export OMP_NUM_THREADS = 1
test-min: $(MIN)/.installed ## the quick tests with the oldest dependencies that setup.cfg allows, in .venv-min
	$(MIN)/bin/python -m pytest -n 2

quality: $(VENV)/.installed-dev ## format, lint, types, documentation coverage
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) .ci/check_docs.py cbd_hub

format: $(VENV)/.installed-dev ## let ruff format and mend what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Each writes its figures, tables and plots into docs/results; bench-results makes docs/results.md of them.
bench-quality: $(VENV)/.installed-test ## quality of every method at every size (hours)
	$(RUN) benchmarks/quality.py

bench-speed: $(VENV)/.installed-test ## time and memory of from_chain
	$(RUN) benchmarks/speed.py
	$(RUN) benchmarks/growth.py

bench-train: $(VENV)/.installed-test ## time and memory of training
	$(RUN) benchmarks/losses.py
	$(RUN) benchmarks/train.py
	$(RUN) benchmarks/train_scaling.py

bench-rules: $(VENV)/.installed-test ## the rule of interpolation and of alignment
	$(RUN) benchmarks/rules.py
	$(RUN) benchmarks/align.py

bench: bench-train bench-speed bench-rules bench-quality bench-results ## all benchmarks, one after another (hours)
bench-results: $(VENV)/.installed-test ## write docs/results.md from the figures
	$(RUN) benchmarks/results.py

bench-check: $(VENV)/.installed-test ## whether docs and README say what the figures in docs/results say
	$(RUN) benchmarks/results.py --check

$(VENV)/.installed-docs: docs/requirements.txt | $(VENV)/.installed-test
	@echo "Installing docs/requirements.txt into $(VENV) ..."
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -r docs/requirements.txt
	@touch $@

docs: $(VENV)/.installed-docs ## check the links of README.md and docs/, and build the site into site/
	$(RUN) .ci/check_links.py README.md CONTRIBUTING.md CHANGELOG.md docs examples
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean: ## remove caches and outputs
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache quickstart-output
	find . \( -path ./$(VENV) -o -path ./$(MIN) \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environments
	rm -rf $(VENV) $(MIN)

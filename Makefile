# Every target makes .venv when it needs one, and again when setup.cfg or constraints.txt changed.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
DEPENDENCIES := setup.cfg pyproject.toml constraints.txt

.PHONY: help quickstart test test-all test-min quality format docs clean distclean
.PHONY: bench bench-quality bench-speed bench-train bench-rules bench-results bench-check

help:
	@echo "quickstart  build a small chain from real text and make models of sizes in between"
	@echo "test        the quick tests (minutes)"
	@echo "test-all    every test"
	@echo "quality     format, lint, types, documentation coverage"
	@echo "format      let ruff format and mend what it can"
	@echo "bench       the benchmarks, one after another (hours); bench-quality, -speed, -train, -rules: some of them"
	@echo "bench-check whether docs and README say what the figures in docs/results say"
	@echo "docs        check the links of README.md and docs/, and build the site into site/"
	@echo "test-min    the quick tests with the oldest dependencies that setup.cfg allows, in .venv-min"
	@echo "clean       remove caches and outputs (distclean: .venv as well)"

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

quickstart: $(VENV)/.installed-test
	$(RUN) examples/quickstart.py

# Two processes of one thread each: tiny models gain nothing from more threads.
test test-all: export OMP_NUM_THREADS = 1
test: $(VENV)/.installed-test
	$(RUN) -m pytest -n 2

test-all: $(VENV)/.installed-test
	$(RUN) -m pytest -n 2 -m ""

# An environment of its own, with the declared lower bound of everything.
MIN := .venv-min
$(MIN)/.installed: $(DEPENDENCIES) .ci/min_constraints.py
	@test -x $(MIN)/bin/python || $(PYTHON) -m venv $(MIN)
	$(MIN)/bin/python .ci/min_constraints.py test > $(MIN)/constraints.txt
	$(MIN)/bin/python -m pip install -qq --disable-pip-version-check -c $(MIN)/constraints.txt -e '.[test]'
	@touch $@

test-min: export OMP_NUM_THREADS = 1
test-min: $(MIN)/.installed
	$(MIN)/bin/python -m pytest -n 2

quality: $(VENV)/.installed-dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) .ci/check_docs.py cbd_hub

format: $(VENV)/.installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Each writes its figures, tables and plots into docs/results; bench-results makes docs/results.md of them.
bench-quality: $(VENV)/.installed-test
	$(RUN) benchmarks/quality.py

bench-speed: $(VENV)/.installed-test
	$(RUN) benchmarks/speed.py
	$(RUN) benchmarks/growth.py

bench-train: $(VENV)/.installed-test
	$(RUN) benchmarks/losses.py
	$(RUN) benchmarks/train.py
	$(RUN) benchmarks/train_scaling.py

bench-rules: $(VENV)/.installed-test
	$(RUN) benchmarks/rules.py
	$(RUN) benchmarks/align.py

bench: bench-train bench-speed bench-rules bench-quality bench-results

bench-results: $(VENV)/.installed-test
	$(RUN) benchmarks/results.py

bench-check: $(VENV)/.installed-test
	$(RUN) benchmarks/results.py --check

$(VENV)/.installed-docs: docs/requirements.txt | $(VENV)/.installed-test
	@echo "Installing docs/requirements.txt into $(VENV) ..."
	@$(RUN) -m pip install -qq --disable-pip-version-check -c constraints.txt -r docs/requirements.txt
	@touch $@

docs: $(VENV)/.installed-docs
	$(RUN) .ci/check_links.py README.md CONTRIBUTING.md CHANGELOG.md docs examples
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache quickstart-output
	find . \( -path ./$(VENV) -o -path ./$(MIN) \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(MIN)

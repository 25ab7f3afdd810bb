PY ?= python3
BIN := .venv/bin
MANIFEST ?= demo/cohort/manifest.csv
# uv does not read pip's configuration; hand it the folder of local wheels, where pip has one
export UV_FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PY) -m pip config get global.find-links 2>/dev/null))

.PHONY: demo test lint faults bench bench-brainage bench-paper-smoke docs-check ui preprocess-extra browser clean

demo: .venv/.installed
	$(BIN)/python -m emoe_med.brainage demo

test: .venv/.installed
	$(BIN)/python -m pytest -m "not faults" -n auto --maxprocesses 4 --dist loadfile

faults: .venv/.installed
	$(BIN)/python -m pytest -m faults

lint: .venv/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/ty check emoe_med

bench: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/moe.py

bench-brainage: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/brainage.py --manifest $(MANIFEST)

# every table of the papers on data at hand, in minutes each; PAPER_DATA holds cifar10, tiny_imagenet and ixi (docs/pipelines.md).
# Fails at the end where a twin failed, or does not beat guessing.
PAPER_DATA ?= $(EMOE_MED_TEST_DATA)
bench-paper-smoke: .venv/.installed
	@bad=; for file in pipelines/*_smoke.yaml; do twin=$$(basename $$file .yaml); \
	  $(BIN)/python -m emoe_med.pipeline run $$file $(if $(PAPER_DATA),--data-root $(PAPER_DATA)) --out runs/smoke --jobs 2 \
	    && ! grep -q "PLUMBING ONLY" runs/smoke/$$twin/table.md || bad="$$bad $$twin"; done; \
	test -z "$$bad" || { echo "failed, or no better than guessing:$$bad"; exit 1; }

# the commands of the documentation, run for real on drawn heads and digits
docs-check: .venv/.installed
	$(BIN)/python -m pytest -m faults tests/test_docs.py

ui: .venv/.installed
	$(BIN)/python -m emoe_med.brainage ui --out demo/runs

# skull strip and bias field for `preprocess`: 310 MB; the constraint keeps torch as it is
preprocess-extra: .venv/.installed
	$(BIN)/uv pip install -q --python $(BIN)/python -c requirements.lock -r requirements-preprocess.lock \
	  || $(BIN)/python -m pip install -q -c requirements.lock -r requirements-preprocess.lock

# what the test of the map viewer looks through (Debian's package, asks for root); without a browser it is skipped
browser:
	command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; }

clean:
	rm -rf .venv demo

.venv/.installed: requirements.lock pyproject.toml
	$(PY) -m venv .venv
	$(BIN)/python -m pip install -q uv==0.13.9 \
	  && $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.lock \
	  || $(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

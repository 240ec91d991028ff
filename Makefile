# make venv: a virtual environment in .venv with everything installed; make demo: that and one picture;
# make tiny: trains the embedded family from nothing into models/tiny, on from where it stopped;
# make test: the tests; make lint: style and spelling.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := outputs/demo

.PHONY: venv demo tiny test lint clean

venv: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $(STAMP)

demo: venv
	$(BIN)/python inference/test_t2i.py --preset tiny-wide --output_dir $(DEMO) \
		--prompt "a large red lighthouse on the left, by the sea, a dusk sky with a low sun"

tiny: venv
	$(BIN)/python train/make_tiny.py

test: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

clean:
	rm -rf .venv outputs

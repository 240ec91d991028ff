# make demo: a virtual environment in .venv with requirements.txt installed, and one picture;
# make app: the page in the browser, at http://127.0.0.1:7860;
# make venv: what tests and the drawn world need in it, too; make test: the tests; make lint: style, spelling;
# make tiny: trains the embedded family from nothing into models/tiny, on from where it stopped.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
STAMP := .venv/.installed
APP := .venv/.app
DEMO := outputs/demo

.PHONY: venv app demo tiny test lint clean

venv: $(STAMP)

$(READY): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt
	touch $(READY)

$(STAMP): $(READY) requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $(STAMP)

$(APP): $(READY)
	$(BIN)/pip install --quiet -e ".[app]"
	touch $(APP)

app: $(APP)
	$(BIN)/python inference/app.py

demo: $(READY)
	$(BIN)/python inference/test_t2i.py --preset tiny --output_dir $(DEMO) \
		--prompt "a large pink tree on green hills on a day with a clear bright sky, on the left"

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

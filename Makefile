# make venv: a virtual environment in .venv with everything installed; make demo: that and one picture;
# make test: that and the tests; make lint: style and spelling.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := outputs/demo

.PHONY: venv demo test lint clean

venv: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $(STAMP)

demo: venv
	$(BIN)/python models/random_family.py $(DEMO)/models
	$(BIN)/python inference/test_t2i.py --config_c $(DEMO)/models/stage_c.yaml --config_b $(DEMO)/models/stage_b.yaml \
		--pretrained_path $(DEMO)/models/ultrapixel_t2i.safetensors --height 512 --width 512 --output_dir $(DEMO) \
		--prompt "a lighthouse on a cliff at dusk, waves below"

test: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

clean:
	rm -rf .venv outputs

# make venv: a virtual environment in .venv with everything installed; make demo: that and one picture;
# make tiny: trains the embedded family from nothing, on from where it stopped; make test: the tests;
# make lint: style and spelling.
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
	$(BIN)/python inference/test_t2i.py --preset tiny --output_dir $(DEMO) \
		--prompt "a large red lighthouse on the left, by the sea, a dusk sky with a low sun"

tiny: venv
	$(BIN)/python train/train_text_encoder.py configs/tiny/train_text_encoder.yaml
	$(BIN)/python train/train_recogniser.py configs/tiny/train_recogniser.yaml
	$(BIN)/python train/train_recogniser.py configs/tiny/train_image_encoder.yaml
	$(BIN)/python train/train_stage_a.py configs/tiny/train_stage_a.yaml
	$(BIN)/python train/train_stage_a.py configs/tiny/train_stage_a_finish.yaml
	$(BIN)/python train/train_previewer.py configs/tiny/train_encoder.yaml
	$(BIN)/python train/train_stage_b.py configs/tiny/train_stage_b.yaml
	$(BIN)/python train/train_stage_b.py configs/tiny/train_stage_b_finish.yaml
	$(BIN)/python train/train_previewer.py configs/tiny/train_previewer.yaml
	$(BIN)/python train/train_stage_c.py configs/tiny/train_stage_c.yaml
	$(BIN)/python train/train_stage_c.py configs/tiny/train_stage_c_finish.yaml
	$(BIN)/python train/train_t2i.py configs/tiny/train_t2i.yaml
	$(BIN)/python train/train_personalized.py configs/tiny/train_personalized.yaml
	$(BIN)/python train/train_ultrapixel_control.py configs/tiny/train_control.yaml

test: venv
	$(BIN)/python -m pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

clean:
	rm -rf .venv outputs

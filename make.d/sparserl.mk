# make bench-sparserl: sparse and adapter methods under reinforcement learning. Included by the Makefile, which sets VENV
# and PYTHON. A suite that was interrupted goes on where it was.

.PHONY: bench-sparserl test-sparserl

bench-sparserl: $(VENV)/.dev ## sparse methods under RL; SUITE=small MODELS=llama-0.6m OUT=sparserl, half an hour a small model
	OMP_NUM_THREADS=1 $(PYTHON) -m thinwire bench sparserl --suite $(or $(SUITE),small) --models "$(or $(MODELS),llama-0.6m)" -o $(or $(OUT),sparserl)

test-sparserl: $(VENV)/.dev ## its slow tests: TRL's trainers, and a suite that is killed and goes on
	$(PYTHON) -m pytest -m slow tests/lab/sparserl tests/bench/test_sparserl.py --timeout 1800

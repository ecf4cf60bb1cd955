# make test-federated, example-federated, bench-federated: federated rounds on Flower. Included by the Makefile, which sets VENV and PYTHON.

.PHONY: test-federated example-federated bench-federated

test-federated: $(VENV)/.dev ## all tests of federated rounds, the slow ones and Flower's simulation on Ray too
	$(PYTHON) -m pytest -m 'slow or not slow' --timeout 1800 tests/federated

example-federated: $(VENV)/.dev ## the Flower app of examples/federated in one process; CLIENTS=100 ROUNDS=20
	$(PYTHON) examples/federated/local.py --clients $(or $(CLIENTS),4) --rounds $(or $(ROUNDS),10)

bench-federated: $(VENV)/.dev ## every method side by side; DATA=digits, or mnist, cifar10, plays under THINWIRE_DATA
	$(PYTHON) -m thinwire bench federated --data $(or $(DATA),digits) --rounds 30 --epochs 2

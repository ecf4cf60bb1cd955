# make bench-fleet, bench-sync, test-fleet: many consumers, and weight sync side by side. Included by the Makefile, which sets
# VENV and PYTHON. bench-fleet takes Ceph's object gateway where it is installed (make test-s3 installs it); bench-sync needs
# Linux, root and iproute2, and is resumed by the same command.

.PHONY: bench-fleet bench-sync test-fleet

bench-fleet: $(VENV)/.dev ## 1,000 consumers through a line that damages replies; CONSUMERS=1000 CARRIERS=direct,cache,swarm
	$(PYTHON) -m thinwire bench fleet --consumers $(or $(CONSUMERS),1000) --carriers $(or $(CARRIERS),direct,cache,swarm) --out $(or $(OUT),fleet.jsonl)

bench-sync: $(VENV)/.dev ## weight sync beside others over limited lines; SIZE=1GiB OUT=sync.jsonl
	$(PYTHON) -m thinwire bench sync --size $(or $(SIZE),1GiB) -o $(or $(OUT),sync.jsonl)

test-fleet: $(VENV)/.dev ## the slow tests of both, and those over slow networks (root)
	$(PYTHON) -m pytest -m 'slow or net' --timeout 1800 tests/bench/test_fleet.py tests/bench/test_sync.py

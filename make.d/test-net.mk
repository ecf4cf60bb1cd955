# make test-net, bench-gradients, bench-scaling: what runs over slow networks on this machine (network namespaces and
# token buckets). Included by the Makefile, which sets VENV and PYTHON. Needs Linux, root and iproute2.

.PHONY: test-net bench-gradients bench-scaling

test-net: $(VENV)/.dev ## the tests over slow networks on this machine; needs root and iproute2
	$(PYTHON) -m pytest -m net tests/bench

bench-gradients: $(VENV)/.dev ## gradient exchange side by side; P=8 RATE=1gbit
	$(PYTHON) -m thinwire bench gradients --workers $(or $(P),8) --rate $(or $(RATE),1gbit)

bench-scaling: $(VENV)/.dev ## gradient exchange from 1 to 64 workers; RATE=1gbit
	$(PYTHON) -m thinwire bench scaling --rate $(or $(RATE),1gbit)

"""The test kit shipped to users: contract suites, strategies, fault injection."""

"""Tasks, small models and training recipes for demos, examples and benchmarks."""

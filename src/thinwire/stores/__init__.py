"""Objects by key: memory, local folders, object stores of the cloud, anything fsspec knows."""

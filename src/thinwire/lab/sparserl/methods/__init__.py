"""One method a file; its name is the file's, and ``METHOD`` in it says how a model is prepared."""

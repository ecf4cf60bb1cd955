"""One task a file; its name is the file's, and ``TASK`` in it makes problems and scores answers."""

"""The study of update sparsity: many short training runs, what changed in each, and what that says."""

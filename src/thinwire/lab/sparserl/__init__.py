"""SparseRL: what each way of training few weights gains by reinforcement, and what it costs to train and to send."""

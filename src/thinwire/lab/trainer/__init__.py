"""What training recipes share: options, ranks, the learning step, checkpoints.

A recipe brings a model, its data and a loss (:mod:`thinwire.lab.vision` is one); everything here works for any.
"""

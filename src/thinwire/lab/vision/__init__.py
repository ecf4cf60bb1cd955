"""Training image classifiers with compressed gradients: data, shards, models and one recipe.

``train(VisionConfig(...))`` in :mod:`thinwire.lab.vision.recipe` is what ``thinwire train vision`` calls.
"""

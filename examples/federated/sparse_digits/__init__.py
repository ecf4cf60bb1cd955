"""A Flower app: handwritten digits, learnt by clients that send little."""

"""Action: publish, follow, catch up, collect garbage."""

"""The thinwire command."""

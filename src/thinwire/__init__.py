"""thinwire: send only what changed; prove that what arrived is the same."""

"""Generation backends, each behind the RolloutBackend protocol."""

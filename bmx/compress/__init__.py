"""Which KV pairs stay: scorers rank them, the policy protects and chooses."""

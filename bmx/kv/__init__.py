"""The KV cache: what a slot looks like (layout) and the tensors of all slots (pool)."""

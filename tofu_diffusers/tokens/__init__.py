"""Which tokens run, and what the others get: pure functions on tensors."""

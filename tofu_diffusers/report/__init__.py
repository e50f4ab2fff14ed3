"""What tofu did, as numbers."""

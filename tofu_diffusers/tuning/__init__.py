"""Measures on the user's own model what a configuration is then given."""

"""Measures what token reduction saves and what it costs. Runs from a checkout, on public names only."""

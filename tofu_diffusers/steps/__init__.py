"""Which steps run, and what is forecast for the others."""

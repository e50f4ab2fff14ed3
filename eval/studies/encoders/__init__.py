"""Token reduction in encoders: what it costs a trained one."""

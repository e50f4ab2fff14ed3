"""What is known and remembered while a denoiser generates."""

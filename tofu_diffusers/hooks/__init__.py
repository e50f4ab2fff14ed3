"""What is put on the modules of a denoiser, and the one file that puts it there."""

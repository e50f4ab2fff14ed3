"""What generates: settings, prompts, and run folders with a manifest."""

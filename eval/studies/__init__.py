"""Questions to many settings at once."""

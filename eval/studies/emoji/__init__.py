"""What the pipelines of this repository draw, judged."""

"""Runnable pipelines: recipes for public models, and `emoji`, trained here and embedded."""

"""What pictures are judged by: features and distances, drift, alignment, and how sure all that is."""

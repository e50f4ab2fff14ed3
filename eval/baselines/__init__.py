"""What token reduction is measured against: fewer steps, whole-step caching, other packages."""

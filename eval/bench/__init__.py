"""What times: pipelines, denoisers with random weights, single operations."""

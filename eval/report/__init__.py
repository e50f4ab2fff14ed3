"""What readers see of results: pages, plots, and the tables of the documents."""

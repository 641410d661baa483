"""One training loop for every architecture, and where its checkpoints are kept."""

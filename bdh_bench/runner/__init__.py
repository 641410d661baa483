"""From a request to stored rows: plan the cells, run each in its own process, keep what happened."""

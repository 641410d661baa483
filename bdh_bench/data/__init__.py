"""Where text comes from: documents, their split, and the targets that are scored."""

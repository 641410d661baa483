"""An example of a plug-in for bdh-bench: the model ``clocks`` and the task ``echo``."""

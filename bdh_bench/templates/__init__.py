"""What does a new plug-in project begin with? The files that ``bdh-bench new`` copies; each is a working model or task."""

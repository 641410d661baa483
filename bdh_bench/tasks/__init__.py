"""One file per question; the file name is the task's name. Tasks yield raw measurements and never name a model."""

"""One file per architecture; the file name is the model's name (a leading underscore is not registered)."""

"""Long chains of thought that can be checked: programs that a model works off line by line."""

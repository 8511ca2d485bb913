"""``fasa eval``: what sparse decoding does to the answers of a model."""

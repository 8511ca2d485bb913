"""Frees the KV slots of generated tokens that selection no longer chooses."""

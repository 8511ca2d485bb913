"""Memory mode: free the KV slots of generated tokens that selection does not want any more."""

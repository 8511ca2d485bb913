"""Start a model in SGLang and send it requests."""

"""``fasa bench``: kernels, a server, memory, and an agent loop."""

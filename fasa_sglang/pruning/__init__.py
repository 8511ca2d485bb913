"""Which generated tokens lose their KV slots, and when."""

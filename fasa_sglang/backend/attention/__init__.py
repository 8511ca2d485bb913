"""What runs inside the model runner: the attention backends, their labels and graphs."""

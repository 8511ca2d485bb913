"""What we measure, and the models and clients it needs."""

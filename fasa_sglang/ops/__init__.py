"""FASA's steps as pure functions on tensors."""

"""Checkpoints into tensors."""

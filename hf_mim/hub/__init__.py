"""Weights in and out: how other code names the tensors of our checkpoints."""

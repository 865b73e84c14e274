"""Checkpoints, models without weights, their blocks and their task heads."""

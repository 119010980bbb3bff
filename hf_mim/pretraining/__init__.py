"""A pretraining run: its recipe and arguments, trainer, checkpoints, guard, and what it measures at its end."""

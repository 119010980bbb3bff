"""What a recipe needs on many devices (`plan.py`), found by running its step on tensors without memory (`step.py`)."""

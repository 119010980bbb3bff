"""All that a checkpoint needs to run: one flat folder that imports torch, transformers, huggingface_hub and itself."""

"""Inference beside the model's own calls."""

"""The hierarchical ensembles, their presets and checkpoints."""

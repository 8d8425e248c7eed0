"""How layers are computed: plain PyTorch, kernels, folded kernels."""

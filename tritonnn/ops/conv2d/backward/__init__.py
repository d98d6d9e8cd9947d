"""Gradients of 2-D convolution, of the input (input.py) and of the weight (weight.py)."""

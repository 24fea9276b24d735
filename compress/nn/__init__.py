"""Tensor maths that knows no CLIP."""

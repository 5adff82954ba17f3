"""Weights in 4 and 8 bits: readable references, and frozen layers that compute with them."""

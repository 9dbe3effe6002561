"""Layers with other libraries' constructors, names and calls: thin adapters over `engine.layers.MultiHeadAttention`."""

"""Lenses: what every layer of a language model already believes."""

"""Unlearning: a request, the methods that answer it, and the update of weights that they give."""

"""Internals: is what was forgotten erased inside a model, or only no longer said?"""

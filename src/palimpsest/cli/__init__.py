"""The command line: it parses, calls the library and prints. `palimpsest --help` lists its verbs."""

from palimpsest.cli.app import main

__all__ = ["main"]

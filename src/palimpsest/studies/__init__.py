"""One file a paper: its claims, each an estimate with an interval over seeds, and a verdict."""

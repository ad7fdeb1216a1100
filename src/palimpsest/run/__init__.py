"""The whole story from one specification: data, controls, unlearning, audit, report."""

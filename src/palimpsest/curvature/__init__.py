"""Curvature of the retain set's KL: K-FAC and EK-FAC factors, solves with them, exact quadratic forms."""

"""Small generated environments in which the truth is known exactly."""

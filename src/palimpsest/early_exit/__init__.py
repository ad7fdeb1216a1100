"""Early exit: stop when the answer is there. Heads at some layers, a learned policy, classification and generation."""

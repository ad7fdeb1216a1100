"""The audit: controls, the battery of scores, the verdict with its reasons, and the evidence that can be verified."""

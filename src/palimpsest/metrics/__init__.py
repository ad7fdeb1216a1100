"""What a model says and how surely: likelihood, generation, agreement, collapse, and the statistics over them."""

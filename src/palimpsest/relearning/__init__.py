"""The protocol of learning something again from a frozen artefact: budgets, a floor, a ceiling, and a verdict."""

"""From a model's scores to text."""

"""From audio to batches."""

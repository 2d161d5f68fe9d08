"""Objects and state as plain data on the disk."""

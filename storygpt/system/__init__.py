"""Machine, process and file utilities. They know of no model and no data."""

"""Machine, process and file utilities; they import nothing else of the project."""

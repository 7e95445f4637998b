"""Optional tools, one file each, run as `python -m tools.NAME`."""

"""Optional tools, run as `python -m tools.NAME`; formats/, judging/ and peers.py are parts of them."""

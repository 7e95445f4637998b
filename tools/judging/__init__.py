"""What tools/judge.py measures (text, novelty, pairs, scoring), and stories to compare with (controls)."""

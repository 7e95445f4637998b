"""What tools/judge.py measures (text, novelty, pairs, scoring, grammar), and stories to compare with (controls)."""

"""prepare.py --clean: what becomes plain, what is dropped, and what stays."""

import pytest

from storygpt.corpus.clean import clean, is_fragment


@pytest.mark.parametrize("text, plain", [
    ("“Hi,” she said. ‘It’s’ «so» „odd‟.", "\"Hi,\" she said. 'It's' \"so\" \"odd\"."),
    ("here – or 3–4—or so ― well‑known", "here - or 3-4 - or so - well-known"),
    ("a — b—", "a - b -"),
    ("Well… yes", "Well... yes"),
    ("a\u00a0b\u2003c  d\te", "a b c d e"),
    ("One. \nTwo.\n  Three.\r\nFour.\n\n\n\nFive.\u2028Six.", "One.\nTwo.\nThree.\nFour.\n\nFive.\nSix."),
    ("a\u200bb\ufeffc\u00add\ue000e\x07f\ufffd", "abcdef"),
    ("â€œHiâ€\x9d sheâ€™d say atÂ\u00a0the cafÃ©â€¦", "\"Hi\" she'd say at the café..."),
    ("Page one.\fPage two.\vEnd", "Page one.\nPage two.\nEnd"),
    ("KÃř Ã′", "KÃř Ã'"),  # no mojibake
    ("â€œHiâ€ she said", '"Hi" she said'),  # the last byte of ” was lost
    ("naïve café, ¡señor! 🦊 Ã la â€", 'naïve café, ¡señor! 🦊 Ã la "'),
    ("Plain text stays.\n\nAs it is: \"it's\" - so...", "Plain text stays.\n\nAs it is: \"it's\" - so..."),
])
def test_clean(text, plain):
    assert clean(text) == plain == clean(plain)


@pytest.mark.parametrize("end, expected", [
    ("They were happy.", False), ('"Hi!"', False), ("Really?)", False), ("and so...", False), ("The end", False),
    ("The End", False), ("the END", False), ("happy 🙂", False), ("They were", True), ("said, \"They wer", True),
    ("and,", True), ('the sign "STOP"', True), ("on page 12", True), ("The weekend", True), ("naïve café", True),
    ("well -", True), ("and" + "\")]'" * 4, True),
])
def test_a_story_that_stops_in_mid_sentence_is_a_fragment(end, expected):
    assert is_fragment("Ana had a ball. " * 10 + end) == expected


def test_a_short_story_is_a_fragment_and_a_book_is_none_however_it_ends():
    assert is_fragment("x" * 98 + ".") and not is_fragment("x" * 99 + ".")
    assert is_fragment("x" * 10_000) and not is_fragment("x" * 10_001)

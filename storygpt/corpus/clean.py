"""Cleaning text of the web for a small vocabulary: prepare.py --clean. Meant for stories in English."""

import re
import unicodedata

MIN_CHARACTERS = 100  # a shorter story is a fragment
MAX_CHARACTERS = 10_000  # a longer one is never a fragment, however it ends: a chapter, a book
TO_BE_CLEANED = re.compile(r"[^\n -~]|  | \n|\n |\n{3}")
# UTF-8 that was decoded as Windows' cp1252 (“ became â€œ, é became Ã©); the last byte of ” has no character there.
MOJIBAKE = re.compile("â€[\x80-\xbf\u0152-\u02dc\u2013-\u2122]?|[ÂÃ][\x80-\xbf\u0152-\u02dc\u2013-\u2122]")
# The end of a text in the middle of a sentence, perhaps in quotation marks; "The end" often has no full stop.
UNFINISHED = re.compile(r"""(?<!\bthe end)(?<=[\w,;:(-])["')\]]*$""", re.IGNORECASE)


class PlainCharacters(dict):
    """Unicode code point → plain text, for str.translate."""

    def __missing__(self, code):
        """Spaces of any width become a space; control, format (zero-width) and private-use characters are dropped."""
        category = unicodedata.category(chr(code))
        self[code] = " " if category == "Zs" else "" if category[0] == "C" else chr(code)
        return self[code]


PLAIN = PlainCharacters({ord(character): plain for characters, plain in [
    ("“”„‟«»″", '"'), ("‘’‚‛′´", "'"), ("‐‑‒–−", "-"), ("—―", " - "), ("…", "..."), ("\n\v\f\x85\u2028", "\n"),
    ("\u2029", "\n\n"), ("\t", " "), ("\ufffd", "")] for character in characters})


def clean(text):
    """Make quotes, dashes, ellipses and spaces plain, undo mojibake, and drop invisible characters."""
    if not TO_BE_CLEANED.search(text):
        return text
    text = MOJIBAKE.sub(decode_again, text).translate(PLAIN)
    text = re.sub(" *(\n|$) *", r"\1", re.sub("  +", " ", text))
    return re.sub("\n{3,}", "\n\n", text)


def decode_again(match):
    """The text that became this mojibake; other text is returned as it is."""
    try:
        return b"".join(c.encode("latin-1" if c <= "\xff" else "cp1252") for c in match[0]).decode()
    except UnicodeError:
        return '"' if match[0] == "â€" else match[0]


def is_fragment(story):
    """Whether a cleaned story is short or stops in mid-sentence."""
    if len(story) > MAX_CHARACTERS:
        return False
    return len(story) < MIN_CHARACTERS or bool(UNFINISHED.search(story[-20:]))

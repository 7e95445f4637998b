"""Minimal pairs: a held-out sentence, and the same with one change that makes it wrong (as in BLiMP, Warstadt et al.
2020, arXiv 1912.00582). A model that knows the language finds the former more likely. Chance is 50%. For English.
"""

import random
import re

from tools.judging.text import SENTENCE, mentions, narration, others, split_at

NUMBER = {"was": "were", "is": "are", "has": "have", "does": "do",
          "were": "was", "are": "is", "have": "has", "do": "does"}
PRESENT = {"went": "go", "saw": "see", "said": "say", "found": "find", "ran": "run", "took": "take", "came": "come",
           "gave": "give", "made": "make", "felt": "feel", "thought": "think", "knew": "know", "got": "get",
           "sat": "sit", "began": "begin", "told": "tell", "loved": "love", "wanted": "want", "looked": "look",
           "liked": "like", "played": "play", "asked": "ask", "walked": "walk", "jumped": "jump", "smiled": "smile"}
ARTICLE = {"a": "an", "an": "a"}
CASE = {"he": "him", "she": "her", "they": "them", "He": "Him", "She": "Her", "They": "Them"}
# Kind → (pattern whose group 1 is replaced, the replacement of each text)
RULES = {
    "agreement": (r"(?<![Ii]f )\b(?:[Hh]e|[Ss]he|[Ii]t) (was|is|has|does)\b|\b(?:[Tt]hey|[Ww]e) (were|are|have|do)\b",
                  NUMBER.get),
    "tense": (rf"\b(?:[Hh]e|[Ss]he|[Ii]t) ({'|'.join(PRESENT)})\b", PRESENT.get),
    "article": (r"\b(a|an)(?= [a-z])", ARTICLE.get),
    "pronoun": (rf"\b({'|'.join(CASE)})(?= [a-z])", CASE.get),
    "word order": (r"\b((?:the|a|an|his|their) [a-z]+)\b", lambda words: " ".join(reversed(words.split()))),
}


def minimal_pairs(stories, names, count):
    """Pairs of a right text, from a story, and a wrong one that differs in one place of its last sentence.

    Returns a dict, kind → list of pairs, at most `count` of each kind and each from another story. `names`: the result
    of `text.learn_names`.

    The pairs of RULES are a sentence after the one before it. Those of "name" (a character's name against one that the
    story does not have) and "gender" (a character's "he" or "she" against the other) are the story up to that sentence.
    """
    pairs = {}
    for number, story in enumerate(stories):
        random_float = random.Random(number).random  # the same values in every version of Python
        for kind, changes in all_changes(story, names, random_float).items():
            found = pairs.setdefault(kind, [])
            if changes and len(found) < count:
                context, end, start, stop, replacement = changes[int(random_float() * len(changes))]
                found.append((story[context:end], story[context:start] + replacement + story[stop:end]))
    return pairs


def all_changes(story, names, random_float):
    """All changes that make a sentence of a story wrong, by kind.

    A change is (start of the text to score, its end, start and end of what is replaced, replacement).
    """
    changes, text, seen, previous = {kind: [] for kind in (*RULES, "name", "gender")}, narration(story), [], 0
    for sentence in SENTENCE.finditer(text):
        first, end = sentence.span()
        for kind, (pattern, replace) in RULES.items():
            for match in re.compile(pattern).finditer(text, first, end):
                group = match.lastindex  # the only one of the pattern's groups that matched
                changes[kind].append((previous, end, *match.span(group), replace(match[group])))
        mentioned = mentions(sentence[0], names)
        if len(set(mentioned)) == 1 and mentioned[0] in seen:
            name = mentioned[0]
            start = first + len(split_at(name, sentence[0])[0])
            rivals = [other for other, gender in names.items() if gender == names[name] and other not in story]
            if rivals:
                rival = rivals[int(random_float() * len(rivals))]
                changes["name"].append((0, end, start, start + len(name), rival))
            pronoun = re.compile(r"\b(he|she)\b").search(text, start, end)
            if pronoun and names[name] == pronoun[1] and not others(sentence[0]):
                changes["gender"].append((0, end, *pronoun.span(), "she" if pronoun[1] == "he" else "he"))
        seen += mentioned
        previous = first
    return changes

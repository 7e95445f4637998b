"""What tools/judge.py measures on the text of stories: how varied, whole and consistent they are. For English.

Each measure has a pair of numbers per story (or per group of stories): numerator and denominator. Its value is the
ratio of their sums; `interval` is the confidence interval of that.
"""

import re
from collections import Counter, defaultdict

import numpy as np

WORD = r"[^\W\d_]+(?:['’][^\W\d_]+)?"
WORDS_AND_MARKS = re.compile(rf"{WORD}|\d+|[^\w\s]")
# A sentence ends with its mark and closing quotation marks, or with its paragraph; "Mr." does not end it.
SENTENCE = re.compile(r"\S.*?(?:(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bMrs)[.!?…]+[\"”’')]*(?=\s|$)|$)", re.MULTILINE)
QUOTATION = re.compile(r"[\"“][^\"“”\n]*[\"”]?")
# A word; `first` if it begins a sentence or a quotation, so that its capital letter says nothing.
CAPITALIZED = re.compile(rf"(?P<first>^\W*|[\"“‘(]|[.!?:…][\"”’)]*\s+|\n\s*)?\b(?P<word>{WORD})", re.MULTILINE)

GROUP = 10  # stories in which distinct n-grams are counted: the share among all would depend on their number
BLEU_STORIES = 100  # stories that are compared with each other, for the same reason
RESAMPLES, FEWEST = 1000, 10  # of the bootstrap: resamples, entries for an interval

TITLES = set("Mr Mrs Ms Miss Dr Mama Papa Mother Father Grandma Grandpa Granny Aunt Auntie Uncle King Queen".split())
NOT_NAMES = TITLES | set("""I I'm I'll I'd I've Mom Mommy Mum Mummy Dad Daddy Mamma Grandmother Grandfather Grandad
    Sir God Santa Christmas Easter Halloween English TV Monday Tuesday Wednesday Thursday Friday Saturday Sunday January
    February March April May June July August September October November December""".split())
# A character's name is introduced by one of these words, earlier in the sentence where it first appears.
INTRODUCING = set("""named called name names nickname friend friends brothers sisters cousin twin twins neighbor dog
    puppy cat kitten pet teddy am i'm meet met""".split())
# Words for people: a pronoun near one of them may not be the hero's.
MALE = set("boy man prince king brother son uncle father dad daddy papa grandpa grandfather wizard mr sir".split())
FEMALE = set("""girl woman lady princess queen sister daughter aunt auntie mother mom mommy mama mum mummy grandma
    grandmother granny witch fairy mrs ms miss""".split())
PEOPLE = set("friend child baby doctor teacher neighbor person people someone everyone they them".split())


def interval(measure):
    """The value of a measure and its 95% confidence interval (low, high), by bootstrap over the entries, as a dict.

    With fewer than FEWEST entries, low and high are None. Returns None if there is nothing to measure.
    """
    a, b = np.array(measure, float).reshape(-1, 2).T  # (N,) each
    if not b.sum():
        return None
    low = high = None
    if len(a) >= FEWEST:
        rng = np.random.default_rng(0)
        resamples = (rng.integers(len(a), size=len(a)) for _ in range(RESAMPLES))
        sums = np.array([(a[picks].sum(), b[picks].sum()) for picks in resamples])  # (RESAMPLES, 2)
        sums = sums[sums[:, 1] > 0]
        low, high = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    return {"value": a.sum() / b.sum(), "low": low, "high": high}


def split_words(text):
    """The words, numbers and punctuation marks of a text, in lower case."""
    return WORDS_AND_MARKS.findall(text.lower())


def per_story(values):
    """The measure that is the mean of one value per story."""
    return [(value, 1) for value in values]


def measure(stories, ended, names):
    """All measures of a list of stories. `names`: the result of `learn_names`.

    `ended`: whether each story has an end of text, None if that is not known.
    """
    words = [split_words(story) for story in stories]
    sentences = [SENTENCE.findall(story) for story in stories]
    return {**{f"distinct_{n}": distinct(words, n) for n in (1, 2, 3)},
            "self_bleu": self_bleu(words),
            "same_opening": shared([story[0] for story in sentences if story]),
            "same_ending": shared([story[-1] for story in sentences if story]),
            "ends": per_story(value for value in ended if value is not None),
            "words": per_story(map(len, words)),
            "quotes_balanced": per_story(story.count('"') % 2 == 0 and story.count("“") == story.count("”")
                                         for story in stories),
            "repeated_sentences": repeated([sentence for sentence in story if len(sentence.split()) > 2]
                                           for story in sentences),
            "repeated_4_grams": repeated(ngrams(story, 4) for story in words),
            **consistency(stories, names)}


def ngrams(words, n):
    """The n-grams of a list."""
    return list(zip(*(words[i:] for i in range(n))))


def complete_groups(items, size):
    """A list divided into groups of this size, without the incomplete last one."""
    return [items[i:i + size] for i in range(0, len(items) - size + 1, size)]


def distinct(stories, n):
    """distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams / n-grams, in groups of GROUP stories.

    `stories`: lists of words. The entries are complete groups.
    """
    groups = [[gram for words in group for gram in ngrams(words, n)] for group in complete_groups(stories, GROUP)]
    return [(len(set(group)), len(group)) for group in groups]


def self_bleu(stories):
    """Self-BLEU (Zhu et al. 2018, arXiv 1802.01886): the BLEU of each story, the others being its references.

    `stories`: lists of words. The first BLEU_STORIES are measured, because more references give a higher BLEU; none if
    there are fewer.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="none", effective_order=True)
    texts = [" ".join(words) for group in complete_groups(stories, BLEU_STORIES)[:1] for words in group]
    return per_story(bleu.sentence_score(text, texts[:i] + texts[i + 1:]).score / 100 for i, text in enumerate(texts))


def shared(sentences):
    """The share of sentences that others are equal to, in complete groups of BLEU_STORIES."""
    return per_story(group.count(sentence) > 1 for group in complete_groups(sentences, BLEU_STORIES)
                     for sentence in group)


def repeated(stories):
    """The share of items that occurred earlier in the same list, over lists."""
    return [(len(items) - len(set(items)), len(items)) for items in stories]


def learn_names(stories):
    """The names of characters in some stories, and the pronoun that goes with each: a dict name → "he", "she" or None.

    A name is a word that has a capital letter within sentences, at least three times and in a tenth of its uses (some
    names are also words: Honey), but not after a title (Mrs. Rose, Mama Bear). Its pronoun is the one of at least 80%
    of those in sentences of the narration that mention no one else.
    """
    inside, lower, pronouns = Counter(), Counter(), defaultdict(Counter)
    for story in stories:
        previous = ""
        for match in CAPITALIZED.finditer(story):
            word = base(match["word"])
            if not word[0].isupper():
                lower[word] += 1
            elif match["first"] is None and previous not in TITLES and word not in NOT_NAMES and not word.isupper():
                inside[word] += 1
            previous = word
    names = {name: None for name, count in inside.items() if count >= max(3, 0.1 * (count + lower[name.lower()]))}
    for story in stories:
        for sentence in SENTENCE.findall(narration(story)):
            mentioned = set(mentions(sentence, names))
            if len(mentioned) == 1 and not others(sentence):
                name = mentioned.pop()
                pronouns[name].update(subject_pronouns(sentence, name))
    for name, counts in pronouns.items():
        for pronoun, count in counts.items():
            if counts.total() >= 3 and count >= 0.8 * counts.total():
                names[name] = pronoun
    return names


def base(word):
    """A word without the possessive 's."""
    return re.sub(r"['’]s?$", "", word)


def narration(story):
    """A story with the characters of its quotations replaced by as many spaces."""
    return QUOTATION.sub(lambda match: " " * len(match[0]), story)


def mentions(text, names):
    """The names in a text, in order. A name after a title (Mrs. Rose, Mama Bear) is not that of a hero or friend."""
    words = [base(word) for word in re.findall(WORD, text)]
    return [word for previous, word in zip(["", *words], words) if word in names and previous not in TITLES]


def subject_pronouns(sentence, name):
    """The words "he" and "she" of a sentence, those after the name if the sentence has it."""
    return [word for word in split_words(split_at(name, sentence)[-1]) if word in ("he", "she")]


def split_at(name, sentence):
    """The parts of a sentence before and after its first mention of a name; the sentence if it has none."""
    return re.split(rf"(?<![^\W\d_]){name}(?![^\W\d_])", sentence, maxsplit=1)  # no letter before or after it


def others(sentence):
    """The words of a sentence for people other than by name."""
    return (MALE | FEMALE | PEOPLE) & set(map(base, split_words(sentence)))


def consistency(stories, names):
    """Measures of who a story is about. `names`: the result of `learn_names`."""
    measures = {"names": [], "names_not_introduced": [], "pronouns_agree": [], "one_hero": []}
    for story in stories:
        cast, not_introduced = find_cast(story, names)
        agreeing = hero_pronouns(story, cast[0], names) if cast else []
        has_one_hero = bool(cast) and not not_introduced and all(agreeing)  # no one takes the hero's place
        measures["names"].append((len(cast), 1))
        measures["names_not_introduced"].append((len(not_introduced), len(cast)))
        measures["pronouns_agree"].append((sum(agreeing), len(agreeing)))
        measures["one_hero"].append((has_one_hero, bool(cast)))
    return measures


def find_cast(story, names):
    """The names in a story, in the order in which they appear, and those of them that are not introduced.

    Names after the second sentence need, earlier in their first sentence, a word of INTRODUCING or for a person; or
    "the" or "who" after them, as in "Billy the goat".
    """
    cast, not_introduced = [], []
    for i, sentence in enumerate(SENTENCE.findall(story)):
        for name in mentions(sentence, names):
            if name not in cast:
                cast.append(name)
                before, after = split_at(name, sentence)
                introducing = (INTRODUCING | MALE | FEMALE) & set(split_words(before))
                if i > 1 and not introducing and not re.match(r",? (?:the|who)\b", after):
                    not_introduced.append(name)
    return cast, not_introduced


def hero_pronouns(story, hero, names):
    """Whether each pronoun that must be the hero's agrees with the hero's gender; [] if that is not known.

    These are "he" and "she" in a sentence of the narration whose only person is the hero, after the name, and in the
    following sentences without a person. `hero`: the first name in the story.
    """
    pronouns, is_known, is_hero, gender = [], False, False, names[hero]
    for sentence in SENTENCE.findall(narration(story)):
        mentioned, people = set(mentions(sentence, names)), others(sentence)
        if mentioned or people:
            before = split_words(split_at(hero, sentence)[0]) if hero in mentioned else []
            nouns = [word for word in before if word in MALE | FEMALE]
            if nouns and not is_known:  # there was a girl named Alex
                gender = "he" if nouns[-1] in MALE else "she"
                people -= set(nouns)
            is_known |= hero in mentioned
            is_hero = mentioned == {hero} and not people | {"he", "she"} & set(before)
        if is_hero:
            pronouns += subject_pronouns(sentence, hero)
    return [pronoun == gender for pronoun in pronouns if gender]

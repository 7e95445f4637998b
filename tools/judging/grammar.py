"""Whether the grammar of the nursery corpus (data/nursery.py) could have generated a story.

A story is parsed sentence by sentence. What has been read of each table (names, kinds of hero, toys, …) is kept as the
rows that agree with it: a slot's text removes the rows with other values.
"""

import functools
import itertools
import string
from collections import defaultdict

from storygpt.corpus.nursery import (CAST, DEAR, FRIEND_OF, HABITS, HOMES, OPENINGS, PARSED_PLOTS, SETTING, TIMES,
                                     with_article)

CASTS = [(group, he, friend_he) for group in CAST for he in ("he", "she") for friend_he in ("he", "she")]
CAST_TABLES = range(3)  # the first of a story's tables: hero, kind with elder, friend


def is_possible(story, one_cast=True):
    """Whether the grammar can generate this text.

    With `one_cast=False`, each mention of the hero, the friend and the adult may have any name and pronoun of the
    corpus: only the rest of the story has to be possible.
    """
    for plot, (groups, _, sentences) in enumerate(PARSED_PLOTS):
        for group in dict.fromkeys(groups):
            for casts in [[cast] for cast in CASTS if cast[0] == group] if one_cast else [CASTS]:
                for openings, once, today in zip(OPENINGS, (True, False, False), (False, False, True)):
                    tables = _tables(plot, group, tuple(casts), today)
                    if any(_parse(story, _outline(opening, group, once, today, sentences), tables, group, one_cast)
                           for opening in openings):
                        return True
    return False


def _outline(opening, group, once, today, sentences):
    """The sentences of a story in order, each as its alternatives, "" where it can be omitted (None: a break)."""
    can_have_home = "{land}" not in opening and (once or not today)
    home = HOMES[group] if group == "toy" else ["", *HOMES[group]] if can_have_home else [""]
    return [[opening], home, ["", *HABITS], *sentences]


@functools.cache
def _tables(plot, group, casts, today):
    """The tables of a story (lists of rows), and each slot's table, by its number, and rows: (table, value → rows).

    Of tables with the same slot, the last counts.
    """
    hero, kind, friend = [], [], []
    for cast_group, he, friend_he in casts:
        names, kinds, pronouns, _ = CAST[cast_group][he]
        friend_names, friend_kinds, _, friend_pronouns = CAST[FRIEND_OF[cast_group]][friend_he]
        hero += [{"name": name, "Name": name, "dear": dear, **pronouns} for name in names for dear in (name, *DEAR)]
        kind += [row | elder for row, elders in kinds for elder in elders]
        friend += [{"friend": name, "fkind": row["kind"], "a_fkind": with_article(row["kind"]),
                    "pal": name if row["kind"] in ("boy", "girl") else f"{name} the {row['kind']}", **friend_pronouns}
                   for name in friend_names for row, _ in friend_kinds]
    tables = [hero, kind, friend, *SETTING[group], *TIMES[today], *PARSED_PLOTS[plot][1]]
    slots = {}
    for number, table in enumerate(tables):
        for slot in table[0]:
            rows = defaultdict(list)
            for i, row in enumerate(table):
                rows[row[slot]].append(i)
            slots[slot] = number, {value: frozenset(numbers) for value, numbers in rows.items()}
    return tables, slots


def _parse(story, outline, tables_and_slots, group, one_cast):
    """Whether the sentences of `outline` can make up the story.

    A state is (characters read, whether a paragraph begins there, for each table the possible rows or None for all).
    """
    tables, slots = tables_and_slots
    states = {(0, True, (None,) * len(tables))}
    for sentence in outline:
        if sentence is None:
            states |= {(position + 2, True, rows) for position, _, rows in states if story[position:][:2] == "\n\n"}
            continue
        following = set()
        for (position, is_start, rows), text in itertools.product(states, sentence):
            if not text:
                following.add((position, is_start, rows))
            elif is_start or story[position:position + 1] == " ":
                following |= {(end, False, rows) for end, rows in _match(
                    text, story, position + (not is_start), rows, slots, one_cast)}
        states = following
    return any(position == len(story) and not (one_cast and _same_character(rows, tables, group))
               for position, _, rows in states)


def _match(sentence, story, start, rows, slots, one_cast):
    """The ways in which the story has this sentence at `start`: pairs of its end and the rows that agree with it."""
    states = [(start, rows)]
    for literal, slot in _pieces(sentence):
        states = [(position + len(literal), rows) for position, rows in states if story.startswith(literal, position)]
        if slot is None or not states:
            return states
        (table, values), following = slots[slot], []
        for position, rows in states:
            for value, agreeing in values.items():
                if story.startswith(value, position):
                    if rows[table] is not None:
                        agreeing = agreeing & rows[table]
                    if agreeing and (one_cast or table not in CAST_TABLES):
                        following.append((position + len(value), (*rows[:table], agreeing, *rows[table + 1:])))
                    elif agreeing:
                        following.append((position + len(value), rows))
        states = following
    return states


@functools.cache
def _pieces(sentence):
    """The literal texts of a sentence, each with the name of the slot that follows it (None at the end)."""
    return [(literal, slot) for literal, slot, *_ in string.Formatter().parse(sentence)]


def _same_character(rows, tables, group):
    """Whether the hero and the friend must have the same name or, of animals, be of the same kind."""
    hero, kind, friend = (tables[i] if rows[i] is None else [tables[i][row] for row in rows[i]] for i in CAST_TABLES)
    return all(a["name"] == c["friend"] or (group == "animal" and b["kind"] == c["fkind"])
               for a, b, c in itertools.product(hero, kind, friend))

"""Flags, recipes, prompts and stories that nobody thought of: each works, or is a one-line error (exit code 1 or 2)."""

import json
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import sample
import train
from config import Config
from conftest import TINY
from faults.processes import Lost, one_line, run, works
from tokenizer import END_OF_TEXT, Tokenizer

# Small enough to be trained at once, or beyond all reason; what lies between works, and takes its time.
NUMBERS = st.one_of(st.integers(-3, 12), st.integers(10**9, 10**30), st.integers(-10**30, -10**9),
                    st.floats(), st.floats(0, 1), st.booleans())
ODD = "\x00\x1b\r\n\t \u2028\ufeff\U0001f600é<|endoftext|>"
ANY_TEXT = st.one_of(st.text(), st.text(alphabet=ODD), st.sampled_from([
    "", END_OF_TEXT, f"{END_OF_TEXT}\n{END_OF_TEXT}", "FILE:", "FILE:/", "FILE:out", "\ud800", "a" * 3000, " " * 3000]))
WORDS = st.sampled_from(["auto", "True", "cuda", "cuda:1", "mps", "float16", "bfloat16", "int8", "adamw", "muon",
                         "cosine", "linear", "wsd", "scratch", "out/whole", "nursery-bpe300", "nan", "inf", "-1",
                         "1e999", "None"])
NAMES = st.one_of(st.sampled_from([f.name for f in fields(Config)]), st.text("abcdefghij_-", min_size=1, max_size=8))
STRANGE = st.tuples(NAMES, st.one_of(NUMBERS, WORDS, ANY_TEXT))
PLAUSIBLE = st.sampled_from(fields(Config)).flatmap(lambda f: st.tuples(st.just(f.name), {
    int: st.integers(1, 8), float: st.floats(0, 1), bool: st.booleans()}.get(f.type, WORDS)))
SETTINGS = st.one_of(st.lists(PLAUSIBLE, max_size=4), st.lists(st.one_of(STRANGE, PLAUSIBLE), max_size=4))
ENDS = ["--max_iters=2", "--out_dir=out/fuzz", "--overwrite"]  # behind all else: a short run in a folder of its own


def flags(values):
    """Settings as words of a command line."""
    return [f"--{name}={value}" for name, value in values]


def flag_case(case):
    return run(train.main, [*TINY, *flags(case), *ENDS])


def recipe_case(case):
    Path("recipe.py").write_text("".join(f"{name} = {value!r}\n" for name, value in case), encoding="utf-8",
                                 errors="backslashreplace")
    return run(train.main, ["recipe.py", *([] if any(name == "dataset" for name, _ in case) else TINY), *ENDS])


def junk_case(case):
    Path("recipe.py").write_text(case, encoding="utf-8", errors="surrogatepass")
    return run(train.main, ["recipe.py", *TINY, *ENDS])


SAMPLE_FLAGS = st.just([]) | st.lists(st.tuples(st.sampled_from(
    ["num_samples", "temperature", "top_k", "top_p", "seed", "dtype", "device", "max_new_token"]),
    st.one_of(NUMBERS, WORDS, ANY_TEXT)), max_size=2)


def prompt_case(case):
    prompt, options = case
    result = run(sample.main, [*flags(options), f"--start={prompt}", "--out_dir=out/whole", "--max_new_tokens=2"])
    shown = prompt.encode("utf-8", errors="replace").decode()
    if not result[0] and not prompt.startswith("FILE:") and not result[1].startswith(shown):
        raise Lost(f"the prompt {prompt!r} became {result[1]!r}")
    return result


def story_case(case):
    """Stories of any text: their tokens, decoded, are the stories."""
    stories, vocabulary = case
    Path("stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    words = ["stories.jsonl", "--name=fuzz", f"--tokenizer={vocabulary}", "--force"]
    result = run(prepare.main, words)
    if not result[0]:
        tokenizer, parts = Tokenizer.load("data/fuzz"), []
        for split in ("train", "validation"):
            tokens = np.fromfile(f"data/fuzz/{split}.bin", np.uint16)
            ends = np.flatnonzero(tokens == tokenizer.end_of_text)
            parts += [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends + 1)]
        expected = [story.strip() for story in stories if story.strip()]
        if sorted(part.removesuffix(END_OF_TEXT) for part in parts if part) != sorted(expected):
            raise Lost(f"the stories {stories!r} became {parts!r}")
    return result


def text_case(case):
    """A text file of anything at all, be it no text."""
    Path("stories.txt").write_bytes(case)
    return run(prepare.main, ["stories.txt", "--name=fuzz", "--tokenizer=bpe:257", "--force"])


STORY = st.text(st.characters(exclude_categories=["Cs"]))
KINDS = {  # of each: what makes its cases, what tries one, its share of them
    "flags": (SETTINGS, flag_case, 0.4),
    "recipes": (SETTINGS, recipe_case, 0.15),
    "recipes of any text": (ANY_TEXT, junk_case, 0.05),
    "prompts": (st.tuples(ANY_TEXT, SAMPLE_FLAGS), prompt_case, 0.25),
    "stories": (st.tuples(st.lists(STORY, max_size=5), st.sampled_from(["bpe:257", "bpe:258", "bpe:300"])),
                story_case, 0.1),
    "text files": (st.one_of(st.binary(), ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))),
                   text_case, 0.05),
}


def fuzz(count, rng):
    """Try that many cases of all kinds, the same for the same state of `rng`; how many worked and how many did not."""
    figures = Counter()
    for name, (strategy, try_one, share) in KINDS.items():
        @hypothesis.seed(rng.getrandbits(32))
        @settings(max_examples=max(1, round(share * count)), database=None, deadline=None,
                  suppress_health_check=list(HealthCheck), print_blob=False)
        @given(strategy)
        def cases(case):
            shutil.rmtree("data/fuzz", ignore_errors=True)
            result = try_one(case)
            figures[f"cases of {name}"] += 1
            if result[0]:
                one_line(result)
                figures["cases that were a one-line error"] += 1
            else:
                works(result)
                figures["cases that worked"] += 1
        cases()
    return figures

"""Unusual flags, config files, prompts and stories: each works or gives a one-line error (exit code 1 or 2)."""

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
from conftest import TINY
from faults.processes import Failure, check_one_line_error, check_success, run
from storygpt.corpus.tokenizer import END_OF_TEXT, Tokenizer
from storygpt.settings import Config

# Small enough to train in no time, or absurdly large; sizes in between work, but take long.
NUMBERS = st.one_of(st.integers(-3, 12), st.integers(10**9, 10**30), st.integers(-10**30, -10**9),
                    st.floats(), st.floats(0, 1), st.booleans())
UNUSUAL_CHARACTERS = "\x00\x1b\r\n\t \u2028\ufeff\U0001f600é<|endoftext|>"
ANY_TEXT = st.one_of(st.text(), st.text(alphabet=UNUSUAL_CHARACTERS), st.sampled_from([
    "", END_OF_TEXT, f"{END_OF_TEXT}\n{END_OF_TEXT}", "FILE:", "FILE:/", "FILE:out", "\ud800", "a" * 3000, " " * 3000]))
WORDS = st.sampled_from(["auto", "True", "cuda", "cuda:1", "mps", "float16", "bfloat16", "int8", "adamw", "muon",
                         "cosine", "linear", "wsd", "scratch", "out/whole", "nursery-bpe300", "nan", "inf", "-1",
                         "1e999", "None"])
NAMES = st.one_of(st.sampled_from([f.name for f in fields(Config)]), st.text("abcdefghij_-", min_size=1, max_size=8))
UNUSUAL = st.tuples(NAMES, NUMBERS | WORDS | ANY_TEXT)
PLAUSIBLE = st.sampled_from(fields(Config)).flatmap(lambda f: st.tuples(st.just(f.name), {
    int: st.integers(1, 8), float: st.floats(0, 1), bool: st.booleans()}.get(f.type, WORDS)))
SETTINGS = st.lists(PLAUSIBLE, max_size=4) | st.lists(UNUSUAL | PLAUSIBLE, max_size=4)
SAMPLE_NAMES = st.sampled_from(["num_samples", "temperature", "top_k", "top_p", "seed", "dtype", "device"])
SAMPLE_FLAGS = st.just([]) | st.lists(st.tuples(SAMPLE_NAMES, NUMBERS | WORDS | ANY_TEXT), max_size=2)
STORY = st.text(st.characters(exclude_categories=["Cs"]))
LAST_FLAGS = ["--max_iters=2", "--out_dir=out/fuzz", "--overwrite"]  # override the rest: a short run in its own folder


def try_flags(values):
    """Train with these settings, (name, value) each, as flags."""
    return run(train.main, [*TINY, *(f"--{name}={value}" for name, value in values), *LAST_FLAGS])


def try_config_file(values):
    """Train with a config file of these settings, or of any text. TINY must not override a dataset in it."""
    text = values if isinstance(values, str) else "".join(f"{name} = {value!r}\n" for name, value in values)
    Path("fuzz.py").write_text(text, encoding="utf-8", errors="surrogatepass")
    return run(train.main, ["fuzz.py", *([] if "dataset = " in text else TINY), *LAST_FLAGS])


def try_prompt(case):
    """Generate a story from a prompt: the output starts with it."""
    prompt, values = case
    result = run(sample.main, [*(f"--{name}={value}" for name, value in values), f"--start={prompt}",
                               "--out_dir=out/whole", "--max_new_tokens=2"])
    printed = prompt.encode("utf-8", errors="replace").decode()
    if not result[0] and not prompt.startswith("FILE:") and not result[1].startswith(printed):
        raise Failure(f"the prompt {prompt!r} was printed as {result[1]!r}")
    return result


def try_stories(case):
    """Prepare stories: their tokens decode to the same stories."""
    stories, vocabulary = case
    Path("stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    result = run(prepare.main, ["stories.jsonl", "--name=fuzz", f"--tokenizer={vocabulary}", "--force"])
    if not result[0]:
        tokenizer, decoded = Tokenizer.load("data/fuzz"), []
        for split in ("train", "validation"):
            tokens = np.fromfile(f"data/fuzz/{split}.bin", np.uint16)
            ends = np.flatnonzero(tokens == tokenizer.end_of_text)
            decoded += [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends + 1)]
        expected = [story.strip() for story in stories if story.strip()]
        if sorted(text.removesuffix(END_OF_TEXT) for text in decoded if text) != sorted(expected):
            raise Failure(f"the stories {stories!r} were decoded as {decoded!r}")
    return result


def try_text_file(content):
    """Prepare a text file of these bytes, which may not be text."""
    Path("stories.txt").write_bytes(content)
    return run(prepare.main, ["stories.txt", "--name=fuzz", "--tokenizer=bpe:257", "--force"])


KINDS = {  # name → (strategy for the inputs, function that tries one, share of all inputs)
    "flags": (SETTINGS, try_flags, 0.4),
    "config files": (SETTINGS | ANY_TEXT, try_config_file, 0.2),
    "prompts": (st.tuples(ANY_TEXT, SAMPLE_FLAGS), try_prompt, 0.25),
    "stories": (st.tuples(st.lists(STORY, max_size=5), st.sampled_from(["bpe:257", "bpe:258", "bpe:300"])),
                try_stories, 0.1),
    "text files": (st.binary() | ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")), try_text_file, 0.05),
}


def fuzz(count, rng):
    """Try `count` inputs of all kinds, the same for the same state of `rng`; returns a Counter of the outcomes."""
    counts = Counter()
    for name, (strategy, try_one, share) in KINDS.items():
        @hypothesis.seed(rng.getrandbits(32))
        @settings(max_examples=max(1, round(share * count)), database=None, deadline=None,
                  suppress_health_check=list(HealthCheck), print_blob=False)
        @given(strategy)
        def try_all(case):
            shutil.rmtree("data/fuzz", ignore_errors=True)
            result = try_one(case)
            counts[f"inputs: {name}"] += 1
            if result[0]:
                check_one_line_error(result)
                counts["inputs that gave a one-line error"] += 1
            else:
                check_success(result)
                counts["inputs that worked"] += 1
        try_all()
    return counts

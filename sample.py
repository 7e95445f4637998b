"""Tell stories with a trained model.

    python sample.py --start "Once upon a time"          one story, printed as it is made
    python sample.py --num_samples 10 > stories.txt      ten at once, with lines of <|endoftext|> between them

stdout gets the stories and nothing else; stderr says which model tells them, and how fast.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from errors import Parser, UserError, exit_with_one_line
from hardware import DTYPES, pick_device, pick_weights
from model import window_start
from tokenizer import END_OF_TEXT


@exit_with_one_line
def main(argv=None):
    """Print stories; `argv` as on the command line. What a user can mend ends in one line."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the system's own is: prepare.py reads UTF-8
    args = parse_args(argv)
    prompt = read_prompt(args.start)
    path = checkpoint.best_in(args.out_dir or checkpoint.newest_run())
    if path.name == "last.pt":
        print(f"{path.parent} has no ckpt.pt yet: using last.pt", file=sys.stderr)
    device = pick_device(args.device)
    model, tokenizer, state = checkpoint.load_model(path)
    dtype = pick_weights(args.dtype, device, args.num_samples)
    model = model.to_int8() if dtype == "int8" else model.to(device, dtype)
    trained = f"{state['tokens']:,} tokens of training" if state["tokens"] else "trained elsewhere"
    print(f"{path}: {trained}" + (
        f", validation loss {state['figures']['val_loss']:.3f}" if "val_loss" in state["figures"] else "")
        + f"; weights in {str(dtype).removeprefix('torch.')}", file=sys.stderr)

    # A story begins after an end of text, as in training.
    tokens = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    if unseen := window_start(len(tokens), model.config.block_size):
        print(f"the prompt has {len(tokens)} tokens: the model, with a window of {model.config.block_size}, reads the "
              f"last {len(tokens) - unseen}", file=sys.stderr)
    generator = torch.Generator(device)
    generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
    steps = model.generate(torch.tensor([tokens] * args.num_samples, device=device), args.max_new_tokens,
                           args.temperature, args.top_k, args.top_p, generator, tokenizer.end_of_text)

    started = time.perf_counter()
    if args.num_samples == 1:
        made = tell(prompt, tokenizer, (int(step) for step in steps))
    else:
        made = tell_many(prompt, tokenizer, [step.tolist() for step in tqdm(
            steps, "telling", args.max_new_tokens, unit=" tokens each", leave=False, disable=None)])
    seconds = time.perf_counter() - started
    print(f"{made} tokens in {seconds:.1f} s, {made / seconds:.0f} tokens/s", file=sys.stderr)


def parse_args(argv):
    """The command line as a namespace; exits with code 2 for wrong flags."""
    def number(kind, low, high, meaning):
        def check(text):
            if not low <= (value := kind(text)) <= high:
                raise argparse.ArgumentTypeError(f"{text} is not {meaning}")
            return value
        check.__name__ = kind.__name__  # argparse names it where the text is no number
        return check

    above_zero = number(int, 1, 10**9, "1 or more")
    parser = Parser(description="Tell stories with a trained model.")
    parser.add_argument("--start", default="", help="how the story begins, or FILE:prompt.txt (default: as it likes)")
    parser.add_argument("--out_dir", help="the run (default: the one under out/ with the newest checkpoint)")
    parser.add_argument("--num_samples", type=number(int, 1, 1000, "from 1 to 1000"), default=1,
                        help="how many stories, made as one batch (default: 1, printed as it is made)")
    parser.add_argument("--max_new_tokens", type=above_zero, default=400, help="longest story, in tokens without the "
                                                                               "prompt's (default: 400)")
    parser.add_argument("--temperature", type=number(float, 0, 100, "from 0 to 100"), default=0.8,
                        help="0: always the likeliest token; 1: as the model says (default: 0.8)")
    parser.add_argument("--top_k", type=number(int, 0, 10**9, "0 or more"), default=200,
                        help="choose among so many of the likeliest tokens; 0: all (default: 200)")
    parser.add_argument("--top_p", type=number(float, 1e-9, 1, "above 0 and at most 1"), default=1.0,
                        help="choose among the likeliest tokens that hold this share of the probability (default: 1)")
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1, "from 0 to 2**63 - 1"),
                        help="the same seed tells the same story (default: a new one each time)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES, "int8"], default="auto",
                        help="of the weights; auto: the fastest, which for one story on a CPU is int8 (default: auto)")
    return parser.parse_args(argv)


def read_prompt(start):
    """The prompt: the text itself, or a file's where it is FILE:path. Raises UserError where that cannot be read."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8").rstrip("\n")  # a file's last line end is not part of the story
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from error


def tell(prompt, tokenizer, tokens):
    """Print one story as its tokens come; how many there were comes back."""
    made = 0

    def counted():
        nonlocal made
        for token in tokens:
            made += 1
            yield token

    print(prompt, end="", flush=True)
    story = itertools.takewhile(lambda token: token != tokenizer.end_of_text, counted())
    for piece in tokenizer.stream(story):
        print(piece, end="", flush=True)
    print(flush=True)
    return made


def tell_many(prompt, tokenizer, steps):
    """Print the stories of a batch, `steps` being a list of each step's tokens; how many there were comes back."""
    made = 0
    for i, tokens in enumerate(zip(*steps)):
        story = list(itertools.takewhile(lambda token: token != tokenizer.end_of_text, tokens))
        made += min(len(story) + 1, len(tokens))  # the end of text too, where there is one
        print(f"{END_OF_TEXT}\n" * (i > 0) + prompt + tokenizer.decode(story))
    return made


if __name__ == "__main__":
    main()

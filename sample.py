"""Generate stories with a trained model.

    python sample.py --start "Once upon a time"          one story, printed as it is generated
    python sample.py --num_samples 10 > stories.txt      ten in one batch, separated by lines of <|endoftext|>

stdout has the stories and nothing else; stderr has the model, its validation loss and the speed.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from storygpt.checkpoint import load_model
from storygpt.corpus.tokenizer import END_OF_TEXT
from storygpt.generate import generate, prepare_for_generation, window_start
from storygpt.run import best_checkpoint, newest_run
from storygpt.system.errors import Parser, exit_with_one_line
from storygpt.system.files import open_text
from storygpt.system.hardware import DTYPES, limit_threads, pick_device, pick_inference_dtype


@exit_with_one_line
def main(argv=None):
    """Generate and print stories; `argv` as on the command line. User errors are reported in one line."""
    args = parse_args(argv)
    prompt = read_prompt(args.start)
    path = best_checkpoint(args.out_dir or newest_run())
    if path.name != "ckpt.pt":
        print(f"{path.parent} has no ckpt.pt yet: using {path.name}", file=sys.stderr)
    device = pick_device(args.device)
    model, tokenizer, state = load_model(path)
    work = model.num_parameters() * args.num_samples
    dtype = pick_inference_dtype(args.dtype, device, work)
    limit_threads(device, work)
    prepare_for_generation(model, device, dtype)
    training = f"trained on {state['tokens']:,} tokens" if state["tokens"] else "trained elsewhere"
    val_loss = f", validation loss {state['metrics']['val_loss']:.3f}" if "val_loss" in state["metrics"] else ""
    print(f"{path}: {training}{val_loss}; weights in {str(dtype).removeprefix('torch.')}", file=sys.stderr)

    tokens = [tokenizer.end_of_text, *tokenizer.encode(prompt)]  # in training, too, stories follow an end of text
    if start := window_start(len(tokens), model.config.block_size):
        print(f"the prompt has {len(tokens)} tokens, more than the context window of {model.config.block_size}: the "
              f"model reads the last {len(tokens) - start}", file=sys.stderr)
    generator = torch.Generator(device).manual_seed(torch.seed() if args.seed is None else args.seed)
    steps = generate(model, torch.tensor([tokens] * args.num_samples, device=device), args.max_new_tokens,
                     args.temperature, args.top_k, args.top_p, generator, tokenizer.end_of_text)

    started = time.perf_counter()
    if args.num_samples == 1:
        stories = [map(int, steps)]
    else:
        bar = tqdm(steps, "generating", args.max_new_tokens, unit=" tokens each", leave=False, disable=None)
        stories = zip(*[step.tolist() for step in bar])
    generated = 0
    for i, tokens in enumerate(stories):
        print(f"{END_OF_TEXT}\n" * (i > 0) + prompt, end="", flush=True)
        story = itertools.takewhile(lambda token: token != tokenizer.end_of_text, tokens)
        for length, piece in enumerate(tokenizer.stream(story)):  # a piece for each token, and one after the last
            print(piece, end="", flush=args.num_samples == 1)
        print(flush=True)
        generated += min(length + 1, args.max_new_tokens)  # with the end-of-text token, unless the story was cut short
    seconds = time.perf_counter() - started
    print(f"{generated} tokens in {seconds:.1f} s, {generated / seconds:.0f} tokens/s", file=sys.stderr)


def parse_args(argv):
    """Parse the command line; exits with code 2 for an invalid flag."""
    common = ("start", "out_dir", "num_samples", "max_new_tokens", "temperature", "top_k", "seed")
    parser = Parser(common, usage="%(prog)s [--flag ...]", description="Generate stories with a trained model.")
    parser.add_argument("--start", default="", help="the prompt, or FILE:prompt.txt (default: no prompt)")
    parser.add_argument("--out_dir", help="the run's folder (default: the newest under out/, by its checkpoint)")
    parser.add_argument("--num_samples", type=number(int, 1, 1000, "from 1 to 1000"), default=1,
                        help="number of stories (default: 1); several are one batch, one is printed as it is generated")
    add_sampling_flags(parser)
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1, "from 0 to 2**63 - 1"),
                        help="the same seed gives the same stories; default: a new seed each time")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--dtype", choices=["auto", *DTYPES, "int8"], default="auto",
                        help="dtype of the weights; auto: the fastest, on an x86 CPU int8 or, for small models, "
                        "float32 (default: auto)")
    return parser.parse_args(argv)


def add_sampling_flags(parser):
    """Add the flags for the length of stories and for how a token is sampled."""
    parser.add_argument("--max_new_tokens", type=number(int, 1, 10**9, "1 or more"), default=400,
                        help="maximum length of a story in tokens (default: 400); without the prompt")
    parser.add_argument("--temperature", type=number(float, 0, 100, "from 0 to 100"), default=0.8,
                        help="the logits are divided by it (default: 0.8); 0: always the most likely token")
    parser.add_argument("--top_k", type=number(int, 0, 10**9, "0 or more"), default=200,
                        help="sample from the k most likely tokens (default: 200); 0: from all")
    parser.add_argument("--top_p", type=number(float, 1e-9, 1, "above 0 and at most 1"), default=1.0,
                        help="sample from the most likely tokens whose probabilities sum to p (default: 1)")


def number(kind, low, high, allowed):
    """An argparse type: an int or float (`kind`) from low to high; `allowed` describes that range in the error."""
    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value
    parse.__name__ = kind.__name__  # argparse prints it if the text is not a number
    return parse


def read_prompt(start):
    """The prompt of --start: the text itself, or that of a UTF-8 file, FILE:path. Raises UserError or OSError."""
    if not start.startswith("FILE:"):
        return start
    with open_text(Path(start.removeprefix("FILE:"))) as file:
        return file.read().rstrip("\n")  # the last line's end is not part of the prompt


if __name__ == "__main__":
    main()

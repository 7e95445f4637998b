"""Judge the stories of runs: copied or new, varied, whole, consistent; and what a model knows of language and context.

    python -m tools.judge out/run                            500 stories, next to held-out stories of its dataset
    python -m tools.judge out/a out/b --picture out/ab.png   two runs, and a plot of novelty and loss by position
    python -m tools.judge stories.txt --dataset tinystories  stories of another program, as sample.py prints them
    python -m tools.judge out/run --controls                 next to stories that are known to be bad, too

Stories are better if their measures are closer to those of the held-out stories (last column); only losses and minimal
pairs are better as such. A run's measures are also written to judge.json in its folder, its stories to judge.txt. The
measures are explained and validated in docs/judging.md.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from storygpt.checkpoint import load, load_model
from storygpt.corpus.dataset import Split, read_meta
from storygpt.corpus.tokenizer import END_OF_TEXT, Tokenizer
from storygpt.generate import generate, prepare_for_generation
from storygpt.run import best_checkpoint
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line, shell_word
from storygpt.system.hardware import autocast, pick_device, pick_dtype, pick_inference_dtype
from sample import add_sampling_flags, number, read_prompt
from tools.compare import markdown, save_figure
from tools.judging import controls, novelty, pairs, scoring, text

BATCH = 256  # stories generated at once
SAMPLE_TOKENS = 1_000_000  # of the training text, from which names are learned and the trigram model is made
PAIRS = 200  # minimal pairs of each kind
SETTINGS = ("num_samples", "start", "temperature", "top_k", "top_p", "max_new_tokens", "seed")  # in judge.json

# The measures and what the table calls them, in its order.
MEASURES = {
    "Copied or new": {
        **{f"new_{n}_grams": f"{n}-grams not in the training text, %" for n in (1, 2, 3, 4, 6, 8, 10, 12)},
        "longest_copy": "longest copied span of a story, tokens"},
    "Varied": {
        **{f"distinct_{n}": f"distinct {n}-grams in {text.GROUP} stories, %" for n in (1, 2, 3)},
        "self_bleu": f"self-BLEU of {text.BLEU_STORIES} stories, %",
        "same_opening": "first sentence of another story, %",
        "same_ending": "last sentence of another story, %"},
    "Whole": {
        "ends": "stories that end, %",
        "words": "words and marks per story",
        "quotes_balanced": "stories with balanced quotation marks, %",
        "repeated_sentences": "sentences repeated in their story, %",
        "repeated_4_grams": "4-grams repeated in their story, %"},
    "Consistent": {
        "names": "names per story",
        "names_not_introduced": "names not introduced, %",
        "pronouns_agree": "pronouns that agree with the hero, %",
        "one_hero": "stories with one consistent hero, %"},
    "Knows its language": {
        f"pairs_{kind.replace(' ', '_')}": f"minimal pairs ({kind}), % right; chance 50"
        for kind in (*pairs.RULES, "name", "gender")},
    "Uses its context": {
        "loss_window_start": "loss, first quarter of the window",
        "loss_window_end": "loss, second half of the window",
        **{f"loss_story_{a}": f"loss, tokens {a}–{b - 1} of a story" for a, b in scoring.STORY_SPANS}},
}


@dataclass
class Column:
    """A column of the table: stories and what was measured on them."""

    name: str  # the folder of a run
    stories: list  # texts
    ended: list  # whether each story has an end of text, None if that is not known
    about: dict = None  # of a run: the checkpoint and its settings, for judge.json
    measures: dict = field(default_factory=dict)  # name → (numerator, denominator) of each story, as in tools/judging
    curves: dict = field(default_factory=dict)  # name → list, for the plot
    longest_copy: dict = None


@dataclass
class HeldOut:
    """A dataset to compare with: its training text, and stories that no run was trained on."""

    name: str
    tokenizer: Tokenizer
    train: np.ndarray  # tokens (N,)
    stories: list  # texts, as many as are judged
    names: dict  # of characters, from `text.learn_names`


@exit_with_one_line
def main(argv=None):
    """Print the table and write judge.json; `argv` as on the command line. User errors are reported in one line."""
    args = parse_args(argv)
    checkpoints = {run: best_checkpoint(run) for run in args.runs if Path(run).is_dir()}  # first: errors come early
    from_files = {run: read_stories(run) for run in args.runs if run not in checkpoints}
    dataset = load_dataset(checkpoints, args)
    columns = [from_files.get(run) or judge_model(run, checkpoints[run], dataset, args) for run in args.runs]
    if dataset:
        columns += make_controls(dataset, args.max_new_tokens) if args.controls else []
        columns.append(Column(f"held-out ({len(dataset.stories)})", dataset.stories, [True] * len(dataset.stories)))
        training_text = novelty.TrainingText(dataset.train, dataset.tokenizer.end_of_text)
    names = dataset.names if dataset else text.learn_names([story for column in columns for story in column.stories])
    for column in tqdm(columns, "measuring", leave=False, disable=None):
        column.measures |= text.measure(column.stories, column.ended, names)
        if dataset:
            measure_novelty(column, dataset.tokenizer, training_text)

    summaries = [{name: text.interval(measure) for name, measure in column.measures.items()} for column in columns]
    print(format_table([column.name for column in columns], summaries))
    for column, summary in zip(columns, summaries):
        if column.longest_copy:
            print(describe_copy(column))
        if column.about:
            write(column, summary, summaries[-1] if dataset else None)
    if args.picture:
        plot(columns, args.picture)
        print(f"plot: {args.picture}")


def parse_args(argv):
    """Parse the command line; exits with code 2 for an invalid flag.

    Raises ImportError if a package is missing that would be needed only after minutes.
    """
    parser = Parser(prog="python -m tools.judge", description="Measure how good the stories of runs are.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, as out/tinystories, or a file of "
                        f"stories separated by {END_OF_TEXT}")
    parser.add_argument("--num_samples", type=number(int, 1, 100_000, "from 1 to 100000"), default=500,
                        help="stories to generate, and held-out stories to compare with (default: %(default)s)")
    parser.add_argument("--dataset", metavar="NAME", help="the folder under data/ with the training text and the "
                        "held-out stories (default: that of the first run)")
    parser.add_argument("--start", default="", help="the opening of all stories, or FILE:opening.txt (default: none: "
                        "openings are part of what is judged)")
    add_sampling_flags(parser)
    parser.add_argument("--seed", type=number(int, 0, 2**63 - 1, "from 0 to 2**63 - 1"), default=1,
                        help="the same seed gives the same stories (default: %(default)s)")
    parser.add_argument("--controls", action="store_true", help="add two columns of bad stories: shuffled sentences "
                        "of held-out stories, and a trigram model")
    parser.add_argument("--picture", metavar="FILE", help="plot novelty and loss by position: .png, .svg or .pdf")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args(argv)
    args.start, args.device = read_prompt(args.start), pick_device(args.device)
    import pydivsufsort  # noqa: F401  (now is the time to miss it, not after the stories)
    import sacrebleu  # noqa: F401
    if args.picture:
        import matplotlib  # noqa: F401
    return args


# ---- what is compared with what ----


def note(message):
    """Print a line about something that the table lacks."""
    print(f"note: {message}", file=sys.stderr)


def load_dataset(checkpoints, args):
    """The `HeldOut` of --dataset or of the first run; None, with a note, if there is none on this machine.

    Raises UserError if a dataset is damaged, or the one named is missing.
    """
    first_run = next(iter(checkpoints), None)
    name = args.dataset or (first_run and load(checkpoints[first_run])["config"]["dataset"])
    if name is None:
        return note("no --dataset: left out are held-out stories, copies and --controls")
    folder = Path("data", name)
    if not args.dataset and not folder.exists():
        return note(f"{folder}, the dataset of {first_run}, is not here: left out are held-out stories, copies, "
                    "language, context and --controls (--dataset NAME compares with another)")
    tokenizer = Tokenizer.load(folder)
    train, validation = (Split(folder, split, 1).tokens for split in ("train", "validation"))
    for run in checkpoints:
        if read_meta(run)["splits"]["train"]["bytes"] != read_meta(folder)["splits"]["train"]["bytes"]:
            note(f"{run} was trained on other text than {folder}: what it copied from that is not found")
    stories = split_stories(tokenizer, validation)
    matching = [story for story in stories if story.startswith(args.start)]
    if not matching:
        note(f"no held-out story of {folder} begins with {args.start[:40]!r}: comparing with others")
    stories = matching or stories
    count = min(args.num_samples, len(stories))
    return HeldOut(name, tokenizer, train, [stories[i] for i in np.arange(count) * len(stories) // count],
                   text.learn_names(split_stories(tokenizer, train[:SAMPLE_TOKENS])))


def split_stories(tokenizer, tokens):
    """The texts of the stories in an array of tokens; the last one may be incomplete."""
    return [story for story in tokenizer.decode(tokens.tolist()).split(END_OF_TEXT) if story]


def read_stories(path):
    """The column of a file of stories. Raises UserError if it cannot be read or has no story."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no run and no UTF-8 stories in {path}: name a run's folder, as out/tinystories, or a file of "
                        f"stories ({error})") from error
    # sample.py prints a line end after each story and each separator; other programs, a separator after the last.
    stories = content.removesuffix("\n").removesuffix(END_OF_TEXT).split(END_OF_TEXT)
    stories = [story.removeprefix("\n" * (i > 0)).removesuffix("\n") for i, story in enumerate(stories)]
    return Column(path, *without_empty(path, stories, [None] * len(stories)))


def without_empty(name, stories, ended):
    """The stories that are not empty, and their entries of `ended`. Raises UserError if there is none."""
    kept = [(story, end) for story, end in zip(stories, ended) if story.strip()]
    if not kept:
        raise UserError(f"{name} has only empty stories ({len(stories)}): there is nothing to judge")
    if len(kept) < len(stories):
        note(f"{name}: {len(stories) - len(kept)} of {len(stories)} stories are empty and left out")
    return [list(values) for values in zip(*kept)]


def make_controls(dataset, max_tokens):
    """The columns of bad stories."""
    trigram = controls.trigram_stories(dataset.train[:SAMPLE_TOKENS], dataset.tokenizer.end_of_text,
                                       len(dataset.stories), max_tokens)
    return [Column("trigram model", [dataset.tokenizer.decode(story) for story in trigram],
                   [len(story) < max_tokens for story in trigram]),
            Column("shuffled sentences", controls.shuffled_sentences(dataset.stories), [True] * len(dataset.stories))]


# ---- what needs the model ----


def judge_model(run, path, dataset, args):
    """The column of a run: the stories of the checkpoint at `path`, and what is measured with the model itself."""
    model, tokenizer, checkpoint = load_model(path)
    model.to(args.device)
    column = Column(run, [], [])
    if dataset:
        with autocast(args.device, pick_dtype("auto", args.device)):
            pairs_by_kind = pairs.minimal_pairs(dataset.stories, dataset.names, PAIRS)
            column.measures = scoring.language(model, tokenizer, pairs_by_kind)
            measures, column.curves = scoring.context(model, tokenizer, dataset.stories)
            column.measures |= measures
    dtype = pick_inference_dtype("auto", args.device, BATCH * model.num_parameters())
    prepare_for_generation(model, args.device, dtype)
    column.stories, column.ended = without_empty(run, *generate_stories(model, tokenizer, args))
    column.about = {"checkpoint": str(path), "tokens": checkpoint["tokens"],
                    "val_loss": checkpoint["metrics"].get("val_loss"), "dataset": dataset and dataset.name,
                    **{name: getattr(args, name) for name in SETTINGS}}
    return column


def generate_stories(model, tokenizer, args):
    """Generate stories in batches: (texts, whether each ended before max_new_tokens)."""
    opening, device = [tokenizer.end_of_text, *tokenizer.encode(args.start)], args.device
    generator = torch.Generator(device).manual_seed(args.seed)
    stories, ended = [], []
    while count := min(BATCH, args.num_samples - len(stories)):
        steps = generate(model, torch.tensor([opening] * count, device=device), args.max_new_tokens, args.temperature,
                         args.top_k, args.top_p, generator, tokenizer.end_of_text)
        name = f"generating stories {len(stories) + 1} to {len(stories) + count}"
        bar = tqdm(steps, name, args.max_new_tokens, unit=" tokens each", leave=False, disable=None)
        for story in zip(*[step.tolist() for step in bar]):
            ended.append(tokenizer.end_of_text in story)
            stories.append(args.start + tokenizer.decode([t for t in story if t != tokenizer.end_of_text]))
    return stories, ended


def measure_novelty(column, tokenizer, training_text):
    """Compare a column's stories with the training text, and find the longest span that they share."""
    stories = [tokenizer.encode(story) for story in column.stories]
    lengths, positions = training_text.longest_matches(stories)
    column.measures |= novelty.novelty(lengths)
    counts = [np.sum(column.measures[f"new_{n}_grams"], 0) for n in range(1, novelty.LONGEST_N + 1)]
    column.curves["novelty"] = [new / total for new, total in counts if total]
    story = max(range(len(stories)), key=lambda i: lengths[i].max())
    start, length = int(lengths[story].argmax()), int(lengths[story].max())
    if length:
        training_story, source = training_text.source(int(positions[story][start]))
        column.longest_copy = {"tokens": length, "text": tokenizer.decode(stories[story][start:start + length]),
                               "story": story, "training_story": training_story, "source": tokenizer.decode(source)}


# ---- the report ----


def format_table(names, summaries):
    """The intervals of some columns with these names as a Markdown table, – for what was not measured."""
    lines = [["measure [95% interval]", *names]]
    for section, measures in MEASURES.items():
        rows = [[f"  {label}", *(cell(summary.get(name), label) for summary in summaries)]
                for name, label in measures.items() if any(summary.get(name) for summary in summaries)]
        if rows:
            lines += [[section, *[""] * len(names)], *rows]
    return markdown(lines)


def cell(interval, label):
    """An interval of `text.interval` as text, for the row with this label."""
    if interval is None:
        return "–"
    factor, digits = (100 if "%" in label else 1), (3 if label.startswith("loss") else 1)
    value, low, high = (x if x is None else f"{factor * x:.{digits}f}" for x in interval.values())
    return value if low is None else f"{value} [{low}, {high}]"


def describe_copy(column):
    """The longest copied span of a column, as a line."""
    copy = column.longest_copy
    shown = copy["text"] if len(copy["text"]) < 300 else copy["text"][:300] + "…"
    return (f"{column.name}: longest copied span, {copy['tokens']} tokens of training story "
            f"{copy['training_story']:,}: {json.dumps(shown, ensure_ascii=False)}")


def write(column, summary, reference):
    """Write a run's judge.json and judge.txt. Raises UserError if they cannot be written."""
    def values(summary):
        return {name: interval and {key: x if x is None else round(float(x), 5) for key, x in interval.items()}
                for name, interval in summary.items()}
    result = column.about | {"measures": values(summary), "reference": reference and values(reference),
                             "curves": {name: np.round(curve, 4).tolist() for name, curve in column.curves.items()},
                             "longest_copy": column.longest_copy}
    for name, content in {"judge.json": json.dumps(result, indent=1, ensure_ascii=False),
                          "judge.txt": f"\n{END_OF_TEXT}\n".join(column.stories)}.items():
        files.atomic_write(Path(column.name, name), lambda file: file.write((content + "\n").encode()))


def read_result(out_dir, state):
    """The settings and the table in a run's judge.json, as Markdown; "" if it is missing or of other weights.

    `state`: the checkpoint whose weights are meant. Raises UserError if judge.json is damaged.
    """
    path = Path(out_dir, "judge.json")
    if not path.exists():
        return ""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if (result["tokens"], result["val_loss"]) != (state["tokens"], state["metrics"].get("val_loss")):
            return ""
        settings = ", ".join(f"{name} {result[name]!r}" for name in SETTINGS)
        aim = f"; the aim is the value of the held-out stories of {result['dataset']}" if result["reference"] else ""
        summaries = [summary for summary in (result["measures"], result["reference"]) if summary]
        table = format_table(["this model", "held-out stories"][:len(summaries)], summaries)
        return f"Measured by `python -m tools.judge` ({settings}){aim}.\n\n{table}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: remove it, or run  python -m tools.judge {shell_word(out_dir)}  again"
                        ) from error


def plot(columns, path):
    """Plot novelty by n, and the loss by position in the window and in the story. Raises UserError if it cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    panels = (("novelty", "n", "share of n-grams not in the training text"),
              ("loss_by_window_position", "position in the context window", "loss (nats/token)"),
              ("loss_by_story_position", "position in the story", "loss (nats/token)"))
    for axes, (curve, x, y) in zip(figure.subplots(1, 3), panels):
        for i, column in enumerate(columns):
            if values := column.curves.get(curve):
                if curve != "novelty":  # losses are noisy: their mean within a tenth of the position
                    values = [np.mean(values[i - (i + 1) // 10:i + 1 + (i + 1) // 10]) for i in range(len(values))]
                style = "k--" if column.name.startswith("held-out") else f"C{i}"
                axes.plot(range(1, len(values) + 1), values, style, label=column.name)
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        if curve != "novelty":
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save_figure(figure, path)


if __name__ == "__main__":
    main()

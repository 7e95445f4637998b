"""What an exported model says about itself: the model card of the Hugging Face hub, and a line for GGUF files."""

import io
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import sample
from storygpt.corpus.dataset import read_meta
from storygpt.corpus.tokenizer import END_OF_TEXT
from storygpt.system.errors import UserError
from tools import judge

SAMPLE_FLAGS = ("--start", "Once upon a time", "--num_samples", "3", "--seed", "1", "--dtype", "float32",
                "--device", "cpu")


def describe(model, state):
    """One line about a model, given the dict of its checkpoint: size, training tokens, dataset, validation loss."""
    line = f"GPT-2 architecture, {model.num_parameters():,} parameters"
    if state["tokens"]:
        line += f", trained on {state['tokens']:,} tokens of {state['config']['dataset']}"
    if "val_loss" in state["metrics"]:
        line += f", validation loss {state['metrics']['val_loss']:.4f} nats/token"
    return line


def model_card(name, path, model, state):
    """The README.md of an exported model: usage, data, losses, samples, the table of tools.judge, settings.

    `name`: what from_pretrained loads; `path`: the checkpoint, with its GPT and its dict `state`. Raises UserError if
    sample.py fails or the run's judge.json is damaged.
    """
    meta, c = read_meta(path.parent), model.config
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name.split("/")[-1]}

A GPT-2 model with {model.num_parameters():,} parameters: {c.n_layer} layers, {c.n_head} heads, width \
{c.n_embd}, a context of {c.block_size} tokens (prompt and generated text together).

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")  # as in training, after end-of-text
print(tokenizer.decode(model.generate(**prompt, max_length={c.block_size})[0], skip_special_tokens=True))
```

{training_table(state, meta)}{sample_section(name, path)}{judge_section(path, state)}{settings_section(state)}"""


def training_table(state, meta):
    """The table of the model card about training, as Markdown."""
    metrics, data = state["metrics"], meta["splits"]["train"]
    loss, training_data = "not measured", "unknown (imported model)"
    if "val_loss" in metrics:
        loss = (f"{metrics['val_loss']:.4f} nats/token, {metrics['val_bpb']:.4f} bits per byte (evaluation at "
                f"iteration {metrics['iter']:,})")
    if state["tokens"]:
        training_data = f"{data['tokens']:,} tokens of {data['stories']:,} stories ({state['config']['dataset']})"
    return f"""| | |
|---|---|
| training data | {training_data} |
| training tokens | {f"{state['tokens']:,}" if state['tokens'] else 'unknown'} |
| validation loss | {loss} |
| tokenizer | {meta['tokenizer']['name']}, {meta['vocab_size']:,} tokens |
"""


def sample_section(name, path):
    """Stories of the run of the checkpoint at `path`, and the command that generates them, as Markdown.

    Raises UserError if sample.py fails.
    """
    run = shlex.quote(f"out/{name.split('/')[-1]}")
    printed, messages = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(messages):
            sample.main(["--out_dir", str(path.parent), *SAMPLE_FLAGS])
    except SystemExit as error:
        raise UserError("cannot generate the samples of the model card, as sample.py failed: "
                        f"{messages.getvalue().splitlines()[-1]}") from error
    printed.seek(0)
    stories = [story.strip("\n").replace("\n", "\n>\n> ") for story in printed.read().split(END_OF_TEXT)]
    return f"""
## Samples

Not selected, in float32 on a CPU. These commands generate the same ones (on another processor or with another PyTorch,
rounding may change them):

```
python -m tools.hf import {shlex.quote(name)} {run}
python sample.py --out_dir {run} {shlex.join(SAMPLE_FLAGS)}
```
""" + "".join(f"\nStory {number}:\n\n> {story}\n" for number, story in enumerate(stories, 1))


def judge_section(path, state):
    """What tools.judge measured on the checkpoint at `path`, as Markdown; "" if it did not."""
    result = judge.read_result(path.parent, state)
    return f"\n## Quality of the stories\n\n{result}\n" if result else ""


def settings_section(state):
    """The training settings as Markdown; "" for an imported model."""
    rows = "".join(f"| {name} | {value} |\n" for name, value in training_settings(state).items())
    return f"\n## Training settings\n\n| setting | value |\n|---|---|\n{rows}" if rows else ""


def training_settings(state):
    """The settings of a checkpoint's run, without paths of this machine; {} for an imported model."""
    if not state["tokens"]:
        return {}
    config = {name: value for name, value in state["config"].items() if name != "out_dir"}
    return config | {"init_from": Path(config["init_from"]).name}

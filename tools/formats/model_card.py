"""What an exported model says about itself: the model card of the Hugging Face hub, and the metadata of GGUF files."""

import io
import json
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import sample
from storygpt.corpus.dataset import read_meta
from storygpt.corpus.tokenizer import END_OF_TEXT
from tools import judge

SAMPLE_FLAGS = shlex.split("--start 'Once upon a time' --num_samples 3 --seed 1 --dtype float32 --device cpu")


def gguf_texts(name, saved):
    """The metadata of a GGUF file about a SavedModel, key → text."""
    model, state = saved.model, saved.state
    description = f"GPT-2 architecture, {model.num_parameters():,} parameters"
    if state["tokens"]:
        description += f", trained on {state['tokens']:,} tokens of {state['config']['dataset']}"
    if "val_loss" in state["metrics"]:
        description += f", validation loss {state['metrics']['val_loss']:.4f} nats/token"
    settings = {"training.settings": json.dumps(training_settings(state))} if state["tokens"] else {}
    return {"general.name": name, "general.description": description} | settings


def training_settings(state):
    """The settings of the run of a checkpoint, given its dict, without paths of this machine."""
    config = {name: value for name, value in state["config"].items() if name != "out_dir"}
    return config | {"init_from": Path(config["init_from"]).name}


def model_card(name, saved, files=()):
    """The README.md of an exported SavedModel: usage, data, losses, samples, the table of tools.judge, settings.

    `name`: what from_pretrained loads; `files`: the names of all files next to it, by default a model for transformers.
    Raises UserError if the run's judge.json is damaged.
    """
    state, folder, c = saved.state, saved.path.parent, saved.model.config
    for_transformers = not files or "model.safetensors" in files
    kind = "GPT-2 model" if c.architecture == "gpt2" else f"GPT (architecture: {c.architecture})"
    card = f"""---
{"library_name: transformers" if for_transformers else "tags: [onnx]"}
pipeline_tag: text-generation
---

# {name.split("/")[-1]}

A {kind} with {saved.model.num_parameters():,} parameters: {c.n_layer} layers, {c.n_head} heads, width \
{c.n_embd}, a context of {c.block_size} tokens.

"""
    card += transformers_usage(name, c.block_size) if for_transformers else ""
    card += "".join(FILE_USAGE[Path(file).suffix].format(file) for file in files if Path(file).suffix in FILE_USAGE)
    card += training_table(state, read_meta(folder)) + sample_section(name, folder, for_transformers)
    if quality := judge.read_result(folder, state):
        card += f"\n## Quality of the stories\n\n{quality}\n"
    if state["tokens"]:  # not an imported model, whose settings are unknown
        card += "\n## Training settings\n\n| setting | value |\n|---|---|\n"
        card += "".join(f"| {setting} | {value} |\n" for setting, value in training_settings(state).items())
    return card


# What the card says of the files of a hub repository.
FILE_USAGE = {
    ".html": "`{}`: download it and open it in a browser, which then generates stories. It needs no server.\n\n",
    ".onnx": """With ONNX Runtime, from end-of-text and a prompt, as in training:

```
pip install "onnxruntime>=1.24" numpy tiktoken
python sample_onnx.py {} "Once upon a time"
```

""",
    ".gguf": """With llama.cpp, prompt and story in the context together:

```
llama-completion -m {} -no-cnv -p "Once upon a time"
```

""",
}


def transformers_usage(name, block_size):
    """The code that generates a story with transformers, as Markdown."""
    return f"""With transformers, prompt and story in the context together:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")  # as in training, after end-of-text
print(tokenizer.decode(model.generate(**prompt, max_length={block_size})[0], skip_special_tokens=True))
```

"""


def trained_on(state):
    """How many tokens of which dataset a checkpoint was trained on, given its dict."""
    if not state["tokens"]:
        return "unknown (imported model)"
    return f"{state['tokens']:,} tokens of {state['config']['dataset']}"


def training_table(state, meta):
    """The table of the model card about training, as Markdown."""
    metrics, data, loss = state["metrics"], meta["splits"]["train"], "not measured"
    if "val_loss" in metrics:
        loss = (f"{metrics['val_loss']:.4f} nats/token, {metrics['val_bpb']:.4f} bits per byte (evaluation at "
                f"iteration {metrics['iter']:,})")
    stories = f" ({data['tokens']:,} tokens in {data['stories']:,} stories)" if state["tokens"] else ""
    return f"""| | |
|---|---|
| training data | {trained_on(state)}{stories} |
| validation loss | {loss} |
| tokenizer | {meta['tokenizer']['name']}, {meta['vocab_size']:,} tokens |
"""


def sample_section(name, folder, for_transformers):
    """Stories of the run in `folder`, and the commands that generate them, as Markdown."""
    run = shlex.quote(f"out/{name.split('/')[-1]}")
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with redirect_stdout(printed):
        sample.main(["--out_dir", str(folder), *SAMPLE_FLAGS])
    printed.seek(0)
    stories = [story.strip("\n").replace("\n", "\n>\n> ") for story in printed.read().split(END_OF_TEXT)]
    import_command = f"python -m tools.hf import {shlex.quote(name)} {run}\n" if for_transformers else ""
    return f"""
## Samples

Not selected, in float32 on a CPU, generated by the program that trained the model (on another processor or with another
PyTorch, rounding may change them):

```
{import_command}python sample.py --out_dir {run} {shlex.join(SAMPLE_FLAGS)}
```
""" + "".join(f"\nStory {number}:\n\n> {story}\n" for number, story in enumerate(stories, 1))

"""A web page in one file that writes stories without a server: page.html, its scripts and a model.

Matrices are in int8 with one scale per row, or in float32. All weights are compressed and, as base64, part of the page.
"""

import base64
import json
import re
import zlib
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch

from storygpt import checkpoint
from storygpt.corpus.tokenizer import GPT2_PATTERN
from storygpt.fast import FastLinear
from storygpt.generate import window_start
from storygpt.run import best_checkpoint
from storygpt.system import files
from storygpt.system.errors import UserError

FOLDER = Path(__file__).parent
# The parameters that gpt.js knows, without "transformer." and ".weight".
NAMES = re.compile(r"wte|wpe|ve\.\d+|(ln_f|h\.\d+\.(ln_[12]|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj))(\.bias)?")
# A page is refused if one of its logits differs by more than this, relative to the largest (see tools/hf.py).
LOGIT_TOLERANCE = 1e-5
# The largest integer of a row in int8. With 127, pages are a tenth larger, and the loss is within 0.0004 nats/token.
LARGEST_INT = 72


def export_page(out_dir, target, dtype, command):
    """Write the best checkpoint of a run as a web page; returns what was exported, in words.

    `dtype`: of the matrices, int8 or float32; `command`: what the page says it was made with. Raises UserError if the
    target exists or cannot be written, the run cannot be read, or gpt.js computes something else than its model.
    """
    path = best_checkpoint(out_dir)
    if target.exists():
        raise UserError(f"{target} already exists: remove it or choose another name")
    model, tokenizer, state = checkpoint.load_model(path)
    refusal = f"{path} cannot be a web page (export to {target.stem}.onnx instead): "
    if tokenizer.pattern != GPT2_PATTERN:
        raise UserError(refusal + "its tokenizer splits text by another pattern than GPT-2's")
    about, weights = pack(model, dtype, refusal)
    difference = check_logits(model, about, weights, tokenizer.end_of_text)
    if not difference <= LOGIT_TOLERANCE:  # so that NaN is an error, too
        raise UserError(f"{refusal}its logits would differ by {difference:.2g} of the largest, because model.py or "
                        "modern.py computes something else than tools/formats/gpt.js")
    texts = {token: text for text, token in tokenizer.ranks.items()}
    about |= {"vocabulary": [texts.get(token, b"").decode("latin-1") for token in range(tokenizer.vocab_size)],
              "end_of_text": tokenizer.end_of_text, "facts": facts(model, state, command)}
    page = page_text(about, weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(target, lambda file: file.write(page))
    return f"{path}, {model.num_parameters():,} parameters in {dtype}, as a web page of {len(page) / 1e6:.1f} MB"


@torch.no_grad()
def pack(model, dtype, refusal):
    """The settings and tensors of a model for gpt.js: a dict for JSON, and bytes. The model gets the rounded weights.

    Rows of the head that are equal, because their tokens did not occur in training, are stored once, as the last row.
    """
    parameters = {name.removeprefix("transformer.").removesuffix(".weight"): p for name, p in model.named_parameters()}
    if unknown := [name for name in parameters if not NAMES.fullmatch(name)]:
        raise UserError(f"{refusal}tools/formats/gpt.js knows no parameter {unknown[0]}")
    head = FastLinear(model.config.n_embd, model.config.vocab_size, bias=False, device="meta")
    head.weight = parameters["wte"]
    head.prepare(int8=False)
    tokens = head.distinct_rows  # those of the other rows, or None
    tensors, parts = [], []
    for name, p in parameters.items():
        stored = [p]
        if p.dim() == 2 and dtype == "int8":
            scale = p.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST_INT
            stored = [scale, (p / scale).round().to(torch.int8)]
            p.copy_(stored[1] * scale)
        if name == "wte" and tokens is not None:
            unused = torch.ones(len(p), dtype=torch.bool).index_fill_(0, tokens, False).nonzero()[:1, 0]
            stored = [part[torch.cat([tokens, unused])] for part in stored]
        tensors.append([name, *reversed(stored[-1].shape)])
        parts += stored
    for name in ("cos", "sin") if model.config.architecture == "modern" else ():
        table = getattr(model, name)[:, model.cos.size(1) // 2:]  # (T, D / 2): the other half is the same, or negative
        tensors.append([name, *reversed(table.shape), True])
        parts.append(table)
    weights = b"".join(data + bytes(-len(data) % 4) for data in (part.numpy().tobytes() for part in parts))
    return {"config": asdict(model.config), "tensors": tensors, "dtype": dtype,
            "tokens": None if tokens is None else tokens.tolist()}, weights


@torch.no_grad()
def check_logits(model, about, weights, end_of_text):
    """The largest difference of a logit of gpt.js from one of the model, relative to its largest one; NaN if it fails.

    Of random tokens: of half a block, one more, a whole block and one more, when the context window moves.
    """
    try:
        from py_mini_racer import JSEvalException, MiniRacer
    except ImportError as error:
        raise UserError("this export needs mini-racer:  pip install -r requirements-extra.txt") from error
    T, V, generator = model.config.block_size, model.config.vocab_size, torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (T + 1,), generator=generator)
    tokens[T // 2] = end_of_text
    context, differences = MiniRacer(), []
    context.eval((FOLDER / "gpt.js").read_text(encoding="utf-8"))
    buffer = context.eval(f"const buffer = new ArrayBuffer({len(weights)}); buffer")
    buffer[:] = weights
    try:
        context.eval(f"const gpt = new GPT({json.dumps(about)}, buffer)")
        for n in (T // 2, T // 2 + 1, T, T + 1):
            context.eval(f"for (const _ of gpt.read({tokens[:n].tolist()})); 0")
            result = context.eval(f"Float32Array.from({{length: {V}}}, (_, token) => gpt.logits[gpt.row(token)])")
            logits = model(tokens[None, window_start(n, T):n])[0, -1]  # (V)
            difference = torch.from_numpy(np.frombuffer(result, np.float32)) - logits  # (V)
            differences.append(difference.abs().max() / logits.abs().max())
    except JSEvalException:  # a parameter is missing or has another shape
        return float("nan")
    return torch.stack(differences).max().item()


def facts(model, state, command):
    """What the page says about its model: pairs of a name and a text."""
    c, metrics = model.config, state["metrics"]
    facts = [("Parameters", f"{model.num_parameters():,}"),
             ("Network", f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context of {c.block_size} tokens"),
             ("Trained on", f"{state['tokens']:,} tokens of {state['config']['dataset']}" if state["tokens"]
              else "unknown (imported model)")]
    if "val_loss" in metrics:
        facts += [("Validation loss", f"{metrics['val_loss']:.4f} nats/token, {metrics['val_bpb']:.4f} bits per byte")]
    return [*facts, ("Page made", f"{date.today():%d %B %Y}"), ("With", command)]


def page_text(about, weights):
    """The page, as bytes: page.html with its scripts and its data in it."""
    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    about = json.dumps(about, separators=(",", ":")).replace("<", r"\u003c")  # otherwise </script> would end the data
    weights = base64.b64encode(zlib.compress(weights, 9)).decode()
    for name in ("gpt.js", "tokenizer.js"):
        script = (FOLDER / name).read_text(encoding="utf-8")
        html = html.replace(f'<script src="{name}"></script>', f"<script>\n{script}</script>")
    return html.replace("WEIGHTS", weights, 1).replace("ABOUT", about, 1).encode()  # ABOUT comes first in page.html

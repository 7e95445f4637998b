"""A web page in one file that writes stories without a server: page.html, its scripts and a model.

Matrices are in int8 with one scale per row, or in float32. All weights are compressed and, as base64, part of the page.
"""

import base64
import copy
import itertools
import json
import re
import zlib
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch

from storygpt.corpus.tokenizer import GPT2_PATTERN
from storygpt.fast import distinct_rows
from storygpt.generate import window_start
from storygpt.system.errors import shell_word
from tools.formats import NotExportable, check_tokens
from tools.formats.model_card import trained_on

FOLDER = Path(__file__).parent
# The parameters and buffers that gpt.js knows, without "transformer." and ".weight".
NAMES = re.compile(r"wte|wpe|ve|cos|sin|"
                   r"(ln_f|h\.\d+\.(ln_[12]|attn\.(c_attn|c_proj|gate)|mlp\.(c_fc|c_proj)))(\.bias)?")
# A page is refused if a logit differs by more than this, relative to the largest: between gpt.js and the model, and
# between the model with weights in int8 and in float32 (five times the difference of a trained model).
LOGIT_TOLERANCE, INT8_TOLERANCE = 1e-5, 0.1
# The largest integer of a row in int8. With 127, pages are a tenth larger, and the loss is within 0.0004 nats/token.
LARGEST_INT = 72


def write_page(path, saved, dtype):
    """Write a SavedModel as a web page; returns its size and how much its logits differ, in words.

    `dtype`: of the matrices, int8 or float32. Raises NotExportable if gpt.js computes something else than the
    model, or tokenizer.js cannot be its tokenizer.
    """
    model, tokenizer = saved.model, saved.tokenizer
    refusal = f"{saved.path} cannot be a web page (export to {path.stem}.onnx instead): "
    if tokenizer.pattern != GPT2_PATTERN:
        raise NotExportable(refusal + "its tokenizer splits text by another pattern than GPT-2's")
    rounded = copy.deepcopy(model)
    about, weights = pack(rounded, dtype, refusal)
    difference = check_logits(saved, rounded, about, weights, refusal)
    texts = {token: text for text, token in tokenizer.ranks.items()}
    about |= {"vocabulary": [texts.get(token, b"").decode("latin-1") for token in range(tokenizer.vocab_size)],
              "end_of_text": tokenizer.end_of_text, "facts": facts(saved, path.name, dtype)}
    page = page_text(about, weights)
    path.write_bytes(page)
    return (f" in {dtype}, {len(page) / 1e6:.1f} MB; logits differ by up to {difference:.1g} of the largest from the "
            "run's in float32")


@torch.no_grad()
def pack(model, dtype, refusal):
    """The settings and tensors of a model for gpt.js: a dict for JSON, and bytes. The model gets the rounded weights.

    Rows of the head that are equal, because their tokens did not occur in training, are stored once, as the last row.
    Raises NotExportable for a parameter that gpt.js does not know.
    """
    parameters = {name.removeprefix("transformer.").removesuffix(".weight"): p for name, p in model.named_parameters()}
    tables = dict(model.named_buffers())  # of modern.py: cos and sin, (T, R)
    if unknown := [name for name in [*parameters, *tables] if not NAMES.fullmatch(name)]:
        raise NotExportable(f"{refusal}tools/formats/gpt.js knows no parameter or buffer {unknown[0]}")
    if len(parameters["wte"]) != model.config.vocab_size:
        raise NotExportable(f"{refusal}its embeddings are not those of {model.config.vocab_size} tokens")
    tokens, rows = distinct_rows(parameters["wte"])
    tensors, parts = [], []
    for name, p in parameters.items():
        stored = [p]
        if p.dim() == 2 and dtype == "int8":
            scale = p.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST_INT
            stored = [scale, (p / scale).round().to(torch.int8)]
            p.copy_(stored[1] * scale)
        if name == "wte" and tokens is not None:
            stored = [part[rows] for part in stored]
        tensors.append([name, *reversed(stored[-1].shape)])
        parts += stored
    for name, table in tables.items():
        table = table[:, table.size(1) // 2:]  # (T, R / 2): the other half is the same, or negative
        tensors.append([name, *reversed(table.shape), True])
        parts.append(table)
    weights = b"".join(data + bytes(-len(data) % 4) for data in (part.numpy().tobytes() for part in parts))
    return {"config": asdict(model.config), "tensors": tensors, "dtype": dtype,
            "tokens": None if tokens is None else tokens.tolist()}, weights


@torch.no_grad()
def check_logits(saved, rounded, about, weights, refusal):
    """Raise NotExportable if a logit of gpt.js differs from that of `rounded`, the model with the page's weights, or if
    a logit of `rounded` differs from the run's.

    Returns the latter difference, divided by the largest logit. The page reads `check_tokens`: half a block, one more,
    a whole block, and one more, when the context window moves.
    """
    from py_mini_racer import JSEvalException, MiniRacer
    T, V, context, differences = rounded.config.block_size, rounded.config.vocab_size, MiniRacer(), []
    for name in ("linear.js", "gpt.js"):
        context.eval((FOLDER / name).read_text(encoding="utf-8"))
    buffer = context.eval(f"const buffer = new ArrayBuffer({len(weights)}); buffer")
    buffer[:] = weights
    try:
        context.eval(f"const gpt = new GPT({json.dumps(about)}, buffer)")
        for idx, n in itertools.product(check_tokens(saved.model, saved.tokenizer.end_of_text, T + 1),
                                        (T // 2, T // 2 + 1, T, T + 1)):  # idx: (1, T + 1)
            context.eval(f"for (const _ of gpt.read({idx[0, :n].tolist()})); 0")
            result = context.eval(f"Float32Array.from({{length: {V}}}, (_, token) => gpt.logits[gpt.row(token)])")
            own, exact = (model(idx[:, window_start(n, T):n])[0, -1] for model in (rounded, saved.model))  # (V)
            pairs = (torch.from_numpy(np.frombuffer(result, np.float32)), own), (own, exact)
            differences.append([float((a - b).abs().max() / b.abs().max()) for a, b in pairs])
    except JSEvalException as error:
        reason = str(error).strip().splitlines()[0]
        raise NotExportable(f"{refusal}tools/formats/gpt.js cannot run it, as when a parameter has another shape "
                            f"({reason})") from error
    of_code, of_rounding = np.max(differences, 0)
    if not of_code <= LOGIT_TOLERANCE:  # so that NaN is an error, too
        raise NotExportable(f"{refusal}its logits would differ by {of_code:.2g} of the largest, because model.py or "
                            "modern.py computes something else than tools/formats/gpt.js")
    if of_rounding > INT8_TOLERANCE:
        raise NotExportable(f"{refusal}in int8, its logits would differ by {of_rounding:.2g} of the largest")
    return of_rounding


def facts(saved, name, dtype):
    """What the page says about a SavedModel: pairs of a name and a text. `name`: of the page's file."""
    c, metrics, run = saved.model.config, saved.state["metrics"], Path("out", saved.path.parent.resolve().name)
    facts = [("Parameters", f"{saved.model.num_parameters():,}"),
             ("Network", f"{c.n_layer} layers, {c.n_head} heads, width {c.n_embd}, context of {c.block_size} tokens"),
             ("Trained on", trained_on(saved.state))]
    if "val_loss" in metrics:
        facts += [("Validation loss", f"{metrics['val_loss']:.4f} nats/token, {metrics['val_bpb']:.4f} bits per byte")]
    command = f"python -m tools.export {shell_word(run)} {shell_word(name)} --dtype {dtype}"
    return [*facts, ("Page made", f"{date.today():%d %B %Y}"), ("With", command)]


def page_text(about, weights):
    """The page, as bytes: page.html with its scripts and its data in it."""
    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    about = json.dumps(about, separators=(",", ":")).replace("<", r"\u003c")  # otherwise </script> would end the data
    weights = base64.b64encode(zlib.compress(weights, 9)).decode()
    for name in ("linear.js", "gpt.js", "tokenizer.js"):
        script = (FOLDER / name).read_text(encoding="utf-8")
        html = html.replace(f'<script src="{name}"></script>', f"<script>\n{script}</script>")
    return html.replace("WEIGHTS", weights, 1).replace("ABOUT", about, 1).encode()  # ABOUT comes first in page.html

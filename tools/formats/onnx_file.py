"""Export of a run to ONNX, for ONNX Runtime: docs/sample_onnx.py generates stories with such a file, without PyTorch.

The graph is traced from the model as it is, so that it follows edits. Inputs: `tokens` (B, T), the number of tokens in
the cache, `length` (), and its buffers, `past_0`, `past_1`, … (B, H, block_size, D), the keys and values of each layer.
Outputs: `logits` (B, U) of the last token, and the buffers with the new tokens, `present_0`, …: in the same memory if
the caller binds them to it, and then nothing is copied. A model without a cache has `tokens` and `logits` only.

B: batch size, T: new tokens, C: width, H: heads, D: C / H, V: vocabulary size, U: tokens that can be generated.
"""

import base64
import copy
import json
import logging
import math
import runpy
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from storygpt import checkpoint
from storygpt.fast import FastLinear, is_plain, torch_attention
from storygpt.generate import KVCache, check_cache, last_logits, output_layer, uses_cache
from storygpt.run import best_checkpoint
from storygpt.system import files
from storygpt.system.errors import UserError
from tools.model_card import training_settings

OPSET = 23
BLOCK = 128  # weights that share a scale in int8, at most
# The largest difference of a logit, relative to the largest logit: of float32 rounding, and about ten times that of a
# trained model in int8.
TOLERANCE = {"float32": 1e-5, "int8": 0.1}


def export_onnx(out_dir, target, dtype):
    """Write the best checkpoint of a run as an ONNX file; returns what was exported, in words.

    `dtype`: float32, or int8 for linear layers and embeddings in 8 bits. Raises UserError if the run cannot be read,
    its model cannot be traced or computes something else in ONNX Runtime, or the file exists or cannot be written.
    """
    if not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UserError("ONNX needs the packages onnx, onnxscript and onnxruntime:  pip install -r "
                        "requirements-extra.txt")
    path = best_checkpoint(out_dir)
    if target.exists():
        raise UserError(f"{target} already exists: remove it or choose another name")
    model, tokenizer, state = checkpoint.load_model(path)
    check_cache(model.requires_grad_(False))
    texts = {"tokenizer": json.dumps(tokenizer_parts(tokenizer)), "end_of_text": str(tokenizer.end_of_text),
             "block_size": str(model.config.block_size), "dtype": dtype, "metrics": json.dumps(state["metrics"])}
    if state["tokens"]:
        texts |= {"training_tokens": str(state["tokens"]), "training_settings": json.dumps(training_settings(state))}
    data = convert(path, copy.deepcopy(model), dtype, texts)
    difference = check_logits(path, model, data, tokenizer.end_of_text, TOLERANCE[dtype])
    target.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(target, lambda file: file.write(data))
    return (f"{path}, {model.num_parameters():,} parameters in {dtype}, {'with' if uses_cache(model) else 'without'} a "
            f"cache; logits differ by up to {difference:.1g} of the largest")


def tokenizer_parts(tokenizer):
    """What tiktoken.Encoding needs, as JSON: the tokens of `ranks`, in the order of their ids, are in base64."""
    ranks = {base64.b64encode(token).decode(): rank for token, rank in tokenizer.ranks.items()}
    return {"name": tokenizer.name, "pat_str": tokenizer.pattern, "mergeable_ranks": ranks,
            "special_tokens": tokenizer.special_tokens}


def convert(path, model, dtype, texts):
    """The bytes of an ONNX file with a model, which is changed, and with these texts as metadata."""
    shapes = cache_shapes(model) if uses_cache(model) else []
    token_ids = compute_equal_rows_once(model)
    if dtype == "int8":
        use_int8(model)
    proto = trace(path, model, shapes)
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        part.ClearField("metadata_props")  # file names and stack traces of this machine
        part.ClearField("doc_string")
    for key, text in (texts | {"token_ids": json.dumps(token_ids.tolist())}).items():
        proto.metadata_props.add(key=key, value=text)
    return proto.SerializeToString()


def trace(path, model, shapes):
    """The onnx.ModelProto of a model, and of a cache whose buffers have these shapes for one sequence, if any.

    Raises UserError if torch.onnx cannot trace it.
    """
    args = (torch.zeros(3, 2, dtype=torch.long),)  # sizes of 1 would be constants
    names, dynamic = ["tokens"], [{0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}]
    if shapes:
        args += torch.tensor(0), [torch.zeros(3, *shape[1:]) for shape in shapes]
        names += ["length", *(f"past_{i}" for i in range(len(shapes)))]
        dynamic += [{}, [{0: torch.export.Dim.DYNAMIC}] * len(shapes)]
    outputs = ["logits", *(f"present_{i}" for i in range(len(shapes)))]
    previous_level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(Traced(model), args, input_names=names, output_names=outputs, verbose=False,
                                        dynamic_shapes=dynamic, opset_version=OPSET, dynamo=True)
            return program.model_proto
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"{path} cannot be exported: torch.onnx cannot trace the model: {reason}") from error
    finally:
        logging.disable(previous_level)


class Traced(nn.Module):
    """What is exported of a model: tokens, and the cache if there is one -> logits of the last token, and the cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, length=None, past=()):
        """(B, T), (), buffers -> (B, U), buffers"""
        if length is None:
            return last_logits(self.model, None, tokens)
        cache = TracedCache(length, past)
        F.scaled_dot_product_attention = cache.attention
        try:
            return last_logits(self.model, cache, tokens), cache.present
        finally:
            F.scaled_dot_product_attention = torch_attention


class TracedCache:
    """A KVCache (storygpt/generate.py) with the buffers `past`, which every pass reads completely, as on a GPU.

    With ONNX Runtime's own operator for attention, a pass reads only the tokens in the cache, and copies nothing.
    """

    def __init__(self, length, past):
        self.length, self.past, self.present = length, past, []

    def advance(self, T):
        """As KVCache.advance"""
        slots = torch.arange(self.past[0].size(2))
        self.positions, self.kv_length = self.length + torch.arange(T), len(slots)
        self.mask = torch.zeros(T, len(slots)).masked_fill(slots > self.positions[:, None], -math.inf)
        return self.positions

    def append(self, k, v):
        """As KVCache.append"""
        self.new = k, v
        i = len(self.present)
        self.present += [past.index_copy(2, self.positions, new) for past, new in zip(self.past[i:], self.new)]
        return self.present[-2:]

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """F.scaled_dot_product_attention, by GroupQueryAttention if the keys and values are what `append` returned."""
        B, H, T, D = q.shape
        is_ours = self.present and k is self.present[-2] and v is self.present[-1] and attn_mask is self.mask
        if not is_ours or k.shape != v.shape or D % 8 or H % k.size(1):  # the operator has 8 * n per head
            return torch_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        past = self.past[len(self.present) - 2:len(self.present)]
        total = (self.length + T).int()
        inputs = [x.transpose(1, 2).flatten(2) for x in (q, *self.new)]  # (B, T, H * D) each
        options = {"num_heads": H, "kv_num_heads": k.size(1), "scale": scale or D**-0.5}
        y, *self.present[-2:] = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention", [*inputs, *past, (total - 1).expand(B), total], options,
            dtypes=[q.dtype] * 3, shapes=[inputs[0].shape, *(buffer.shape for buffer in past)], version=1)
        return y.unflatten(2, (H, D)).transpose(1, 2)


def cache_shapes(model):
    """The shapes of a KVCache's buffers for one sequence, keys and values of each layer in turn."""
    cache = KVCache(model.config.block_size, "cpu")
    model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    return [buffer.shape for pair in zip(cache.keys, cache.values) for buffer in pair]


# ---- smaller and faster layers ----


def compute_equal_rows_once(model):
    """Keep one of the equal rows of a model's output layer, and of the embedding tied to it; see `FastLinear`.

    Returns the ids of the tokens of its U logits. If there is one more, it is that of all other tokens.
    """
    head = output_layer(model)
    every_token = torch.arange(model.config.vocab_size)
    if head is None:
        return every_token
    head.__class__ = FastLinear
    head.prepare(int8=False)
    head.__class__ = nn.Linear
    if head.distinct_rows is None:
        return every_token
    tied = [module for module in model.modules() if is_plain(module, nn.Embedding) and module.weight is head.weight]
    head.weight = nn.Parameter(head.row_weight, requires_grad=False)
    head.bias = None if head.bias is None else nn.Parameter(head.row_bias, requires_grad=False)
    U = len(head.distinct_rows)
    for embedding in tied:
        embedding.__class__, embedding.weight = RowEmbedding, head.weight
        embedding.row_of_token = torch.full_like(every_token, U).index_copy(0, head.distinct_rows, torch.arange(U))
    return head.distinct_rows


def use_int8(model):
    """Quantize the layers of exactly nn.Linear and nn.Embedding, for operators of ONNX Runtime: a layer's activations
    are rounded to 8 bits, too. A tied weight is stored once.
    """
    quantized = {}
    for module in model.modules():
        if is_plain(module, nn.Linear) or is_plain(module, nn.Embedding) or is_plain(module, RowEmbedding):
            module.__class__ = {nn.Linear: Int8Linear}.get(type(module), Int8Embedding)
            if module.weight not in quantized:
                quantized[module.weight] = quantize(module.weight)
            module.int8, module.scale = quantized[module.weight]


def quantize(weight):
    """Round a weight (rows, C) to 8 bits, in blocks that have a scale each: (rows, blocks, size) and (rows, blocks)."""
    size = min(BLOCK, max(16, 2 ** math.ceil(math.log2(weight.size(1)))))  # powers of two from 16 on are allowed
    blocks = F.pad(weight, (0, -weight.size(1) % size)).unflatten(1, (-1, size))
    scale = blocks.abs().amax(2).clamp_min(1e-30) / 127
    return ((blocks / scale[..., None]).round() + 128).to(torch.uint8), scale  # the operators subtract 128


class RowEmbedding(nn.Embedding):
    """nn.Embedding of which several tokens have one row."""

    def forward(self, idx):
        """(…) -> (…, C)"""
        return super().forward(self.row_of_token[idx])


class Int8Linear(nn.Linear):
    """nn.Linear with an 8-bit weight."""

    def forward(self, x):
        """(…, in) -> (…, out)"""
        size = self.int8.size(2)
        options = {"K": x.size(-1), "N": len(self.int8), "bits": 8, "block_size": size, "accuracy_level": 4}
        return torch.onnx.ops.symbolic("com.microsoft::MatMulNBits", [x, self.int8, self.scale, None, None, self.bias],
                                       options, dtype=x.dtype, shape=(*x.shape[:-1], len(self.int8)), version=1)


class Int8Embedding(nn.Embedding):
    """nn.Embedding with an 8-bit weight."""

    row_of_token = None  # see RowEmbedding

    def forward(self, idx):
        """(…) -> (…, C)"""
        idx = idx if self.row_of_token is None else self.row_of_token[idx]
        rows, options = self.int8.flatten(1), {"bits": 8, "block_size": self.int8.size(2)}
        y = torch.onnx.ops.symbolic("com.microsoft::GatherBlockQuantized", [rows, idx, self.scale], options,
                                    dtype=torch.float32, shape=(*idx.shape, rows.size(1)), version=1)
        return y[..., :self.embedding_dim]


# ---- check ----


def check_logits(path, model, data, end_of_text, tolerance):
    """Raise UserError unless ONNX Runtime gives a model's logits with the file's `data`, on random tokens.

    Returns the largest difference, divided by the largest logit. Reads a block, a shorter text, and a text token by
    token, of one sequence and of two.
    """
    T, generator, differences = model.config.block_size, torch.Generator().manual_seed(0), []
    for B in (1, 2):
        exported = runpy.run_path(Path(__file__).parents[2] / "docs/sample_onnx.py")["Model"](data, B)
        idx = torch.randint(model.config.vocab_size, (B, T), generator=generator)
        idx[:, T // 2] = end_of_text
        expected = model(idx)[..., torch.from_numpy(exported.token_ids)].numpy()  # (B, T, U)
        spans = [(0, T), (0, T // 2), *((t, t + 1) for t in range(T // 2, T) if exported.has_cache)]
        for start, end in spans:
            logits = exported(idx[:, start:end].numpy(), start)
            differences.append(np.abs(logits - expected[:, end - 1]).max() / np.abs(expected).max())
    if not max(differences) <= tolerance:  # so that NaN is an error, too
        raise UserError(f"{path} cannot be exported: in ONNX Runtime the logits would differ by up to "
                        f"{max(differences):.2g} of the largest, more than {tolerance:g}")
    return max(differences)

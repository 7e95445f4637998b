"""Export of a run to ONNX, for ONNX Runtime: docs/sample_onnx.py generates stories with such a file, without PyTorch.

The graph is traced from the model as it is, so that it follows edits. Inputs: `tokens` (B, T), the number of tokens in
the cache, `length` (), and its buffers, `past_0`, `past_1`, …: the keys of each layer, then the values of each layer,
(B, H, block_size, D), then what `KVCache.previous` keeps of the last one, (B, 1, …). Outputs: `logits` (B, U) of the
last token, and the buffers with the new tokens, `present_0`, …: nothing is copied if the caller gives them the same
memory. If B > 1 and the cache is not empty, T must be 1. A model without a cache has `tokens` and `logits` only.

B: batch size, T: new tokens, C: width, H: heads, D: C / H, V: vocabulary size, U: tokens with a logit.
"""

import base64
import copy
import json
import logging
import math
import runpy
import warnings
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from storygpt import generate
from storygpt.fast import distinct_rows, torch_attention
from storygpt.generate import KVCache, check_cache, last_logits, output_layer, uses_cache
from tools.formats import NotExportable, check_tokens
from tools.formats.model_card import training_settings

# The largest difference of a logit, relative to the largest: above float32 rounding, which is below 1e-6; in int8 about
# ten times the difference of a trained model.
TOLERANCE = {"float32": 1e-5, "int8": 0.1}


def write_onnx(path, saved, dtype):
    """Write a SavedModel as an ONNX file; returns how much its logits differ, in words.

    `dtype`: float32, or int8 for linear layers and embeddings in 8 bits. Raises NotExportable if its model cannot be
    traced, or computes something else in ONNX Runtime.
    """
    import onnxscript  # noqa: F401  (torch.onnx needs it, and reports it missing as a model that cannot be traced)
    tokenizer, state = saved.tokenizer, saved.state
    ranks = {base64.b64encode(token).decode(): rank for token, rank in tokenizer.ranks.items()}
    losses = {name: state["metrics"][name] for name in ("val_loss", "val_bpb") if name in state["metrics"]}
    metadata = {"end_of_text": tokenizer.end_of_text, "training_tokens": state["tokens"], "losses": losses,
                "training_settings": training_settings(state) if state["tokens"] else {},
                "tokenizer": {"name": tokenizer.name, "pat_str": tokenizer.pattern, "mergeable_ranks": ranks,
                              "special_tokens": tokenizer.special_tokens}}  # the arguments of tiktoken.Encoding
    converted = copy.deepcopy(saved.model.requires_grad_(False))
    data = convert(saved.path, converted, dtype, metadata)
    difference = check_logits(saved.path, saved.model, data, tokenizer.end_of_text, TOLERANCE[dtype])
    path.write_bytes(data)
    cache = "" if uses_cache(converted) else ", without a cache"
    return f" in {dtype}{cache}; logits differ by up to {difference:.1g} of the largest from the run's in float32"


def convert(path, model, dtype, metadata):
    """The content of an ONNX file of a model, which is changed, as bytes; `metadata` is stored in JSON.

    Raises NotExportable if torch.onnx cannot trace the model.
    """
    with patch.object(generate, "KVCache", StaticCache):
        check_cache(model.requires_grad_(False))
    token_ids = compute_equal_rows_once(model)
    if dtype == "int8":
        use_int8(model)
    proto = trace(path, model)
    metadata = metadata | {"block_size": model.config.block_size, "token_ids": token_ids.tolist()}
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(value))
    return proto.SerializeToString()


def compute_equal_rows_once(model):
    """Keep one of the equal rows of a model's output layer, and of the embedding tied to it (`distinct_rows`).

    Returns the ids of the U tokens of its logits. If there is one logit more, it is that of all other tokens.
    """
    head, every_token = output_layer(model), torch.arange(model.config.vocab_size)
    tokens, rows = (None, None) if head is None else distinct_rows(head.weight, head.bias)
    if rows is None:
        return every_token
    tied_weight, U = head.weight, len(tokens)
    head.weight = nn.Parameter(head.weight[rows], requires_grad=False)
    head.bias = None if head.bias is None else nn.Parameter(head.bias[rows], requires_grad=False)
    row_of_token = torch.full_like(every_token, U).index_copy(0, tokens, torch.arange(U))
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight is tied_weight:
            module.weight = head.weight
            module.register_forward_pre_hook(lambda module, args: (row_of_token[args[0]],))
    return tokens


# ---- int8 ----


def use_int8(model):
    """Let layers of exactly nn.Linear and nn.Embedding use ONNX Runtime's operators for 8-bit weights.

    A linear layer rounds its input to 8 bits, too. A tied weight is stored once.
    """
    forwards, quantized = {nn.Linear: linear_int8, nn.Embedding: embedding_int8}, {}
    for module in model.modules():
        if type(module) in forwards and "forward" not in vars(module):  # not one that a reader gave to a layer
            if module.weight not in quantized:
                quantized[module.weight] = quantize(module.weight)
            bias = getattr(module, "bias", None)
            module.forward = partial(forwards[type(module)], *quantized[module.weight], module.weight.size(1), bias)


def quantize(weight):
    """Round a weight (rows, C) to 8 bits: (rows, blocks, size), and a scale for each block, (rows, blocks)."""
    C = weight.size(1)
    size = min(128, max(16, 2 ** math.ceil(math.log2(C))))  # powers of two from 16 on are allowed; 128 is fastest
    blocks = F.pad(weight, (0, -C % size)).unflatten(1, (-1, size))
    scale = blocks.abs().amax(2).clamp_min(1e-30) / 127
    return ((blocks / scale[..., None]).round() + 128).to(torch.uint8), scale  # the operators subtract 128


def linear_int8(weight, scale, C, bias, x):
    """F.linear with a weight of `quantize`: (…, C) -> (…, rows)"""
    options = {"K": C, "N": len(weight), "bits": 8, "block_size": weight.size(2), "accuracy_level": 4}  # 4: int8
    return torch.onnx.ops.symbolic("com.microsoft::MatMulNBits", [x, weight, scale, None, None, bias], options,
                                   dtype=x.dtype, shape=(*x.shape[:-1], len(weight)), version=1)


def embedding_int8(weight, scale, C, _, idx):
    """F.embedding with a weight of `quantize`: (…) -> (…, C)"""
    rows, options = weight.flatten(1), {"bits": 8, "block_size": weight.size(2)}
    return torch.onnx.ops.symbolic("com.microsoft::GatherBlockQuantized", [rows, idx, scale], options,
                                   dtype=scale.dtype, shape=(*idx.shape, rows.size(1)), version=1)[..., :C]


# ---- tracing ----


def trace(path, model):
    """Trace a model, with a cache if it can use one: an onnx.ModelProto. Raises NotExportable if torch.onnx cannot."""
    inputs, any_size = {"tokens": torch.zeros(3, 2, dtype=torch.long)}, torch.export.Dim.DYNAMIC
    dynamic = [{0: any_size, 1: any_size}]  # the sizes above are any but 1, which would be taken for a constant
    outputs, traced = ["logits"], Traced(model)
    if uses_cache(model):
        kv = KVCache(model.config.block_size, "cpu")
        model(inputs["tokens"], cache=kv)
        buffers, traced.n_keys = [*kv.keys, *kv.values, *kv.last], len(kv.keys)
        inputs |= {"length": kv.length} | {f"past_{i}": buffer for i, buffer in enumerate(buffers)}
        outputs += [f"present_{i}" for i in range(len(buffers))]
        dynamic += [{}, tuple({0: any_size} for _ in buffers)]
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            proto = torch.onnx.export(traced, tuple(inputs.values()), input_names=list(inputs),
                                      output_names=outputs, dynamic_shapes=dynamic, opset_version=23, dynamo=True,
                                      verbose=False).model_proto
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise NotExportable(f"{path} cannot be exported: torch.onnx cannot trace its model: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.initializer):
        part.ClearField("metadata_props")  # stack traces, with the paths of this machine
        part.ClearField("doc_string")
    return proto


class Traced(nn.Module):
    """What is exported of a model: (B, T), length, the buffers of the cache -> (B, U), the changed buffers."""

    def __init__(self, model):
        super().__init__()
        self.model, self.n_keys = model, 0

    def forward(self, tokens, length=None, *buffers):
        """The first `n_keys` buffers are keys, as many others values. Without a length, there is no cache."""
        if length is None:
            return last_logits(self.model, None, tokens)
        cache = TracedCache(length, buffers[:self.n_keys], buffers[self.n_keys:2 * self.n_keys],
                            buffers[2 * self.n_keys:])
        with patch.object(F, "scaled_dot_product_attention", cache.attention):
            logits = last_logits(self.model, cache, tokens)
        return logits, *cache.keys, *cache.values, *cache.last


class StaticCache(KVCache):
    """A KVCache of which attention reads all slots, as on a GPU."""

    def __init__(self, block_size, device):
        super().__init__(block_size, device)
        self.fixed_shapes = True


class TracedCache(StaticCache):
    """A cache with the given buffers, of which ONNX Runtime's operator for attention reads only the slots with tokens.

    That operator copies nothing, either.
    """

    def __init__(self, length, keys, values, last):
        super().__init__(keys[0].size(2), "cpu")
        self.length, self.past = length.clone(), list(zip(keys, values))  # of each layer
        self.keys, self.values, self.last = ([x.clone() for x in buffers] for buffers in (keys, values, last))

    def append(self, k, v, window=None):
        """As KVCache.append"""
        self.new, self.given = (k, v), super().append(k, v, window)
        return self.given

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """F.scaled_dot_product_attention, by ONNX Runtime's operator if it is that of new tokens to the cached ones."""
        (B, H, _, D), i = q.shape, self.layer - 1
        is_ours = k is self.given[0] and v is self.given[1] and attn_mask is self.mask
        if not is_ours or k.shape != v.shape or D % 8:
            return torch_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        inputs, total = [x.transpose(1, 2).flatten(2) for x in (q, *self.new)], self.length.int()  # (B, T, H * D) each
        y, self.keys[i], self.values[i] = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention", [*inputs, *self.past[i], (total - 1).expand(B), total],
            {"num_heads": H, "kv_num_heads": k.size(1), "scale": scale or D**-0.5,
             "local_window_size": self.window or -1},
            dtypes=[q.dtype] * 3, shapes=[inputs[0].shape, k.shape, v.shape], version=1)
        return y.unflatten(2, (H, D)).transpose(1, 2)


# ---- check ----


@cache
def example():
    """The functions of docs/sample_onnx.py, name → object."""
    return runpy.run_path(Path(__file__).parents[2] / "docs/sample_onnx.py")


@torch.no_grad()
def check_logits(path, model, data, end_of_text, tolerance):
    """Raise NotExportable unless ONNX Runtime gives a model's logits with the file's `data`.

    Returns the largest difference, divided by the largest logit. Reads a block, half of one and, with a cache, the rest
    of it token by token; one sequence, and two.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoOperator

    T, differences, tokens = model.config.block_size, [], check_tokens(model, end_of_text, model.config.block_size)
    for idx in (tokens[1], torch.cat(tokens)):  # (1, T), (2, T)
        try:
            exported = example()["Model"](data, len(idx))
        except NoOperator as error:
            raise NotExportable(f"{path} cannot be exported: ONNX Runtime cannot run it: {error}") from error
        expected = model(idx)[..., torch.tensor(exported.info["token_ids"])].numpy()  # (B, T, U)
        for start, end in [(0, T), (0, T // 2), *((t, t + 1) for t in range(T // 2, T) if exported.has_cache)]:
            logits = exported(idx[:, start:end].numpy(), start)
            differences.append(np.abs(logits - expected[:, end - 1]).max() / np.abs(expected).max())
    if not max(differences) <= tolerance:  # so that NaN is an error, too
        raise NotExportable(f"{path} cannot be exported: in ONNX Runtime the logits would differ by up to "
                            f"{max(differences):.2g} of the largest, more than {tolerance:g}")
    return max(differences)

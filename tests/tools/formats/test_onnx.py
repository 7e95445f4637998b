"""tools/formats/onnx_file: ONNX Runtime gives the logits of a run, and docs/sample_onnx.py its stories."""

import base64
import copy
import itertools
import json
import math

import numpy as np
import pytest
import tiktoken
import torch

onnx = pytest.importorskip("onnx", reason="pip install -r requirements-extra.txt")
pytest.importorskip("onnxruntime", reason="pip install -r requirements-extra.txt")
pytest.importorskip("onnxscript", reason="pip install -r requirements-extra.txt")

import modern
from conftest import ROOT
from model import GPT, GPTConfig
from modern import make_model
from storygpt import checkpoint, generate
from storygpt.corpus.tokenizer import Tokenizer
from test_edits import CHANGES
from tools.formats import NotExportable, SavedModel, onnx_file
from tools.formats.onnx_file import check_logits, convert, example, write_onnx

SHAPE = dict(vocab_size=301, block_size=12, n_layer=1, n_head=2, n_embd=16, dropout=0.0)
ODD_SHAPE = dict(vocab_size=301, block_size=5, n_layer=1, n_head=3, n_embd=54, dropout=0.0, bias=False, gelu="exact")


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """An export of the run out/tiny, and what was said about it."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    return path, write_onnx(path, SavedModel.load(trained / "out/tiny"), "float32")


def check(model, dtype="float32", noise=True):
    """Export a model as the tool does, compare the logits, and return the onnx.ModelProto."""
    for p in model.eval().requires_grad_(False).parameters():
        p += noise * 0.1 * torch.randn_like(p)  # no weights that are 0, as some are in a new model
    data = convert("out/run/ckpt.pt", copy.deepcopy(model), dtype, {})
    check_logits("out/run/ckpt.pt", model, data, 300, {"float32": 1e-5, "int8": 0.03}[dtype])
    if dtype == "float32":
        check_greedy_tokens(model, data, [300, 1, 2])
    return onnx.load_from_string(data)


def check_greedy_tokens(model, file, tokens):
    """Compare 60 tokens of docs/sample_onnx.py with those of the program."""
    expected = [int(token) for token in generate.generate(model, torch.tensor([tokens]), 60, temperature=0)]
    steps = example()["generate"](example()["Model"](file), tokens, np.random.default_rng(0), temperature=1e-6)
    assert list(itertools.islice(steps, 60)) == expected


def operators(proto):
    return {node.op_type for node in proto.graph.node}


def test_greedy_tokens_are_those_of_generate_also_when_the_window_moves(trained, exported):
    model, tokenizer, _ = checkpoint.load_model(trained / "out/tiny/ckpt.pt")
    check_greedy_tokens(model, exported[0], [tokenizer.end_of_text, *tokenizer.encode("One day")])


def test_the_example_prints_a_story(exported, capsys):
    for _ in range(2):
        example()["main"](exported[0], "One day, 🦊", "1")
    out, err = capsys.readouterr()
    assert out[:len(out) // 2] == out[len(out) // 2:] and out.startswith("One day, 🦊") and len(out) > 50
    assert err.count(" tokens/s\n") == 2


def test_a_token_is_sampled_from_the_top_k():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32)) * 2
    rng = np.random.default_rng(0)
    counts = np.bincount([example()["sample"](logits, rng, 2.0, 2) for _ in range(2000)], minlength=4)
    assert counts[[0, 2]].sum() == 0
    assert counts[1] / 2000 == pytest.approx(4 / 7, abs=0.05)


def test_the_file_contains_what_an_application_needs(trained, exported):
    path, words = exported
    assert words.startswith(" in float32; logits differ by up to ")
    data = path.read_bytes()
    assert b".py" not in data and str(ROOT).encode() not in data and b"out/tiny" not in data
    info = example()["Model"](data).info
    tokenizer = Tokenizer.load(trained / "out/tiny")
    parts = info["tokenizer"]
    parts["mergeable_ranks"] = {base64.b64decode(text): rank for text, rank in parts["mergeable_ranks"].items()}
    text = "Once  upon a time\n🦊 naïve"
    assert tiktoken.Encoding(**parts).encode_ordinary(text) == tokenizer.encode(text)
    assert (info["block_size"], info["end_of_text"], info["training_tokens"]) == (16, tokenizer.end_of_text, 1536)
    assert info["training_settings"]["learning_rate"] == 0.01 and info["losses"]["val_loss"] > 1


@pytest.mark.parametrize("n_embd, dtype", [(36, "float32"), (48, "float32"), (48, "int8")])
def test_modern_with_odd_sizes_and_a_window(n_embd, dtype, monkeypatch):
    monkeypatch.setattr(modern, "WINDOW", 3)
    shape = ODD_SHAPE | {"n_embd": n_embd, "block_size": 9}
    proto = check(make_model(GPTConfig(architecture="modern", **shape)), dtype)
    assert ("GroupQueryAttention" in operators(proto)) == (n_embd == 48)  # its heads have a multiple of 8


@pytest.mark.parametrize("names, shape, dtype, has_cache", [
    (["MLPOfSequential", "MultiQueryAttention", "UntiedHead"], SHAPE, "int8", True),
    (["MixtureOfExperts", "ParallelBlock", "soft_cap_of_the_logits"], ODD_SHAPE, "float32", True),
    (["WeightNorm", "attention_written_out", "HeadWithBias"], ODD_SHAPE, "int8", False),
    (["ForwardHooks", "forward_without_a_cache"], SHAPE, "float32", False),
])
def test_edits_of_the_model_are_followed(names, shape, dtype, has_cache, monkeypatch, capsys):
    for name in names:
        monkeypatch.setattr(*CHANGES[name])
    proto = check(make_model(GPTConfig(**shape)), dtype)
    assert ("past_0" in [value.name for value in proto.graph.input]) == has_cache
    assert ("GroupQueryAttention" in operators(proto)) == (has_cache and shape is SHAPE)


def test_rows_that_are_equal_are_stored_and_computed_once():
    used = torch.arange(0, 3000, 3)
    model = make_model(GPTConfig(**SHAPE | {"architecture": "modern", "vocab_size": 3001})).requires_grad_(False)
    rows = model.transformer.wte.weight[used]
    model.transformer.wte.weight.fill_(0.01).index_copy_(0, used, rows)
    proto = check(model, "int8", noise=False)
    assert [json.loads(prop.value) for prop in proto.metadata_props if prop.key == "token_ids"] == [used.tolist()]
    sizes = [math.prod(t.dims) for t in proto.graph.initializer if t.data_type != onnx.TensorProto.INT64]
    assert sorted(size for size in sizes if size > 10_000) == [1001 * 16, 3001 * 16]  # tied, and the value embedding
    assert "MatMulNBits" in operators(proto) and "GroupQueryAttention" in operators(proto)


def test_a_forward_of_its_own_is_kept_in_int8():
    model = make_model(GPTConfig(**SHAPE))
    layer = model.transformer.h[0].mlp.c_fc
    layer.forward = lambda x: 3 * torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert len([node for node in check(model, "int8").graph.node if node.op_type == "MatMulNBits"]) == 4  # of five


def test_int8_that_changes_the_logits_too_much_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_file.TOLERANCE, "int8", 1e-5)
    with pytest.raises(NotExportable, match="in ONNX Runtime the logits would differ by up to"):
        write_onnx(tmp_path / "x.onnx", SavedModel.load(trained / "out/tiny"), "int8")


def test_a_model_with_an_operator_that_the_runtime_lacks_is_refused_in_one_line(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(GPT, "hidden_states", lambda self, idx, *args, hidden_states=GPT.hidden_states: (
        lambda x: x + 0.1 * torch.randn_like(x))(hidden_states(self, idx, *args)))
    with pytest.raises(NotExportable, match="ckpt.pt cannot be exported: ONNX Runtime cannot run it: [^\\n]+$"):
        write_onnx(tmp_path / "x.onnx", SavedModel.load(trained / "out/tiny"), "float32")


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(*CHANGES["ChosenExpert"])
    with pytest.raises(NotExportable, match="^run cannot be exported: torch.onnx cannot trace its model: [^\\n]+$"):
        convert("run", make_model(GPTConfig(**SHAPE)).eval(), "float32", {})
    assert capfd.readouterr() == ("", "")

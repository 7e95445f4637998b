"""tools/hf: transformers gives the same results with an exported model, and an imported model becomes a run."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn as nn

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-extra.txt")
gguf = pytest.importorskip("gguf", reason="pip install -r requirements-extra.txt")
from huggingface_hub import constants
from safetensors.torch import load, save

import prepare
import sample
import train
from conftest import ROOT, TINY, records
from model import GPT, Block, CausalSelfAttention, GPTConfig
from storygpt import checkpoint
from storygpt.corpus.dataset import Split
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from storygpt.generate import generate
from tools import export, hf
from tools.formats import gguf_file, hf_folder

SHAPE = dict(vocab_size=300, block_size=16, n_layer=2, n_head=2, n_embd=16)  # of out/tiny
TEXTS = ["Once upon a time, there was a fox.", "  two  spaces\n\n and lines \n", "trailing   ", "", "\n",
         "naïve 🦊 façade\tx1234567 don't I'LL", "\r\n\r\n  \n x\u00a0y\u2003z  ", "一二三 été №5 ½ … !?!?  --",
         " \n\n\n  a  \n b"]
README = (ROOT / "README.md").read_text().replace(END_OF_TEXT, "")  # transformers would encode it as the token
# The pattern of cl100k_base, whose vocabulary would have to be downloaded.
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
          r"\s+(?!\S)|\s")


def load_export(out_dir, folder):
    """Export a run; returns the model and the tokenizer as loaded by transformers."""
    export.main([out_dir, folder])
    return (transformers.AutoModelForCausalLM.from_pretrained(folder),
            transformers.AutoTokenizer.from_pretrained(folder))


def validation_tokens(B, T):
    """The first B windows of T tokens of the validation split: (B, T)."""
    split = Split("data/nursery-bpe300", "validation", T)
    return torch.from_numpy(split.windows(range(0, B * T, T))[0])  # (B, T)


def test_exported_model_and_tokenizer_give_equal_results(run, capsys, fails):
    hf_model, hf_tokenizer = load_export("out/tiny", "model")
    assert "model: exported out/tiny/ckpt.pt, 11,648 parameters" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["data", "model", "out"]
    model, tokenizer, state = checkpoint.load_model(Path("out/tiny/ckpt.pt"))
    idx = validation_tokens(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(hf_model(idx).logits, model(idx), atol=1e-4, rtol=0)
    for text in [*TEXTS, README]:
        assert hf_tokenizer.encode(text) == tokenizer.encode(text)
        assert hf_tokenizer.decode(tokenizer.encode(text)) == text
    assert hf_tokenizer.encode(END_OF_TEXT) == [299] == [hf_tokenizer.eos_token_id]
    assert hf_tokenizer.model_max_length == hf_model.config.n_ctx == 16
    prompt = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("One")]])
    new = 16 - prompt.size(1)
    story = [int(token) for token in generate(model, prompt, new, temperature=0, end_of_text=tokenizer.end_of_text)]
    hf_story = hf_model.generate(prompt, max_new_tokens=new, do_sample=False, temperature=1.0, top_k=50)
    assert hf_story[0, prompt.size(1):].tolist() == story

    card = Path("model/README.md").read_text(encoding="utf-8")
    for text in (f"{state['metrics']['val_loss']:.4f} nats/token", f"{state['metrics']['val_bpb']:.4f} bits per byte",
                 "| learning_rate | 0.01 |", "| training data | 1,536 tokens of nursery-bpe300 (",
                 "tokens in 54 stories)", "bpe300, 300 tokens"):
        assert text in card
    code = card.split("```python")[1].split("```")[0].replace("max_length=16", "max_length=16, do_sample=False")
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert "python -m tools.hf import model out/NAME" in fails(sample.main, ["--out_dir=model"])


def edit(monkeypatch, cls, layers, **methods):
    """Edit a class of model.py: `layers` (attribute → function of the GPTConfig) and methods replace its own."""
    def init(self, config, init=cls.__init__):
        init(self, config)
        for name, make in layers.items():
            setattr(self, name, make(config))
    for name, method in {"__init__": init, **methods}.items():
        monkeypatch.setattr(cls, name, method)


@pytest.mark.parametrize("bias, cls, layers, methods, parameter", [
    (True, Block, {"ln_1": lambda c: nn.RMSNorm(c.n_embd)}, {}, "h.0.ln_1.bias"),
    (False, Block, {"ln_1": lambda c: nn.RMSNorm(c.n_embd)}, {}, None),  # the names and shapes are GPT-2's
    # What depends on the length of the text, but not in a full block, and what only an end of text changes.
    (True, CausalSelfAttention, {}, {"attend": lambda self, q, k, v, cache, attend=CausalSelfAttention.attend: attend(
        self, q * (q.size(2) / 16) ** 0.5, k, v, cache)}, None),
    (True, GPT, {}, {"hidden_states": lambda self, idx, *args, hidden_states=GPT.hidden_states: hidden_states(
        self, idx, *args) + (idx == 299)[..., None] * torch.arange(16)}, None),
])
def test_a_model_that_is_no_gpt2_is_not_exported(run, fails, monkeypatch, bias, cls, layers, methods, parameter):
    edit(monkeypatch, cls, layers, **methods)
    write_run("out/edited", GPTConfig(**SHAPE, bias=bias))
    for target in ("model", "model.gguf"):
        error = fails(export.main, ["out/edited", target])
        if parameter:
            assert "out/edited/ckpt.pt is not a GPT-2: " in error and f"transformer.{parameter}" in error
        else:
            difference = re.search(r"the logits would change by up to ([\d.]+) of the largest", error)
            assert difference and float(difference[1]) > 1e-3
        assert sorted(os.listdir()) == ["data", "out"]


def check_logits_after_export_and_import(name, model):
    """Check that the exported run out/NAME and its import have the logits of this model."""
    idx = validation_tokens(2, 16)
    hf_model, _ = load_export(f"out/{name}", name)
    torch.testing.assert_close(hf_model(idx).logits, model(idx), atol=1e-5, rtol=0)
    hf.main(["import", name, "out/back"])
    torch.testing.assert_close(checkpoint.load_model(Path("out/back/ckpt.pt"))[0](idx), model(idx))


@torch.no_grad()
def test_a_model_with_an_untied_head(run, monkeypatch, fails):
    with monkeypatch.context() as edited:
        edit(edited, GPT, {"lm_head": lambda c: nn.Linear(c.n_embd, c.vocab_size, bias=False)})
        model = write_run("out/untied", GPTConfig(**SHAPE))
        check_logits_after_export_and_import("untied", model)
        export.main(["out/untied", "untied.gguf"])
        values = torch.tensor(read_gguf("untied.gguf")[1]["output.weight"][1])
        torch.testing.assert_close(values, model.lm_head.weight, atol=1e-3, rtol=0)
    assert "the model shares transformer.wte.weight with another" in fails(hf.main, ["import", "untied", "out/tied"])


@torch.no_grad()
def test_a_model_without_biases_and_with_the_exact_gelu(run):
    check_logits_after_export_and_import("bare", write_run("out/bare", GPTConfig(**SHAPE, bias=False, gelu="exact")))


def test_export_then_import_gives_the_same_model_which_can_be_fine_tuned(run, capsys, fails):
    export.main(["out/tiny", "a model"])
    assert "python -m tools.hf import 'a model' out/NAME" in fails(sample.main, ["--out_dir=a model"])
    hf.main(["import", "a model", "out/it is back"])
    out = capsys.readouterr().out
    assert "out/it is back: " in out and "--tokenizer 'out/it is back'\n" in out
    assert "--out_dir 'out/it is back'\n" in out and "--init_from='out/it is back' " in out
    Path("out/it is back").rename("out/back")
    (model, tokenizer, _), (back, back_tokenizer, _) = (checkpoint.load_model(Path(f"out/{name}/ckpt.pt"))
                                                         for name in ("tiny", "back"))
    assert back_tokenizer == tokenizer and back_tokenizer.name == tokenizer.name
    torch.testing.assert_close(back.state_dict(), model.state_dict(), atol=0, rtol=0)
    export.main(["out/back", "again"])
    card = Path("again/README.md").read_text(encoding="utf-8")
    assert "| training data | unknown (imported model) |" in card and "learning_rate" not in card
    sample.main(["--out_dir=out/back", "--seed=1"])
    assert "out/back/ckpt.pt: trained elsewhere" in capsys.readouterr().err

    prepare.main(["nursery", "--tokenizer", "out/back", "--max_stories", "30", "--seed", "5"])
    flags = [flag for flag in TINY if not flag.startswith(("--dataset", "--n_", "--block"))]
    train.main([*flags, "--dataset=nursery-back", "--init_from=out/back", "--block_size=8", "--out_dir=out/tuned"])
    steps = records("out/tuned", "step")
    assert checkpoint.load_model(Path("out/tuned/ckpt.pt"))[0].config.block_size == 8
    assert steps[0]["loss"] < 5.3  # ln 300 is 5.7
    assert "no checkpoint out/back/last.pt" in fails(train.main, ["--out_dir=out/back", "--resume"])
    train.main(["--out_dir=out/back", "--eval_only", "--dataset=nursery-bpe300"])
    assert "perplexity: " in capsys.readouterr().out


@torch.no_grad()
def randomize(model):
    """Add noise to all weights, also to biases and norms, which are initialized to zeros and ones."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def write_run(out_dir, config):
    """Write a model with random weights, and the tokenizer of out/tiny, as a run; returns the model."""
    model = randomize(GPT(config))
    hf.write_run(Path(out_dir), model, Tokenizer.load("out/tiny"), overwrite=False)
    return model


def random_gpt2(**settings):
    """A transformers GPT-2 with random weights."""
    shape = {"vocab_size": 300, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 299,
             "eos_token_id": 299}
    return randomize(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | settings)))


def save_gpt2(tokenizer, folder="gpt2", **settings):
    """Save a `random_gpt2` and a tokenizer to a folder; returns the model."""
    hf_model = random_gpt2(**settings)
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return hf_model


@pytest.fixture
def hf_tokenizer(run):
    return hf_folder.to_hf_tokenizer(Tokenizer.load("out/tiny"), 24)


@pytest.mark.parametrize("settings", [
    {"vocab_size": 320}, {"activation_function": "gelu_pytorch_tanh"}, {"activation_function": "gelu"},
    {"n_inner": 128, "resid_pdrop": 0.0}])
def test_import_of_a_model_created_by_transformers(hf_tokenizer, capsys, settings):
    hf_model = save_gpt2(hf_tokenizer, **settings)
    hf.main(["import", "gpt2", "out/gpt2"])
    assert ("dropped 20 token embeddings beyond the tokenizer's 300" in capsys.readouterr().out) == (
        "vocab_size" in settings)
    model, tokenizer, _ = checkpoint.load_model(Path("out/gpt2/ckpt.pt"))
    idx = validation_tokens(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), hf_model(idx).logits[..., :300], atol=1e-4, rtol=0)
    for text in TEXTS:
        assert tokenizer.encode(text) == hf_tokenizer.encode(text)


def test_import_with_other_special_tokens_and_another_eos_token(run, hf_tokenizer):
    merges = json.loads(hf_tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    other_tokenizer = transformers.GPT2Tokenizer(
        vocab={token: i for token, i in hf_tokenizer.get_vocab().items() if i < 299} | {"</s>": 299},
        merges=[tuple(pair) for pair in merges], eos_token="</s>", bos_token="</s>", unk_token="</s>",
        pad_token="<pad>")
    save_gpt2(other_tokenizer, vocab_size=301)
    hf.main(["import", "gpt2", "out/gpt2"])
    tokenizer = Tokenizer.load("out/gpt2")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (301, 299)
    assert tokenizer.encode("</s> One day") == [*tokenizer.encode("</s>"), *hf_tokenizer.encode(" One day")]


@pytest.mark.parametrize("settings, complaint", [
    ({"activation_function": "relu"}, "is not a GPT-2 model with GELU"),
    ({"n_inner": 64}, "shape torch.Size([64, 32])"),
    ({"layer_norm_epsilon": 1e-3}, "has layer_norm_epsilon = 0.001, which model.py does not have"),
    ({"vocab_size": 290, "eos_token_id": 2, "bos_token_id": 2}, "shape torch.Size([290, 32])"),
])
def test_other_architectures_are_rejected(hf_tokenizer, fails, settings, complaint):
    save_gpt2(hf_tokenizer, **settings)
    assert complaint in fails(hf.main, ["import", "gpt2", "out/gpt2"])
    assert not Path("out/gpt2").exists()


@pytest.mark.parametrize("change", [
    lambda t: t["model"]["merges"].reverse(),
    lambda t: t["model"]["vocab"].update(qxz=300),
    lambda t: t["model"]["vocab"].pop("!"),
    lambda t: t.update(normalizer={"type": "Lowercase"}),
    lambda t: t["model"].update(dropout=0.5),
    lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 300, "content": "xyzzy", "special": False}),
    lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
])
def test_other_tokenizers_are_rejected(hf_tokenizer, fails, change):
    save_gpt2(hf_tokenizer)
    for name, apply in (("tokenizer", change),
                        ("tokenizer_config", lambda t: t.update(tokenizer_class="PreTrainedTokenizerFast"))):
        path = Path(f"gpt2/{name}.json")
        description = json.loads(path.read_text())
        apply(description)
        path.write_text(json.dumps(description))
    assert "is not a byte-level BPE" in fails(hf.main, ["import", "gpt2", "out/gpt2"])


def test_damaged_model_folders_give_one_line(hf_tokenizer, fails):
    save_gpt2(hf_tokenizer)
    path = Path("gpt2/model.safetensors")
    intact, weights = path.read_bytes(), load(path.read_bytes())
    path.write_bytes(intact[:1000])
    for source in ("gpt2", "nobody/nothing"):
        assert f"cannot load the model {source}: " in fails(hf.main, ["import", source, "out/x"])
    for source in ("none/ckpt.pt", "./none", "a/b/c"):
        assert f"there is no {source}: give a model folder" in fails(hf.main, ["import", source, "out/x"])
    del weights["transformer.h.1.mlp.c_fc.weight"]
    path.write_bytes(save(weights, {"format": "pt"}))
    assert "gpt2 is damaged: transformer.h.1.mlp.c_fc.weight is missing" in fails(hf.main, ["import", "gpt2", "out/x"])
    path.write_bytes(intact)
    Path("gpt2/tokenizer.json").unlink()
    assert "the tokenizer of gpt2 is not a byte-level BPE" in fails(hf.main, ["import", "gpt2", "out/x"])


def test_import_of_a_hub_model_from_the_cache(hf_tokenizer, monkeypatch):
    save_gpt2(hf_tokenizer, "cache/models--someone--stories/snapshots/0123abcd")
    Path("cache/models--someone--stories/refs").mkdir()
    Path("cache/models--someone--stories/refs/main").write_text("0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "cache")  # huggingface_hub has read the environment already
    hf.main(["import", "someone/stories", "out/gpt2"])
    assert checkpoint.load_model(Path("out/gpt2/ckpt.pt"))[0].config.block_size == 24


# ---- nanoGPT ----

@torch.no_grad()
def save_nanogpt(change=lambda state: None, bias=False, vocab_size=50304):
    """Save nano.pt as nanoGPT's train.py does, after `change` of its dict; returns the same model of transformers.

    nanoGPT's parameters have transformers' names, but its matrices are torch's, (out, in).
    """
    hf_model = random_gpt2(vocab_size=vocab_size, activation_function="gelu")
    if not bias:
        for name, p in hf_model.named_parameters():
            p.mul_(not name.endswith(".bias"))
    weights = {name: p.mT if ".h." in name and p.dim() == 2 else p for name, p in hf_model.state_dict().items()
               if bias or not name.endswith(".bias")}
    shape = dict(n_layer=2, n_head=4, n_embd=32, block_size=24, bias=bias, vocab_size=vocab_size, dropout=0.1)
    state = {"model": weights, "optimizer": {"state": {}, "param_groups": []}, "model_args": shape, "iter_num": 2000,
             "best_val_loss": torch.tensor(3.2), "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True}}
    change(state)
    torch.save(state, "nano.pt")
    return hf_model


def as_saved_by_old_versions(state):
    """Give the weights of a nanoGPT checkpoint the prefix of torch.compile, and add the attention masks."""
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 24, 24).tril() for layer in range(2)}
    state["model"] = {f"_orig_mod.{name}": p for name, p in (state["model"] | masks).items()}


@torch.no_grad()
@pytest.mark.parametrize("settings, change", [
    ({}, lambda state: None), ({"bias": True, "vocab_size": 50257}, as_saved_by_old_versions)])
def test_import_of_a_checkpoint_of_nanogpt_without_transformers(here, monkeypatch, capsys, settings, change):
    nanogpt, idx = save_nanogpt(change, **settings), torch.randint(50257, (2, 24))
    logits = nanogpt(idx).logits[..., :50257]
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    hf.main(["import", "nano.pt", "out/nano"])
    assert ("dropped 47 token embeddings" in capsys.readouterr().out) == (not settings)
    model, tokenizer, _ = checkpoint.load_model(Path("out/nano/ckpt.pt"))
    assert tokenizer == Tokenizer.named("gpt2") and model.config.bias == settings.get("bias", False)
    assert model.config.gelu == "exact" and model.config.dropout == 0.1
    torch.testing.assert_close(model(idx), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("change, complaint", [
    (lambda state: state["model_args"].update(vocab_size=65), "has 65 tokens: only models with GPT-2's tokenizer"),
    (lambda state: state["model_args"].update(n_kv_head=1), "unexpected keyword argument 'n_kv_head'"),
    (lambda state: state["model_args"].update(n_layer=1), "transformer.h.1.ln_1.weight"),
    (lambda state: state["model"].pop("transformer.wte.weight"), "KeyError: 'transformer.wte.weight'"),
    (lambda state: state["model"]["transformer.ln_f.weight"].fill_(torch.nan), "some weights are not finite"),
    (lambda state: state.pop("model_args"), "nano.pt is not a checkpoint of nanoGPT"),
    (lambda state: state["config"].update(learning_rate=np.float64(6e-4)), "not loaded because that can run code"),
])
def test_other_checkpoints_than_nanogpts_are_rejected(here, fails, change, complaint):
    save_nanogpt(change)
    assert complaint in fails(hf.main, ["import", "nano.pt", "out/nano"])
    assert not Path("out").exists()


def test_import_of_a_checkpoint_of_nanogpt_without_gpt2s_vocabulary(here, monkeypatch, fails):
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here / "empty"))
    save_nanogpt()
    message = fails(hf.main, ["import", "nano.pt", "out/nano"])
    assert "GPT-2's vocabulary, which a checkpoint of nanoGPT does not contain, cannot be downloaded (ProxyE" in message
    assert "TIKTOKEN_CACHE_DIR" in message and "bpe:" not in message and not Path("out").exists()


# ---- tokenizers and command line ----

def test_export_and_import_of_gpt2s_vocabulary(here):
    tokenizer = Tokenizer.named("gpt2")
    hf_tokenizer = hf_folder.to_hf_tokenizer(tokenizer, 1024)
    for text in [*TEXTS, README, (ROOT / "storygpt/corpus/nursery.py").read_text()[:20_000]]:
        assert hf_tokenizer.encode(text) == tokenizer.encode(text)
    back = hf.from_hf_tokenizer("x", hf_tokenizer)
    assert back == tokenizer and back.name == "gpt2"


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K])
def test_export_of_tokenizers_with_other_patterns(here, pattern):
    ranks = Tokenizer.named("gpt2").ranks
    ranks = {token: rank for token, rank in ranks.items() if rank < 5000}
    specials = {END_OF_TEXT: 5002, "<|fim_prefix|>": 5004}  # with gaps between the ids, like cl100k_base
    tokenizer = Tokenizer("x", pattern, ranks, specials)
    hf_folder.to_hf_tokenizer(tokenizer, 64).save_pretrained("model")
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    code = (ROOT / "train.py").read_text()
    for text in [*TEXTS, code, code.upper(), code.replace("\n", "\r\n"), "ÀÉ '\"" + code[:100] + " 'S 'lL\r\n \r\n"]:
        assert hf_tokenizer.encode(text) == tokenizer.encode(text)
    assert hf_tokenizer.eos_token_id == 5002 and hf_tokenizer.encode("<|fim_prefix|>") == [5004]


def test_existing_folders_are_replaced_only_with_overwrite(run, fails):
    export.main(["out/tiny", "model"])
    assert "model already exists" in fails(export.main, ["out/tiny", "model"])
    assert "out/tiny already contains a run" in fails(hf.main, ["import", "model", "out/tiny"])
    hf.main(["import", "model", "out/tiny", "--overwrite"])
    assert sorted(os.listdir("out/tiny")) == [".lock", "ckpt.pt", "meta.json", "tokenizer.tiktoken"]


@pytest.mark.parametrize("words, complaint", [
    (["model", "--modelfile"], "--modelfile has no effect on model: it is for .gguf files"),
    (["model", "--dtype=f16"], "--dtype f16 is not a dtype of model: use float32"),
    (["model.onnx", "--dtype=f16"], "use float32 or int8"),
    (["model.pt"], "model.pt ends in .pt: use .html, .onnx or .gguf"),
    (["model.html", "--modelfil"], "did you mean --modelfile?")])
def test_wrong_endings_and_flags(fails, words, complaint):
    assert complaint in fails(export.main, ["out/tiny", *words], code=2)


def test_a_missing_run_a_target_in_a_file_and_a_missing_package(run, fails, monkeypatch):
    assert ". already exists" in fails(export.main, ["out/tiny", "."])
    for target in ("model", "model.gguf"):
        assert "no checkpoint in out/none" in fails(export.main, ["out/none", target])
    Path("file").touch()
    assert "cannot write file/model ([Errno 20] Not a directory" in fails(export.main, ["out/tiny", "file/model"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    assert "pip install -r requirements.txt -r requirements-extra.txt" in fails(export.main, ["out/tiny", "model"])
    assert sorted(os.listdir()) == ["data", "file", "out"]


# ---- GGUF ----

def read_gguf(path):
    """The metadata of a GGUF file, key → value, and its tensors, name → (type, float32 array)."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return {key: field.contents() for key, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("dtype, file_type, tolerance, bias", [
    ("f16", 1, 1e-3, True), ("bf16", 32, 8e-3, False), ("q8_0", 7, 8e-3, False)])
def test_a_gguf_file_has_the_weights(run, dtype, file_type, tolerance, bias):
    model = write_run("out/wide", GPTConfig(**SHAPE | {"n_embd": 32}, bias=bias))
    export.main(["out/wide", "new/wide.gguf", "--dtype", dtype])
    metadata, tensors = read_gguf("new/wide.gguf")
    assert os.listdir("new") == ["wide.gguf"] and metadata["general.file_type"] == file_type
    weights = model.transformer.state_dict()
    for name, gguf_name, stored in [
            ("wte.weight", "token_embd.weight", dtype.upper()), ("wpe.weight", "position_embd.weight", "F32"),
            ("h.1.attn.c_attn.weight", "blk.1.attn_qkv.weight", dtype.upper()),
            ("ln_f.weight", "output_norm.weight", "F32")]:
        assert tensors[gguf_name][0] == stored
        torch.testing.assert_close(torch.tensor(tensors[gguf_name][1]), weights[name], rtol=0,
                                   atol=tolerance * weights[name].abs().max().item())
    stored, biases = tensors["blk.0.attn_qkv.bias"]  # with bias = False, too
    assert len(tensors) == 28 and stored == "F32" and biases.any() == bias


def test_metadata_and_modelfile_of_a_gguf_file(run, capsys):
    export.main(["out/tiny", "story.gguf", "--modelfile"])
    assert re.search(r"11,648 parameters in f16; logits differ by up to 0\.000\d+ of the", capsys.readouterr().out)
    metadata, _ = read_gguf("story.gguf")
    state = checkpoint.load("out/tiny/ckpt.pt")
    expected = {"general.architecture": "gpt2", "general.name": "story", "gpt2.context_length": 16,
                "gpt2.block_count": 2, "gpt2.attention.head_count": 2, "gpt2.embedding_length": 16,
                "gpt2.feed_forward_length": 64, "tokenizer.ggml.bos_token_id": 299, "tokenizer.ggml.eos_token_id": 299,
                "tokenizer.ggml.add_bos_token": True,
                "general.description": "GPT-2 architecture, 11,648 parameters, trained on 1,536 tokens of "
                f"nursery-bpe300, validation loss {state['metrics']['val_loss']:.4f} nats/token"}
    assert {key: metadata[key] for key in expected} == expected and "general.license" not in metadata
    settings = json.loads(metadata["training.settings"])
    assert settings == {name: value for name, value in state["config"].items() if name != "out_dir"}
    assert metadata["tokenizer.ggml.token_type"][298:] == [1, 3]
    assert metadata["tokenizer.ggml.tokens"][299] == END_OF_TEXT
    lines = Path("story.Modelfile").read_text().splitlines()
    assert "FROM ./story.gguf" in lines and "PARAMETER num_ctx 16" in lines and "PARAMETER num_predict 12" in lines
    assert "PARAMETER temperature 0.8" in lines and "PARAMETER top_k 200" in lines


def test_an_export_tells_no_paths_and_no_settings_that_are_not_known(run):
    train.main([*TINY, f"--init_from={run}/out/tiny", "--max_iters=2", "--out_dir=out/tuned"])
    write_run("out/imported", GPTConfig(**SHAPE))
    for name in ("tuned", "imported"):
        export.main([f"out/{name}", f"{name}.gguf"])
        export.main([f"out/{name}", name])
        assert str(run).encode() not in Path(f"{name}.gguf").read_bytes()
        assert str(run) not in Path(name, "README.md").read_text(encoding="utf-8")
    assert json.loads(read_gguf("tuned.gguf")[0]["training.settings"])["init_from"] == "tiny"
    assert "| init_from | tiny |" in Path("tuned/README.md").read_text(encoding="utf-8")
    assert "training.settings" not in read_gguf("imported.gguf")[0]


def test_a_gguf_file_has_the_tokenizer(run):
    """As read by transformers, which encodes as GPT-2 does if the vocabulary and the merges are right."""
    tokenizer = Tokenizer.load("data/nursery-bpe300")
    model = GPT(GPTConfig(**SHAPE | {"vocab_size": 302}))  # padded, as some models are
    gguf_file.write_weights("model.gguf", model, "f16", tokenizer)
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")
    for text in [*TEXTS, README]:
        assert hf_tokenizer.encode(text) == [299, *tokenizer.encode(text)]
    assert hf_tokenizer.convert_ids_to_tokens(300) == "[UNUSED300]"


def test_what_gguf_cannot_hold_gives_one_line(run, fails):
    def error(out_dir, *words):
        line = fails(export.main, [out_dir, *words])
        assert sorted(os.listdir()) == ["data", "other.gguf", "out", "x.Modelfile"], "nothing may be left"
        return line
    Path("other.gguf").touch()
    Path("x.Modelfile").touch()
    assert "other.gguf already exists" in error("out/tiny", "other.gguf")
    assert "x.Modelfile already exists" in error("out/tiny", "x.gguf", "--modelfile")
    assert error("out/tiny", "new/x.gguf", "--dtype=q8_0").startswith("error: q8_0 stores blocks of 32")
    tokenizer = Tokenizer.load("out/tiny")
    other = Tokenizer("x", CL100K, tokenizer.ranks, tokenizer.special_tokens)
    hf.write_run(Path("out/x"), GPT(GPTConfig(**SHAPE)), other, overwrite=False)
    assert "the tokenizer x cannot be written as GGUF" in error("out/x", "x.gguf")
    state = torch.load("out/tiny/ckpt.pt")
    state["model"]["transformer.h.0.mlp.c_proj.weight"] *= 1e7  # more than float16 has
    torch.save(state, "out/tiny/ckpt.pt")
    assert "the logits would change by up to " in error("out/tiny", "x.gguf")

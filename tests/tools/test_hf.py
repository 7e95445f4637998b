"""tools/hf: transformers computes what this program does with an export, and a run is made of a model of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-extra.txt")

import checkpoint
import prepare
import sample
import train
from conftest import ROOT, TINY
from model import GPT, GPTConfig
from tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer
from tools import hf

TEXTS = ["Once upon a time, there was a fox.", "  two  spaces\n\n and lines \n", "trailing   ", "", "\n",
         "naïve 🦊 façade\tx1234567 don't I'LL", "\r\n\r\n  \n x\u00a0y\u2003z  ", "一二三 été №5 ½ … !?!?  --",
         " \n\n\n  a  \n b"]
README = (ROOT / "README.md").read_text().replace(END_OF_TEXT, "")  # which transformers takes for the token
# As tiktoken has them for cl100k_base and o200k_base; their vocabularies are not on this machine.
CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
          r"\s+(?!\S)|\s")
O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])


@pytest.fixture
def run(trained, here):
    """An empty folder with out/tiny and its data in it."""
    shutil.copytree(trained / "out/tiny", "out/tiny")
    os.symlink(trained / "data", "data")
    return here


def exported(*words):
    hf.main(["export", *words])
    folder = words[1]
    return (transformers.AutoModelForCausalLM.from_pretrained(folder),
            transformers.AutoTokenizer.from_pretrained(folder))


def some_tokens(B, T):
    split = train.Split("data/nursery-bpe300", "validation", T)
    return torch.from_numpy(split.windows(range(0, B * T, T))[0])  # (B, T)


def test_transformers_computes_the_same_from_an_export(run, capsys):
    theirs, their_tokenizer = exported("out/tiny", "model")
    assert "model: the " in capsys.readouterr().out
    model, tokenizer, _ = checkpoint.load_model(Path("out/tiny/ckpt.pt"))
    idx = some_tokens(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-4, rtol=0)
    for text in [*TEXTS, README]:
        assert their_tokenizer.encode(text) == tokenizer.encode(text)
        assert their_tokenizer.decode(tokenizer.encode(text)) == text
    prompt = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode("One")]])
    new = 16 - prompt.size(1)
    told = [int(token) for token in model.generate(prompt, new, temperature=0, end_of_text=tokenizer.end_of_text)]
    theirs_told = theirs.generate(prompt, max_new_tokens=new, do_sample=False, temperature=1.0, top_k=50)
    assert theirs_told[0, prompt.size(1):].tolist() == told


def test_an_export_says_what_it_is(run, fails):
    theirs, their_tokenizer = exported("out/tiny", "model")
    assert sorted(os.listdir("model")) == ["README.md", "config.json", "generation_config.json", "model.safetensors",
                                           "tokenizer.json", "tokenizer_config.json"]
    state = checkpoint.load("out/tiny/ckpt.pt")
    config = json.loads(Path("model/config.json").read_text())
    assert config["activation_function"] == "gelu_new" and config["n_positions"] == config["n_ctx"] == 16
    assert config["tie_word_embeddings"] and config["architectures"] == ["GPT2LMHeadModel"]
    generation = json.loads(Path("model/generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["bos_token_id"] == 299 == their_tokenizer.eos_token_id
    assert their_tokenizer.model_max_length == 16 and their_tokenizer.bos_token == END_OF_TEXT
    assert their_tokenizer.encode(END_OF_TEXT) == [299]
    card = Path("model/README.md").read_text()
    for said in (f"{state['figures']['val_loss']:.4f} nats", f"{state['figures']['val_bpb']:.4f} bits per byte",
                 "| learning_rate | 0.01 |", "tokens of 54 stories (nursery-bpe300)", "| tokens of training | 1,536 |",
                 "bpe300, 300 tokens"):
        assert said in card
    assert "is a model for transformers: make a run of it with python -m tools.hf import model out/NAME" in fails(
        sample.main, ["--out_dir=model"])
    code = card.split("```python")[1].split("```")[0].replace("max_length=16", "max_length=16, do_sample=False")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.startswith("Once upon a time")


def test_a_model_without_biases(run):
    train.main([*TINY, "--bias=False", "--max_iters=4", "--out_dir=out/bare"])
    theirs, _ = exported("out/bare", "model")
    hf.main(["import", "model", "out/back"])
    idx = some_tokens(2, 16)
    with torch.no_grad():
        logits = checkpoint.load_model(Path("out/bare/ckpt.pt"))[0](idx)
        torch.testing.assert_close(theirs(idx).logits, logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(checkpoint.load_model(Path("out/back/ckpt.pt"))[0](idx), logits)


def test_out_and_back_is_the_same_model(run, capsys):
    hf.main(["export", "out/tiny", "model"])
    hf.main(["import", "model", "out/back"])
    assert "out/back: " in capsys.readouterr().out
    (model, tokenizer, _), (back, its_tokenizer, _) = (checkpoint.load_model(Path(f"out/{name}/ckpt.pt"))
                                                        for name in ("tiny", "back"))
    assert its_tokenizer == tokenizer and its_tokenizer.name == tokenizer.name
    assert model.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(p, back.state_dict()[name]) for name, p in model.state_dict().items())
    hf.main(["export", "out/back", "again"])
    card = Path("again/README.md").read_text()
    assert "| trained on | elsewhere, and imported |" in card and "learning_rate" not in card
    sample.main(["--out_dir=out/back", "--seed=1"])
    assert "out/back/ckpt.pt: trained elsewhere" in capsys.readouterr().err


def test_an_import_is_fine_tuned_with_a_shorter_block_on_data_of_its_tokenizer(run, capsys, fails):
    hf.main(["export", "out/tiny", "model"])
    hf.main(["import", "model", "out/base"])
    prepare.main(["nursery", "--tokenizer", "out/base", "--max_stories", "30", "--seed", "5"])
    tuned = [word for word in TINY if not word.startswith(("--dataset", "--n_", "--block"))]
    train.main([*tuned, "--dataset=nursery-base", "--init_from=out/base", "--block_size=8", "--out_dir=out/tuned"])
    model = checkpoint.load_model(Path("out/tuned/ckpt.pt"))[0]
    steps = [r for r in checkpoint.read_log("out/tuned/log.jsonl") if r["kind"] == "step"]
    assert model.config.block_size == 8 and steps[0]["loss"] < 5.3  # ln 300 is 5.7
    assert "no checkpoint out/base/last.pt" in fails(train.main, ["--out_dir=out/base", "--resume"])
    train.main(["--out_dir=out/base", "--eval_only", "--dataset=nursery-bpe300"])
    assert "perplexity: " in capsys.readouterr().out


def gpt2_folder(tokenizer, folder="theirs", **settings):
    """A GPT-2 of random weights that transformers itself has made and saved, with a tokenizer."""
    torch.manual_seed(0)
    shape = {"vocab_size": 300, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 299,
             "eos_token_id": 299}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape | settings)).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # biases and norms too, which would be zeros and ones
            p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return theirs


@pytest.fixture
def their_tokenizer(run):
    return hf.to_their_tokenizer(Tokenizer.load("out/tiny"), 24)


@pytest.mark.parametrize("settings", [
    {}, {"vocab_size": 320}, {"activation_function": "gelu_pytorch_tanh"}, {"n_inner": 128, "resid_pdrop": 0.0}])
def test_a_model_that_transformers_made(their_tokenizer, capsys, settings):
    theirs = gpt2_folder(their_tokenizer, **settings)
    hf.main(["import", "theirs", "out/theirs"])
    assert ("left out: 20 token embeddings beyond the tokenizer's 300" in capsys.readouterr().out) == (
        "vocab_size" in settings)
    model, tokenizer, _ = checkpoint.load_model(Path("out/theirs/ckpt.pt"))
    idx = some_tokens(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), theirs(idx).logits[..., :300], atol=1e-4, rtol=0)
    for text in TEXTS:
        assert tokenizer.encode(text) == their_tokenizer.encode(text)


def test_other_special_tokens_and_another_name_for_the_end(run, their_tokenizer):
    merges = json.loads(their_tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    theirs = transformers.GPT2Tokenizer(
        vocab={token: i for token, i in their_tokenizer.get_vocab().items() if i < 299} | {"</s>": 299},
        merges=[tuple(pair) for pair in merges], eos_token="</s>", bos_token="</s>", unk_token="</s>",
        pad_token="<pad>")
    gpt2_folder(theirs, vocab_size=301)
    hf.main(["import", "theirs", "out/theirs"])
    tokenizer = Tokenizer.load("out/theirs")
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (301, 299)
    assert tokenizer.encode("</s> One day") == [*tokenizer.encode("</s>"), *their_tokenizer.encode(" One day")]


@pytest.mark.parametrize("settings, complaint", [
    ({"activation_function": "relu"}, "has activation_function = 'relu', and only 'gelu_new'"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ({"n_inner": 64}, "has n_inner = 64, and only 4 * n_embd = 128"),
    ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon = 0.001"),
    ({"n_positions": 1}, "theirs is damaged, by its config.json: block_size = 1 is not allowed"),
    ({"tie_word_embeddings": False}, "has a head that does not share the token embedding"),
    ({"vocab_size": 290, "eos_token_id": 2, "bos_token_id": 2}, "has 290 token embeddings for a tokenizer of 300"),
])
def test_another_architecture_is_refused(their_tokenizer, fails, settings, complaint):
    gpt2_folder(their_tokenizer, **settings)
    assert complaint in fails(hf.main, ["import", "theirs", "out/theirs"])
    assert not Path("out/theirs").exists()


def change_json(path, change):
    value = json.loads(Path(path).read_text())
    change(value)
    Path(path).write_text(json.dumps(value))


@pytest.mark.parametrize("change, complaint", [
    (lambda t: t["model"]["merges"].reverse(), "is not the 256 bytes and a token for each merge"),
    (lambda t: t["model"]["vocab"].update(qxz=300), "is not the 256 bytes and a token for each merge"),
    (lambda t: t["model"]["vocab"].pop("!"), "is not the 256 bytes and a token for each merge"),
    (lambda t: t.update(normalizer={"type": "Lowercase"}), "is not GPT-2's kind"),
    (lambda t: t["model"].update(dropout=0.5), "is not GPT-2's kind"),
    (lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 300, "content": "xyzzy", "special": False}),
     "has words added to it, such as 'xyzzy'"),
    (lambda t: t.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "is not GPT-2's kind"),
])
def test_another_tokenizer_is_refused(their_tokenizer, fails, change, complaint):
    gpt2_folder(their_tokenizer)
    change_json("theirs/tokenizer.json", change)
    change_json("theirs/tokenizer_config.json", lambda t: t.update(tokenizer_class="PreTrainedTokenizerFast"))
    assert complaint in fails(hf.main, ["import", "theirs", "out/theirs"])


def test_a_broken_folder_is_one_line(their_tokenizer, fails):
    gpt2_folder(their_tokenizer)
    whole = Path("theirs/model.safetensors").read_bytes()
    Path("theirs/model.safetensors").write_bytes(whole[:1000])
    assert "cannot read theirs as a model (" in fails(hf.main, ["import", "theirs", "out/x"])
    Path("theirs/model.safetensors").unlink()
    assert "cannot read theirs as a model (" in fails(hf.main, ["import", "theirs", "out/x"])
    Path("theirs/tokenizer.json").rename("theirs/tokenizer.old")
    Path("theirs/model.safetensors").write_bytes(whole)
    assert "theirs has no tokenizer.json" in fails(hf.main, ["import", "theirs", "out/x"])
    Path("theirs/tokenizer.old").rename("theirs/tokenizer.json")
    change_json("theirs/config.json", lambda config: config.update(n_embd=64))
    assert "of the shape that config.json says" in fails(hf.main, ["import", "theirs", "out/x"])
    change_json("theirs/config.json", lambda config: config.update(n_head=0))
    assert "by its config.json: n_head = 0 is not allowed" in fails(hf.main, ["import", "theirs", "out/x"])
    Path("theirs/config.json").write_text("{")
    assert "cannot read theirs as a model (" in fails(hf.main, ["import", "theirs", "out/x"])
    Path("theirs/config.json").unlink()
    assert "theirs has no config.json" in fails(hf.main, ["import", "theirs", "out/x"])
    assert "cannot read nobody/nothing as a model (" in fails(hf.main, ["import", "nobody/nothing", "out/x"])
    for source in ("./none", "a/b/c", "", "theirs/tokenizer.json"):
        assert f"{source!r} is no folder, and no name" in fails(hf.main, ["import", source, "out/x"])


def test_weights_that_are_missing_or_no_numbers_are_refused(their_tokenizer, fails):
    from safetensors.torch import load_file, save_file
    gpt2_folder(their_tokenizer)
    weights = load_file("theirs/model.safetensors")
    save_file(weights | {"transformer.ln_f.bias": torch.full((32,), torch.nan)}, "theirs/model.safetensors",
              {"format": "pt"})
    assert "some of its weights are not numbers" in fails(hf.main, ["import", "theirs", "out/x"])
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, "theirs/model.safetensors", {"format": "pt"})
    assert "theirs is damaged: it has no transformer.h.1.mlp.c_fc.weight" in fails(
        hf.main, ["import", "theirs", "out/x"])


def test_a_model_of_the_hub_comes_from_its_cache(their_tokenizer):
    gpt2_folder(their_tokenizer, "cache/models--someone--stories/snapshots/0123abcd")
    Path("cache/models--someone--stories/refs").mkdir()
    Path("cache/models--someone--stories/refs/main").write_text("0123abcd")
    done = subprocess.run([sys.executable, "-m", "tools.hf", "import", "someone/stories", "out/theirs"],
                          env=os.environ | {"HF_HUB_CACHE": "cache", "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "of someone/stories, as a run" in done.stdout, done.stderr
    assert checkpoint.load_model(Path("out/theirs/ckpt.pt"))[0].config.block_size == 24


def test_gpt2s_own_vocabulary_out_and_back(here):
    tokenizer = Tokenizer.named("gpt2")
    theirs = hf.to_their_tokenizer(tokenizer, 1024)
    for text in [*TEXTS, README, (ROOT / "data/nursery.py").read_text()[:20_000]]:
        assert theirs.encode(text) == tokenizer.encode(text)
    back = hf.from_their_tokenizer("x", theirs, None)
    assert back == tokenizer and back.name == "gpt2"


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K, O200K], ids=["gpt2", "cl100k_base", "o200k_base"])
def test_other_ways_to_cut_words(here, pattern):
    ranks = Tokenizer.named("gpt2").encoding._mergeable_ranks
    ranks = {token: rank for token, rank in ranks.items() if rank < 5000}
    specials = {END_OF_TEXT: 5002, "<|fim_prefix|>": 5004}  # with gaps, as cl100k_base has
    tokenizer = Tokenizer(tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials))
    hf.to_their_tokenizer(tokenizer, 64).save_pretrained("model")
    theirs = transformers.AutoTokenizer.from_pretrained("model")
    text = (ROOT / "train.py").read_text()
    for text in [*TEXTS, text, text.upper(), text.replace("\n", "\r\n"), "ÀÉ '\"" + text[:100] + " 'S 'lL\r\n \r\n"]:
        assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.eos_token_id == 5002 and theirs.encode("<|fim_prefix|>") == [5004]


def test_what_is_there_is_replaced_only_when_told(run, fails, capsys):
    hf.main(["export", "out/tiny", "model"])
    assert "model is there already" in fails(hf.main, ["export", "out/tiny", "model"])
    assert "--overwrite is for import" in fails(hf.main, ["export", "out/tiny", "x", "--overwrite"], code=2)
    Path(".x.partial").mkdir()  # of an export that was killed
    Path(".x.partial/rest").touch()
    Path("x").mkdir()
    hf.main(["export", "out/tiny", "x"])
    assert sorted(os.listdir("x")) == sorted(os.listdir("model")) and not Path(".x.partial").exists()
    assert "out/tiny already holds a run" in fails(hf.main, ["import", "model", "out/tiny"])
    hf.main(["import", "model", "out/tiny", "--overwrite"])
    assert sorted(os.listdir("out/tiny")) == [".lock", "ckpt.pt", "meta.json", "tokenizer.tiktoken"]
    Path("file").write_text("")
    assert "file is there already" in fails(hf.main, ["export", "out/tiny", "file"])


def test_what_is_wrong_is_told(run, fails, monkeypatch):
    assert "no checkpoint in out/none" in fails(hf.main, ["export", "out/none", "model"])
    assert not Path("model").exists()
    assert "did you mean --overwrite?" in fails(hf.main, ["export", "out/tiny", "model", "--overwite"], code=2)
    assert "invalid choice: 'exprt'" in fails(hf.main, ["exprt", "out/tiny", "model"], code=2)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "needs transformers: pip install -r requirements-extra.txt" in fails(
        hf.main, ["export", "out/tiny", "model"])

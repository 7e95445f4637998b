"""Runs to and from Hugging Face's `transformers`, as an ordinary GPT-2.

    python -m tools.hf export out/tinystories stories-30m       a folder for from_pretrained, vLLM, llama.cpp
    python -m tools.hf import stories-30m out/stories-30m       a run for sample.py and for train.py --init_from
    python -m tools.hf import openai-community/gpt2 out/gpt2    the same, from the Hugging Face hub

An export has the weights (safetensors, float32), the tokenizer, and a model card with the recipe and the figures.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from logging import CRITICAL, getLogger
from pathlib import Path

import tiktoken
import torch

import checkpoint
from config import Config
from dataset import read_meta, seal
from errors import Parser, UserError, exit_with_one_line
from model import GPT, GPTConfig
from tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, byte_of_character
from train import start_folder

# GPT-2 keeps these matrices of a block as (in, out), torch's linear layers as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# What GPT-2's settings must be for this model to compute the same.
FIXED = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
         "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
         "add_cross_attention": (False,)}


@exit_with_one_line
def main(argv=None):
    """Export or import; `argv` as on the command line."""
    parser = Parser(prog="python -m tools.hf", description="Runs to and from Hugging Face's transformers.")
    parser.add_argument("what", choices=["export", "import"], metavar="{export,import}",
                        help="a run to a model's folder, or a model to a run")
    parser.add_argument("source", metavar="FROM", help="export: a run's folder; import: a model's, or its hub id")
    parser.add_argument("target", metavar="TO", type=Path, help="export: the model's folder; import: the run's")
    parser.add_argument("--overwrite", action="store_true", help="import: replace the run that is there")
    args = parser.parse_args(argv)
    quieten_transformers()
    if args.what == "import":
        import_(args.source, args.target, args.overwrite)
    elif args.overwrite:
        parser.error("--overwrite is for import: export replaces nothing")
    else:
        export(args.source, args.target)


def quieten_transformers():
    """Leave speaking to this program. Raises UserError where transformers is missing."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("this needs transformers:  pip install -r requirements-extra.txt") from error
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # or it would ask the hub for a conversion
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(CRITICAL)  # what it warns of comes as an error anyway


@contextmanager
def transformers_at_work(doing, advice):
    """Turn what can go wrong in transformers into a UserError: what could not be done, why, and what to do."""
    try:
        yield
    except Exception as error:  # a folder can be broken in as many ways as it has files, each with a library of its own
        theirs = type(error).__module__.startswith(("transformers", "huggingface_hub", "safetensors", "httpx"))
        if not theirs and not isinstance(error, (OSError, ValueError, RuntimeError)) and type(error) is not Exception:
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot {doing} ({reason}): {advice}") from error


# ---- export ----

def export(out_dir, folder):
    """Write the best checkpoint of a run as a folder that `from_pretrained` loads.

    Raises UserError where the run cannot be read, the folder not be written, or something is in it already.
    """
    path = checkpoint.best_in(out_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: remove it, or name another folder")
    model, tokenizer, state = checkpoint.load_model(path)
    theirs = to_gpt2(model, tokenizer.end_of_text)
    their_tokenizer = to_their_tokenizer(tokenizer, model.config.block_size)
    card = model_card(folder.resolve().name, model, state, read_meta(path.parent))
    partial = folder.resolve().with_name(f".{folder.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        with transformers_at_work(f"write {folder}", "make room, or name another folder"):
            partial.mkdir(parents=True)
            theirs.save_pretrained(partial)
            their_tokenizer.save_pretrained(partial)
            Path(partial, "README.md").write_text(card, encoding="utf-8")
            Path(partial, "model.safetensors").chmod(0o644)  # safetensors' is for its owner alone
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: the {model.num_parameters():,} parameters of {path} as a GPT-2 for transformers")


def to_gpt2(model, end_of_text):
    """A GPT as transformers' GPT2LMHeadModel with the same logits; biases that it does without are zeros there."""
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function="gelu_new", resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        bos_token_id=end_of_text, eos_token_id=end_of_text, n_ctx=c.block_size))  # the last: llama.cpp asks for it
    weights = {name: torch.zeros_like(p) if name.endswith(".bias") else p for name, p in theirs.state_dict().items()}
    weights |= turned(model.state_dict())
    theirs.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    theirs.generation_config = GenerationConfig(  # sample.py's; a story begins after an end of text
        bos_token_id=end_of_text, eos_token_id=end_of_text, pad_token_id=end_of_text, do_sample=True, temperature=0.8,
        top_k=200)
    return theirs


def turned(weights):
    """A dict of weights with GPT-2's transposed matrices turned from either of the two forms into the other."""
    return {name: p.T.contiguous() if name.endswith(TRANSPOSED) else p for name, p in weights.items()}


def to_their_tokenizer(tokenizer, block_size):
    """A Tokenizer as one of transformers that gives the same ids: GPT2Tokenizer where it cuts words as GPT-2 does."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Theirs
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    encoding = tokenizer.encoding
    character_of = {byte: character for character, byte in byte_of_character().items()}

    def spell(token):
        return "".join(character_of[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in encoding._mergeable_ranks.items()}
    vocab |= encoding._special_tokens  # so that they get these ids and no others
    merges = [(spell(left), spell(right)) for left, right in merges_of(encoding._mergeable_ranks)]
    ends = dict.fromkeys(["bos_token", "eos_token", "unk_token"], END_OF_TEXT)
    others = sorted(set(encoding._special_tokens) - {END_OF_TEXT})
    options = {**ends, "model_max_length": block_size, "extra_special_tokens": others}
    if encoding._pat_str == GPT2_PATTERN:
        return GPT2Tokenizer(vocab=vocab, merges=merges, **options)
    # Possessive repeats are there for speed, and after {1,3} mean something else in `tokenizers`; there $ is also
    # where a line ends.
    pattern = re.sub(r"([?*+]|\{\d+,?\d*\})\+", r"\1", encoding._pat_str).replace("$", r"\z")
    theirs = Theirs(models.BPE(vocab=vocab, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(token, special=True) for token in encoding._special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=theirs, **options)


def merges_of(ranks):
    """The merges of a byte-pair encoding, first to last, from its tokens' ranks: pairs of bytes objects.

    A token comes of the two parts that are left of its bytes when all merges of lower ranks have been made.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
            i = joined.index(min(joined))
            if joined[i] >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def model_card(name, model, state, meta):
    """The README.md of an exported model: how to use it, what it learnt from, how well, by which settings."""
    figures, c, data, settings = state["figures"], model.config, meta["splits"]["train"], ""
    losses = (f"{figures['val_loss']:.4f} nats a token, {figures['val_bpb']:.4f} bits per byte (on the windows that "
              f"were evaluated at iteration {figures['iter']:,})" if "val_loss" in figures else "not measured")
    trained = "elsewhere, and imported"
    if state["tokens"]:
        trained = f"{data['tokens']:,} tokens of {data['stories']:,} stories ({state['config']['dataset']})"
        settings = "\nThe settings of the run:\n\n| setting | value |\n|---|---|\n" + "".join(
            f"| {setting} | {value} |\n" for setting, value in state["config"].items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT-2 of {model.num_parameters():,} parameters: {c.n_layer} layers, {c.n_head} heads, width \
{c.n_embd}, a context of {c.block_size} tokens for the prompt and what follows it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
prompt = tokenizer(tokenizer.bos_token + "Once upon a time", return_tensors="pt")  # stories begin after an end of text
print(tokenizer.decode(model.generate(**prompt, max_length={c.block_size})[0], skip_special_tokens=True))
```

| | |
|---|---|
| trained on | {trained} |
| tokens of training | {f"{state['tokens']:,}" if state['tokens'] else 'unknown'} |
| validation loss | {losses} |
| tokenizer | {meta['tokenizer']['name']}, {c.vocab_size:,} tokens |
{settings}"""


# ---- import ----

def import_(source, out_dir, overwrite):
    """Write a GPT-2-shaped model of transformers, a local folder or one on the hub, as a run.

    Raises UserError where it cannot be read, or is of another shape than this program's.
    """
    from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel

    if checkpoint.holds_run(out_dir) and not overwrite:
        raise UserError(f"{out_dir} already holds a run: name another folder, or replace it (--overwrite)")
    is_folder = source and Path(source).is_dir()
    if is_folder and not Path(source, "config.json").exists():
        raise UserError(f"{source} has no config.json: name the folder of a model, or a model on the hub")
    if not is_folder and (Path(source).is_file() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source)):
        raise UserError(f"{source!r} is no folder, and no name that a model on the hub can have: name one of these")
    with transformers_at_work(f"read {source} as a model",
                              "name a folder with all of its files or, with a network, a model on the hub"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        refuse_another_architecture(source, config)  # before gigabytes of it are downloaded
        their_tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        theirs, loading = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True,
                                                          ignore_mismatched_sizes=True)
    # In the place of these transformers has put random numbers.
    if absent := sorted(loading["missing_keys"]) or sorted(name for name, *_ in loading["mismatched_keys"]):
        raise UserError(f"{source} is damaged: it has no {absent[0]} of the shape that config.json says")
    tokenizer = from_their_tokenizer(source, their_tokenizer, config.eos_token_id)
    model = from_gpt2(source, theirs, tokenizer.vocab_size)
    write_run(out_dir, model, tokenizer, overwrite)
    print(f"{out_dir}: {model.num_parameters():,} parameters of {source}, as a run\n"
          f'sample: python sample.py --out_dir {out_dir} --start "Once upon a time"\n'
          f"data to train it on: python prepare.py SOURCE --tokenizer {out_dir}\n"
          f"training: python train.py --init_from={out_dir} --dataset=NAME --out_dir=out/ANOTHER")


def refuse_another_architecture(source, config):
    """Raise UserError where a transformers config is of a model that computes something else than this program's."""
    for name, allowed in FIXED.items():
        if getattr(config, name, None) not in allowed:
            raise UserError(f"{source} has {name} = {getattr(config, name, None)!r}, and only {allowed[0]!r} can be "
                            "imported: use a GPT-2")
    if config.n_inner not in (None, 4 * config.n_embd):
        raise UserError(f"{source} has n_inner = {config.n_inner}, and only 4 * n_embd = {4 * config.n_embd} can be "
                        "imported: use a GPT-2")
    try:
        Config(**shape_of(config, config.n_positions))
    except UserError as error:
        raise UserError(f"{source} is damaged, by its config.json: {error}") from error


def shape_of(config, block_size):
    """The settings that a recipe would have for the shape of a model, from its config."""
    return {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "block_size": block_size}


def from_gpt2(source, theirs, vocab_size):
    """A GPT with the weights of a GPT2LMHeadModel. Rows of the embedding that no token has are left out.

    Raises UserError where the head has weights of its own, tokens have none, or one is not a number.
    """
    c, weights = theirs.config, theirs.state_dict()
    wte = weights["transformer.wte.weight"]  # (V, C)
    if not torch.equal(weights.pop("lm_head.weight"), wte):
        raise UserError(f"{source} has a head that does not share the token embedding: use a GPT-2 with tied ones")
    if len(wte) < vocab_size:
        raise UserError(f"{source} has {len(wte)} token embeddings for a tokenizer of {vocab_size}: it is damaged")
    if len(wte) > vocab_size:
        print(f"left out: {len(wte) - vocab_size} token embeddings beyond the tokenizer's {vocab_size:,}")
    model = GPT(GPTConfig(vocab_size, c.n_positions, c.n_layer, c.n_head, c.n_embd, c.resid_pdrop, bias=True))
    model.load_state_dict(turned(weights) | {"transformer.wte.weight": wte[:vocab_size]})
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{source} is damaged: some of its weights are not numbers")
    return model


def from_their_tokenizer(source, theirs, end_of_text):
    """A Tokenizer that gives the same ids as one of transformers, which must be a byte-level BPE that cuts words as
    GPT-2 does. Raises UserError for any other.
    """
    described = json.loads(theirs.backend_tokenizer.to_str()) if theirs.is_fast else {}
    model, cutting = described.get("model") or {}, described.get("pre_tokenizer") or {}
    if not model.get("vocab"):  # where its files are missing, transformers makes an empty one
        raise UserError(f"{source} has no tokenizer.json: save the tokenizer beside the model")
    byte_level = cutting.get("type") == "ByteLevel" and cutting["use_regex"] and not cutting["add_prefix_space"]
    if model.get("type") != "BPE" or model["dropout"] or not byte_level or described.get("normalizer"):
        raise UserError(f"the tokenizer of {source} is not GPT-2's kind, a byte-level BPE: use a model that has one")
    if plain := [token["content"] for token in described["added_tokens"] if not token["special"]]:
        raise UserError(f"the tokenizer of {source} has words added to it, such as {plain[0]!r}: use a model without "
                        "them")
    special = {token["content"]: token["id"] for token in described["added_tokens"]}
    end_of_text = special.get(theirs.eos_token, end_of_text)
    if end_of_text not in special.values():
        raise UserError(f"the tokenizer of {source} has no end of text: give it an eos_token in tokenizer_config.json")
    special = {token: rank for token, rank in special.items() if rank != end_of_text} | {END_OF_TEXT: end_of_text}

    byte_of = byte_of_character()
    vocab = {token: rank for token, rank in model["vocab"].items() if rank not in special.values()}
    if not all(set(token) <= byte_of.keys() for token in vocab):
        raise UserError(f"the tokenizer of {source} has tokens that are not of bytes: use a model with GPT-2's kind")
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items()}
    merges = [tuple(bytes(byte_of[c] for c in part) for part in (pair.split(" ") if isinstance(pair, str) else pair))
              for pair in model["merges"]]
    all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if merges != merges_of(ranks) or not all_bytes or len(ranks) != 256 + len(merges):
        raise UserError(f"the tokenizer of {source} is not the 256 bytes and a token for each merge, in the order of "
                        "the merges: use a model that has GPT-2's kind")
    name = "gpt2" if len(ranks) == 50256 else f"bpe{len(ranks) + len(special)}"
    return Tokenizer(tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special))


def write_run(out_dir, model, tokenizer, overwrite):
    """Write a model and its tokenizer as a run that has seen no data yet."""
    c = model.config
    no_data = {"stories": 0, "tokens": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    meta = {"tokenizer": tokenizer.describe(), "vocab_size": c.vocab_size, "end_of_text": tokenizer.end_of_text,
            "dtype": "uint16" if c.vocab_size <= 1 << 16 else "uint32",
            "splits": {"train": no_data, "validation": no_data}}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        Path(folder, "meta.json").write_text(json.dumps(seal(meta), indent=2) + "\n", encoding="utf-8")
        start_folder(out_dir, Path(folder), overwrite)
    config = Config(out_dir=str(out_dir), **shape_of(c, c.block_size))
    checkpoint.save(out_dir / "ckpt.pt", {
        "model": model.state_dict(), "model_config": asdict(c), "config": asdict(config),
        "data_sha256": checkpoint.data_sha256(meta), "iter": 0, "update": 0, "tokens": 0, "figures": {"iter": 0}})


if __name__ == "__main__":
    main()

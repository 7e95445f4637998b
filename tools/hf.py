"""Import GPT-2 models of Hugging Face `transformers`, and checkpoints of nanoGPT.

    python -m tools.hf import stories-30m out/stories-30m       a run for sample.py and for train.py --init_from
    python -m tools.hf import openai-community/gpt2 out/gpt2    the same, from the Hugging Face hub
    python -m tools.hf import nanoGPT/out/ckpt.pt out/nano      the same, from nanoGPT

The other direction is tools/export.py. A model is imported only if it gives the logits of transformers' model.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import hashlib
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from model import GPT, GPTConfig
from storygpt import checkpoint
from storygpt.corpus.dataset import data_sha256, with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, byte_decoder
from storygpt.run import checkpoints, claim_run_folder, start_run_folder
from storygpt.settings import Config
from storygpt.system.errors import Parser, UserError, exit_with_one_line, shell_word
from tools.formats.hf_folder import (
    check_logits, library_errors_as_user_errors, merges_from_ranks, silence_transformers, transpose_weights)

# The setting `gelu` of each of transformers' activation functions.
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
IMPORT_TOLERANCE = 1e-4  # larger than that of exports, as the rounding errors of larger models are


@exit_with_one_line
def main(argv=None):
    """Import a model. `argv`: the command line, by default sys.argv's."""
    parser = Parser(prog="python -m tools.hf", description="Import models of Hugging Face and nanoGPT as runs.")
    parser.add_argument("command", choices=["import"], metavar="import")
    parser.add_argument("source", metavar="FROM", help="a model folder, a hub model or nanoGPT's ckpt.pt")
    parser.add_argument("target", metavar="TO", type=Path, help="the run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run")
    args = parser.parse_args(argv)
    import_model(args.source, args.target, args.overwrite)


def import_model(source, out_dir, overwrite):
    """Write a model as a run: a transformers GPT-2, from a local folder or the hub, or a ckpt.pt of nanoGPT.

    Raises UserError if the model cannot be read, or computes another function than model.py.
    """
    if checkpoints(out_dir) and not overwrite:
        raise UserError(f"{out_dir} already contains a run: choose another folder, or replace it with --overwrite")
    model, tokenizer = read_nanogpt(source) if Path(source).is_file() else read_hf(source)
    write_run(out_dir, model, tokenizer, overwrite)
    run = shell_word(out_dir)
    print(f"{out_dir}: imported {source}, {model.num_parameters():,} parameters, as a run\n"
          f"sample: python sample.py --out_dir {run}\n"
          f"prepare data: python prepare.py SOURCE --tokenizer {run}\n"
          f"fine-tune: python train.py --init_from={run} --dataset=NAME --out_dir=out/ANOTHER")


def read_nanogpt(path):
    """Read a ckpt.pt of nanoGPT: a GPT, and GPT-2's tokenizer, which the checkpoint does not contain.

    Raises UserError if it is not such a checkpoint, or has another vocabulary than GPT-2's.
    """
    try:
        state = checkpoint.load(path, {"model": dict, "model_args": dict})
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"{path} is not a checkpoint of nanoGPT, or damaged, or has Python objects that are not loaded "
                        "because that can run code: give one with only its 'model' and 'model_args'") from error
    with checkpoint.reading_checkpoint(path, TypeError):  # another setting in model_args
        config = GPTConfig(**{"dropout": 0.0, "gelu": "exact"} | state["model_args"])
    if config.vocab_size not in (50257, 50304):  # GPT-2's, and padded, as nanoGPT does by default
        raise UserError(f"{path} has {config.vocab_size} tokens: only models with GPT-2's tokenizer can be imported, "
                        "whose 50257 tokens nanoGPT pads to 50304")
    weights = {name.removeprefix("_orig_mod."): p for name, p in state["model"].items()}  # a prefix of torch.compile
    weights = {name: p for name, p in weights.items() if not name.endswith(".attn.bias")}  # masks of old versions
    try:
        tokenizer = Tokenizer.named("gpt2")
    except UserError as error:
        raise UserError("GPT-2's vocabulary, which a checkpoint of nanoGPT does not contain, cannot be downloaded "
                        f"({type(error.__cause__).__name__}): connect to the network, or set TIKTOKEN_CACHE_DIR to a "
                        "copy of that folder from a machine on which this command has worked") from error
    return build_model(path, weights, config, tokenizer.vocab_size), tokenizer


def read_hf(source):
    """Read a transformers GPT-2 model, from a local folder or the hub: a GPT and its tokenizer.

    Raises UserError if the model cannot be read, or computes another function than model.py.
    """
    silence_transformers()
    from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    if not Path(source).exists() and (source.endswith(".pt") or source.startswith(".") or source.count("/") > 1):
        raise UserError(f"there is no {source}: give a model folder, a ckpt.pt of nanoGPT, or a hub model")
    with library_errors_as_user_errors(f"load the model {source}"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type != "gpt2" or config.activation_function not in GELU:  # before the weights are downloaded
            raise UserError(f"{source} is not a GPT-2 model with GELU, and other models cannot be imported")
        for name in ("layer_norm_epsilon", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"):
            if getattr(config, name) != getattr(GPT2Config(), name):
                raise UserError(f"{source} has {name} = {getattr(config, name)}, which model.py does not have")
        hf_tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        hf_model, loading = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True,
                                                            ignore_mismatched_sizes=True)
    # transformers only warns about these weights and initializes them randomly.
    if bad := sorted(loading["missing_keys"]) + [name for name, *_ in loading["mismatched_keys"]]:
        raise UserError(f"{source} is damaged: {bad[0]} is missing or has another shape than in config.json")
    tokenizer = from_hf_tokenizer(source, hf_tokenizer)
    gpt_config = GPTConfig(block_size=config.n_positions, n_layer=config.n_layer, n_head=config.n_head,
                           n_embd=config.n_embd, dropout=config.resid_pdrop, gelu=GELU[config.activation_function])
    model = build_model(source, transpose_weights(hf_model.state_dict()), gpt_config, tokenizer.vocab_size)
    check_logits(source, model, hf_model, tokenizer.end_of_text, IMPORT_TOLERANCE)
    return model, tokenizer


def build_model(source, weights, config, vocab_size):
    """A GPT with these weights, a state dict, for a tokenizer of `vocab_size` tokens: further embeddings are dropped.

    Raises UserError if the weights are not those of a GPT with this GPTConfig, or not finite.
    """
    with checkpoint.reading_checkpoint(source, KeyError):
        surplus = len(weights["transformer.wte.weight"]) - vocab_size
        weights |= {name: weights[name][:vocab_size] for name in ("transformer.wte.weight", "lm_head.weight")}
    if surplus > 0:
        print(f"dropped {surplus} token embeddings beyond the tokenizer's {vocab_size:,}")
    if not all(p.isfinite().all() for p in weights.values()):
        raise UserError(f"{source} is damaged: some weights are not finite")
    model = GPT(replace(config, vocab_size=vocab_size))
    checkpoint.load_weights(source, model, weights)
    return model.eval()


def from_hf_tokenizer(source, hf_tokenizer):
    """Convert a transformers tokenizer to a Tokenizer that gives the same ids.

    Raises UserError unless it is a byte-level BPE that splits text by GPT-2's pattern, with an end-of-text token.
    """
    description = json.loads(hf_tokenizer.backend_tokenizer.to_str()) if hf_tokenizer.is_fast else {}
    bpe, split = description.get("model", {}), description.get("pre_tokenizer") or {}
    has_gpt2_pattern = (bpe.get("type") == "BPE" and not bpe["dropout"] and not description["normalizer"]
                        and split.get("type") == "ByteLevel" and split["use_regex"] and not split["add_prefix_space"]
                        and all(token["special"] for token in description["added_tokens"]))
    special = {token["content"]: token["id"] for token in description.get("added_tokens", [])}
    end_of_text, byte_of = special.get(hf_tokenizer.eos_token), byte_decoder()
    if has_gpt2_pattern and end_of_text is not None:
        vocab = {token: rank for token, rank in bpe["vocab"].items() if rank not in special.values()}
        ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items()}
        merges = [tuple(bytes(byte_of[c] for c in part) for part in pair) for pair in bpe["merges"]]
        if merges == merges_from_ranks(ranks) and len(ranks) == 256 + len(merges):  # tiktoken knows only ranks
            special = {token: rank for token, rank in special.items() if rank != end_of_text}
            name = "gpt2" if len(ranks) == 50256 else f"bpe{len(ranks) + len(special) + 1}"
            return Tokenizer(name, GPT2_PATTERN, ranks, special | {END_OF_TEXT: end_of_text})
    raise UserError(f"the tokenizer of {source} is not a byte-level BPE with an end-of-text token, like GPT-2's: use a "
                    "model that has one")


def write_run(out_dir, model, tokenizer, overwrite):
    """Write a model and its tokenizer as a run with 0 training tokens.

    Raises UserError if there is a run already, unless `overwrite`, or another process uses the folder.
    """
    settings = asdict(model.config)
    vocab_size = settings.pop("vocab_size")
    config = Config(out_dir=str(out_dir), **settings)
    no_data = {"stories": 0, "tokens": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    with tempfile.TemporaryDirectory() as folder:
        meta = {"tokenizer": tokenizer.save(folder), "vocab_size": vocab_size, "end_of_text": tokenizer.end_of_text,
                "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
                "splits": {"train": no_data, "validation": no_data}}
        Path(folder, "meta.json").write_text(json.dumps(with_checksum(meta), indent=2) + "\n", encoding="utf-8")
        claim_run_folder(out_dir, overwrite)
        start_run_folder(out_dir, Path(folder))
    checkpoint.save(out_dir / "ckpt.pt", {
        "model": model.state_dict(), "model_config": asdict(model.config), "config": asdict(config),
        "data_sha256": data_sha256(meta), "iter": 0, "step": 0, "tokens": 0, "metrics": {"iter": 0}})


if __name__ == "__main__":
    main()

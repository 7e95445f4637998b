"""Convert runs to and from Hugging Face `transformers` GPT-2 models, to GGUF, and from nanoGPT's checkpoints.

    python -m tools.hf export out/tinystories stories-30m       a folder for from_pretrained, vLLM
    python -m tools.hf export out/tinystories stories.gguf      a file for llama.cpp, Ollama, LM Studio
    python -m tools.hf push out/tinystories USER/stories-30m    a private repository of the Hugging Face hub
    python -m tools.hf import stories-30m out/stories-30m       a run for sample.py and for train.py --init_from
    python -m tools.hf import openai-community/gpt2 out/gpt2    the same, from the Hugging Face hub
    python -m tools.hf import nanoGPT/out/ckpt.pt out/nano      the same, from nanoGPT

An exported folder, and the repository, contain the weights (safetensors, float32), the tokenizer, and a model card with
the settings, the losses, samples and the table of tools.judge. An export is made only if the exported model gives the
run's logits.
"""

import storygpt  # noqa: F401  (first: it prepares the process for importing torch)

import hashlib
import io
import json
import os
import re
import tempfile
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import torch

import sample
from model import GPT, GPTConfig
from storygpt import checkpoint
from storygpt.corpus.dataset import data_sha256, with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, byte_decoder
from storygpt.run import best_checkpoint, checkpoints, claim_run_folder, start_run_folder
from storygpt.settings import Config
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line, shell_word
from tools.gguf_file import check_gguf, merges_from_ranks, modelfile, vocab_and_merges, write_gguf
from tools.model_card import gguf_texts, model_card

# The setting `gelu` of each of transformers' activation functions.
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# An export is refused if a logit differs by more than this, relative to the largest logit. For the published model
# after 1 M tokens, float32 rounding was 3e-7 and the other GELU 7e-5; fully trained, below 1e-6 and above 1e-4.
LOGIT_TOLERANCE = 1e-5
IMPORT_TOLERANCE = 1e-4  # larger, as the rounding errors of larger models are
# The same for a GGUF file, by dtype: about ten times the difference of a trained model of the published shape.
GGUF_TOLERANCE = {"f16": 0.004, "bf16": 0.03, "q8_0": 0.1}


@exit_with_one_line
def main(argv=None):
    """Export, push or import a model. `argv`: the command line, by default sys.argv's."""
    parser = Parser(prog="python -m tools.hf", description="Convert runs to and from Hugging Face, and from nanoGPT.")
    parser.add_argument("command", choices=["export", "push", "import"], metavar="{export,push,import}",
                        help="export: run to model folder or file; push: run to hub repository; import: model to run")
    parser.add_argument("source", metavar="FROM", help="export, push: a run folder; import: a model folder, a hub "
                        "model or nanoGPT's ckpt.pt")
    parser.add_argument("target", metavar="TO", type=Path, help="export: the model folder, or a file NAME.gguf; push: "
                        "the repository, USER/NAME; import: the run folder")
    parser.add_argument("--public", action="store_true", help="push: make the repository public (default: a new one "
                        "is private, an existing one stays as it is)")
    parser.add_argument("--overwrite", action="store_true", help="import: replace an existing run")
    parser.add_argument("--dtype", choices=list(GGUF_TOLERANCE), help="export to GGUF: of the matrices (default: f16)")
    parser.add_argument("--modelfile", action="store_true", help="export to GGUF: also write NAME.Modelfile for Ollama")
    args = parser.parse_args(argv)
    to_gguf = args.command == "export" and args.target.suffix.lower() == ".gguf"
    for flag, has_effect in (("public", args.command == "push"), ("overwrite", args.command == "import"),
                             ("dtype", to_gguf), ("modelfile", to_gguf)):
        if getattr(args, flag) and not has_effect:
            parser.error(f"--{flag} has no effect on {args.command} to {args.target}: see --help")
    if args.command == "import":
        import_model(args.source, args.target, args.overwrite)
    elif args.command == "push":
        push_run(args.source, args.target.as_posix(), args.public)
    elif to_gguf:
        export_gguf(args.source, args.target, args.dtype or "f16", args.modelfile)
    else:
        exported = export_run(args.source, args.target)
        print(f"{args.target}: exported {exported}, as a transformers GPT-2 model")


def silence_transformers():
    """Turn off the warnings and progress bars of transformers. Raises UserError if it is not installed."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("this tool needs transformers:  pip install -r requirements-extra.txt") from error
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # otherwise it asks the hub for a conversion
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def library_errors_as_user_errors(action):
    """Convert the errors of transformers and its libraries about files, the network and the hub into a UserError."""
    from huggingface_hub.errors import HTTPError, StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, RuntimeError, HTTPError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"cannot {action}: {' '.join(str(error).split())[:300]}") from error


# ---- export ----

def export_run(out_dir, folder, name=None):
    """Write the best checkpoint of a run as a folder that `from_pretrained` loads; returns what was exported, in words.

    `name`: of the model in its card, by default that of the folder. Raises UserError if the run cannot be read, its
    model is not a GPT-2, or the folder exists or cannot be written.
    """
    silence_transformers()
    path = best_checkpoint(out_dir)
    if folder.exists():
        raise UserError(f"{folder} already exists: remove it or choose another folder")
    model, tokenizer, state = checkpoint.load_model(path)
    hf_model = to_hf_model(path, model, tokenizer.end_of_text)
    hf_tokenizer = to_hf_tokenizer(tokenizer, model.config.block_size)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        partial = Path(temporary, "model")
        with library_errors_as_user_errors(f"write {folder}"):
            hf_model.save_pretrained(partial)
            hf_tokenizer.save_pretrained(partial)
        Path(partial, "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
        check_logits(path, model, type(hf_model).from_pretrained(partial), tokenizer.end_of_text, LOGIT_TOLERANCE)
        card = model_card(name or folder.resolve().name, path, model, state)
        Path(partial, "README.md").write_text(card, encoding="utf-8")
        files.rename(partial, folder)
    return f"{path}, {model.num_parameters():,} parameters"


def export_gguf(out_dir, target, dtype, with_modelfile):
    """Write the best checkpoint of a run as a GGUF file and, if asked for, a Modelfile for Ollama next to it.

    Raises UserError as `export_run` does, and if GGUF cannot hold the model in that dtype or its tokenizer.
    """
    silence_transformers()
    if not (find_spec("gguf") and find_spec("accelerate")):  # the latter: transformers reads GGUF with it
        raise UserError("GGUF needs the packages gguf and accelerate:  pip install -r requirements-extra.txt")
    path = best_checkpoint(out_dir)
    for file in (target, target.with_suffix(".Modelfile"))[:1 + with_modelfile]:
        if file.exists():
            raise UserError(f"{file} already exists: remove it or choose another name")
    model, tokenizer, state = checkpoint.load_model(path)
    check_gguf(model, dtype, tokenizer)
    hf_model = to_hf_model(path, model, tokenizer.end_of_text)
    check_logits(path, model, hf_model, tokenizer.end_of_text, LOGIT_TOLERANCE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        partial = Path(temporary, target.name)
        write_gguf(partial, model, dtype, tokenizer, gguf_texts(target.stem, model, state))
        hf_model.config.activation_function = "gelu_new"  # llama.cpp has no other one for GPT-2
        with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            # Without the config, transformers would assume 1,024 positions.
            exported = type(hf_model).from_pretrained(temporary, gguf_file=target.name, config=hf_model.config)
        difference = check_logits(path, model, exported, tokenizer.end_of_text, GGUF_TOLERANCE[dtype])
        if with_modelfile:
            target.with_suffix(".Modelfile").write_text(modelfile(target, model.config.block_size), encoding="utf-8")
        files.rename(partial, target)
    print(f"{target}: exported {path}, {model.num_parameters():,} parameters in {dtype}; logits differ by up to "
          f"{difference:.1g} of the largest from the run's in float32")


def check_logits(source, model, hf_model, end_of_text, tolerance):
    """Raise UserError unless a model of transformers gives a GPT's logits on random tokens.

    Returns the largest difference, divided by the largest logit; `tolerance`: the largest that is accepted. `source`:
    the checkpoint or model that is converted. The models read whole blocks and a shorter text, with an end of text in
    the middle, because an edit of model.py may have an effect in only one of these cases.
    """
    T, V, generator = model.config.block_size, model.config.vocab_size, torch.Generator().manual_seed(0)
    differences = []
    with torch.inference_mode():
        for length in (T, T, T, T, T // 2):
            # One sequence at a time, because all logits of a block of GPT-2 are already 200 MB.
            idx = torch.randint(V, (1, length), generator=generator)
            idx[:, length // 2] = end_of_text
            logits = model(idx)  # (1, length, V)
            differences.append((hf_model(idx).logits[..., :V] - logits).abs().max() / logits.abs().max())
    difference = torch.stack(differences).max().item()
    if not difference <= tolerance:  # so that NaN is an error, too
        raise UserError(f"{source} cannot be converted: the logits would change by up to {difference:.2g} of the "
                        f"largest, more than {tolerance:g}, because model.py and transformers' GPT-2 compute different "
                        "things (another norm, activation or the like), or the weights are too large for the dtype")
    return difference


def to_hf_model(path, model, end_of_text):
    """Convert a GPT to a GPT2LMHeadModel. The biases of a GPT with bias = False become zeros.

    Raises UserError if it has other parameters than GPT-2; `path`: its checkpoint.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    c = model.config
    if c.architecture != "gpt2":
        raise UserError(f"{path} cannot be exported: transformers has no model of the architecture "
                        f"{c.architecture!r} (modern.py); train one with --architecture=gpt2")
    hf_model = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function={"tanh": "gelu_new", "exact": "gelu"}[c.gelu],
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        tie_word_embeddings="lm_head.weight" not in dict(model.named_parameters()),  # it names a shared one only once
        bos_token_id=end_of_text, eos_token_id=end_of_text, n_ctx=c.block_size))  # n_ctx: for llama.cpp
    weights = transpose_weights(model.state_dict())
    if not c.bias:
        expected = hf_model.state_dict()
        weights = {name: torch.zeros_like(p) for name, p in expected.items() if name.endswith(".bias")} | weights
    try:
        hf_model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be exported as a GPT-2: {error}") from error
    sampling = sample.parse_args([])  # the defaults
    hf_model.generation_config.update(pad_token_id=end_of_text, do_sample=True, temperature=sampling.temperature,
                                      top_k=sampling.top_k)
    return hf_model.eval()


def transpose_weights(weights):
    """Convert a state dict between GPT-2's layout of the matrices of blocks, (in, out), and torch's, (out, in)."""
    return {name: p.mT.contiguous() if ".h." in name and p.dim() == 2 else p for name, p in weights.items()}


def to_hf_tokenizer(tokenizer, block_size):
    """Convert a Tokenizer to a transformers tokenizer with the same ids: a GPT2Tokenizer if it has GPT-2's pattern."""
    from tokenizers import Regex, pre_tokenizers
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    vocab, merges = vocab_and_merges(tokenizer)
    options = dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, model_max_length=block_size,
                   extra_special_tokens=sorted(set(tokenizer.special_tokens) - {END_OF_TEXT}))
    hf_tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges, **options)
    if tokenizer.pattern == GPT2_PATTERN:
        return hf_tokenizer
    # In the regular expressions of `tokenizers` a + after {1,3} is not possessive, and $ also matches before a line
    # end. Possessive quantifiers only make matching faster, so they are removed.
    pattern = re.sub(r"([?*+]|\{\d+,?\d*\})\+", r"\1", tokenizer.pattern).replace("$", r"\z")
    hf_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return PreTrainedTokenizerFast(tokenizer_object=hf_tokenizer.backend_tokenizer, **options)


# ---- push ----

def push_run(out_dir, name, public):
    """Upload an export of a run to the hub repository `name`, USER/NAME, in one commit, and print its URL.

    A new repository is private unless `public`; an existing one keeps its visibility, but `public` makes it public
    after the upload. Raises UserError if the run cannot be exported, or the hub cannot be reached or refuses.
    """
    silence_transformers()
    from huggingface_hub import HfApi
    from huggingface_hub.utils import enable_progress_bars, validate_repo_id

    if "/" not in name:
        raise UserError(f"{name!r} is not the name of a hub repository: give USER/NAME, for example USER/{name}")
    api = HfApi()
    with library_errors_as_user_errors(f"push to {name}"):
        validate_repo_id(name)
        api.whoami()  # a missing or wrong token is reported before the export
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        exported = export_run(out_dir, folder, name)
        with library_errors_as_user_errors(f"push to {name}, with a token that must be allowed to write there"):
            enable_progress_bars()  # of the upload
            url = api.create_repo(name, private=not public, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {exported}")
            private = api.model_info(name).private
            if private and public:
                api.update_repo_settings(name, private=False)
    print(f"pushed {exported}; the repository is {'private' if private and not public else 'public'}: {url}")


# ---- import ----

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

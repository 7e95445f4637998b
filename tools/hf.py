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
import pickle
import re
import shutil
import tempfile
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from logging import CRITICAL, getLogger
from pathlib import Path

import torch

import sample
from model import GPT, GPTConfig, ModelSettings
from storygpt import checkpoint
from storygpt.corpus.dataset import data_sha256, with_checksum
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN, Tokenizer, byte_decoder
from storygpt.run import best_checkpoint, checkpoints, claim_run_folder, start_run_folder
from storygpt.settings import Config
from storygpt.system import files
from storygpt.system.errors import Parser, UserError, exit_with_one_line
from tools.gguf_file import check_gguf, has_tied_head, merges_from_ranks, modelfile, vocab_and_merges, write_gguf
from tools.model_card import describe, model_card, training_settings

# GPT-2 stores these matrices as (in, out), torch's linear layers as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# The setting `gelu` of each of transformers' activation functions.
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
# The values of a transformers config with which GPT-2 computes the same function as model.py.
SUPPORTED = {"model_type": ("gpt2",), "activation_function": tuple(GELU),
             "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
             "add_cross_attention": (False,)}
# An export is refused if a logit differs by more than this, relative to the largest logit. For the published model
# after 1 M tokens, float32 rounding was 3e-7 and the other GELU 7e-5; fully trained, below 1e-6 and above 1e-4.
LOGIT_TOLERANCE = 1e-5
# The same for a GGUF file, by dtype: about ten times the difference of a trained model of the published shape.
GGUF_TOLERANCE = {"f16": 0.004, "bf16": 0.03, "q8_0": 0.1}
NANOGPT_VOCABULARY = (50257, 50304)  # GPT-2's, and padded, as nanoGPT does by default
LOGIN_SECONDS = 10  # to wait for the hub's answer to a login: huggingface_hub has no limit


@exit_with_one_line
def main(argv=None):
    """Export, push or import a model. `argv`: the command line, by default sys.argv's."""
    parser = Parser(prog="python -m tools.hf", description="Convert runs to and from Hugging Face transformers, and "
                    "from nanoGPT.")
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
    to_gguf = args.command == "export" and args.target.name.lower().endswith(".gguf")
    if to_gguf and not args.target.suffix:
        parser.error(f"{args.target} has no name before .gguf: give one, such as story.gguf")
    if args.overwrite and args.command != "import":
        parser.error("--overwrite works only with import: export never replaces anything, push adds a commit")
    if args.public and args.command != "push":
        parser.error("--public works only with push")
    if (args.dtype or args.modelfile) and not to_gguf:
        parser.error("--dtype and --modelfile work only with export to a file NAME.gguf")
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
    getLogger("huggingface_hub").setLevel(CRITICAL)  # its warnings are followed by an error anyway


@contextmanager
def hf_errors_as_user_errors(action, advice):
    """Convert errors of transformers and its libraries into a UserError: the action, the reason, the advice."""
    try:
        yield
    except Exception as error:  # each file of a damaged folder is read by another library with its own exceptions
        from_library = type(error).__module__.startswith(("transformers", "huggingface_hub", "safetensors", "httpx"))
        if not (from_library or isinstance(error, (OSError, ValueError, RuntimeError)) or type(error) is Exception):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"cannot {action} ({reason}): {advice}") from error


# ---- export ----

def export_run(out_dir, folder, name=None):
    """Write the best checkpoint of a run as a folder that `from_pretrained` loads; returns what was exported, in words.

    `name`: of the model in its card, by default that of the folder. Raises UserError if the run cannot be read, its
    model is not a GPT-2, or the folder is not empty or cannot be written.
    """
    silence_transformers()
    path = best_checkpoint(out_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists: remove it or choose another folder")
    model, tokenizer, state = checkpoint.load_model(path)
    hf_model = to_hf_model(path, model, tokenizer.end_of_text)
    hf_tokenizer = to_hf_tokenizer(tokenizer, model.config.block_size)
    partial = folder.resolve().with_name(f".{folder.resolve().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
    try:
        with hf_errors_as_user_errors(f"write {folder}", "free some disk space or choose another folder"):
            partial.mkdir(parents=True)
            hf_model.save_pretrained(partial)
            hf_tokenizer.save_pretrained(partial)
            Path(partial, "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
        check_is_gpt2(path, model, load_exported(partial), tokenizer.end_of_text)
        card = model_card(name or folder.resolve().name, path, model, state)
        Path(partial, "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        files.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
    check_is_gpt2(path, model, hf_model, tokenizer.end_of_text)
    texts = {"general.name": target.stem, "general.description": describe(model, state)}
    if settings := training_settings(state):
        texts["training.settings"] = json.dumps(settings)
    partial = target.resolve().with_name(f".{target.stem}.partial.gguf")
    try:
        with hf_errors_as_user_errors(f"write {target}", "free some disk space or choose another folder"):
            partial.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(partial, model, dtype, tokenizer, texts)
            difference = gguf_difference(partial, model, hf_model, tokenizer.end_of_text)
            if not difference <= GGUF_TOLERANCE[dtype]:
                raise UserError(f"{path} cannot be exported in {dtype}: its logits would differ by up to "
                                f"{difference:.2g} of the largest from the run's: try another --dtype")
            if with_modelfile:
                text = modelfile(target, model.config.block_size)
                files.atomic_write(target.with_suffix(".Modelfile"), lambda file: file.write(text.encode()))
            files.rename(partial, target)
    finally:
        with suppress(OSError):  # there is none, or its folder cannot be written
            partial.unlink()
    print(f"{target}: exported {path}, {model.num_parameters():,} parameters in {dtype}; logits differ by up to "
          f"{difference:.1g} of the largest from the run's in float32")


def gguf_difference(file, model, hf_model, end_of_text):
    """`logit_difference` of a GPT and its GGUF file as transformers reads it; `hf_model`: for the config."""
    # llama.cpp has no other activation for GPT-2. Without the config, transformers would assume 1,024 positions.
    hf_model.config.activation_function = "gelu_new"
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        exported = load_exported(file.parent, gguf_file=file.name, config=hf_model.config)
    return logit_difference(model, exported, end_of_text)


def load_exported(folder, **options):
    """The model of an exported folder, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def logit_difference(model, hf_model, end_of_text):
    """The largest difference between the logits of two models on random tokens, divided by the largest logit.

    The models read whole blocks and a shorter text, with and without an end of text in the middle: an edit of model.py
    may have an effect in only one of these cases.
    """
    T, generator = model.config.block_size, torch.Generator().manual_seed(0)
    differences, largest = [], []
    with torch.inference_mode():
        for i, length in enumerate((T, T, T, T, T // 2)):
            # One sequence at a time, because all logits of a block of GPT-2 are already 200 MB.
            idx = torch.randint(model.config.vocab_size, (1, length), generator=generator)
            if i % 2:
                idx[:, length // 2] = end_of_text
            logits = model(idx)  # (1, length, V)
            differences.append((hf_model(idx).logits - logits).abs().max())
            largest.append(logits.abs().max())
    return (torch.stack(differences).max() / torch.stack(largest).max()).item()


def check_is_gpt2(path, model, hf_model, end_of_text):
    """Raise UserError unless a model of transformers gives the same logits as the run's model."""
    difference = logit_difference(model, hf_model, end_of_text)
    if not difference <= LOGIT_TOLERANCE:  # so that NaN is an error, too
        raise UserError(f"{path} cannot be exported as a GPT-2: its logits would differ by up to {difference:.2g} of "
                        "the largest from the run's, because model.py is no longer GPT-2 (another norm, activation or "
                        "the like)")


def to_hf_model(path, model, end_of_text):
    """Convert a GPT to a GPT2LMHeadModel. The biases of a GPT with bias = False become zeros.

    Raises UserError if it has other parameters than GPT-2; `path`: its checkpoint.
    """
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    c = model.config
    if c.architecture != "gpt2":
        raise UserError(f"{path} cannot be exported: transformers has no model of the architecture "
                        f"{c.architecture!r} (modern.py); train one with --architecture=gpt2")
    hf_model = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function={"tanh": "gelu_new", "exact": "gelu"}[c.gelu],
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
        tie_word_embeddings=has_tied_head(model), bos_token_id=end_of_text, eos_token_id=end_of_text,
        n_ctx=c.block_size))  # n_ctx: for llama.cpp
    weights, expected = model.state_dict(), transpose_weights(hf_model.state_dict())
    if not c.bias:
        weights = {name: torch.zeros_like(p) for name, p in expected.items() if name.endswith(".bias")} | weights
    if difference := parameter_difference(weights, expected):
        raise UserError(f"{path} cannot be exported as a GPT-2: {difference}")
    hf_model.load_state_dict(transpose_weights(weights))
    sampling = sample.parse_args([])  # the defaults
    hf_model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=end_of_text, pad_token_id=end_of_text, do_sample=True,
        temperature=sampling.temperature, top_k=sampling.top_k)
    return hf_model.eval()


def parameter_difference(weights, expected):
    """The first difference in names and shapes between two state dicts, in words; "" if there is none."""
    differences = [f"{name} is missing" for name in expected if name not in weights]
    differences += [f"{name} is unexpected" for name in weights if name not in expected]
    differences += [f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(p.shape)}"
                    for name, p in expected.items() if name in weights and weights[name].shape != p.shape]
    more = len(differences) - 1
    return "".join(differences[:1]) + (f" (and {more} more difference{'s' * (more > 1)})" if more > 0 else "")


def transpose_weights(weights):
    """Convert a state dict between GPT-2's (in, out) and torch's (out, in) layout, in either direction."""
    return {name: p.T.contiguous() if name.endswith(TRANSPOSED) else p for name, p in weights.items()}


def to_hf_tokenizer(tokenizer, block_size):
    """Convert a Tokenizer to a transformers tokenizer with the same ids: a GPT2Tokenizer if it has GPT-2's pattern."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import GPT2Tokenizer, PreTrainedTokenizerFast

    vocab, merges = vocab_and_merges(tokenizer)
    options = dict(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT, model_max_length=block_size,
                   extra_special_tokens=sorted(set(tokenizer.special_tokens) - {END_OF_TEXT}))
    if tokenizer.pattern == GPT2_PATTERN:
        return GPT2Tokenizer(vocab=vocab, merges=merges, **options)
    # In the regular expressions of `tokenizers` a + after {1,3} is not possessive, and $ also matches before a line
    # end. Possessive quantifiers only make matching faster, so they are removed.
    pattern = re.sub(r"([?*+]|\{\d+,?\d*\})\+", r"\1", tokenizer.pattern).replace("$", r"\z")
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in tokenizer.special_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


# ---- push ----

def push_run(out_dir, name, public):
    """Upload an export of a run to the hub repository `name`, USER/NAME, in one commit, and print its URL.

    A new repository is private unless `public`; an existing one keeps its visibility, but `public` makes it public
    after the upload. Raises UserError if the run cannot be exported, or the hub cannot be reached or refuses.
    """
    silence_transformers()
    from huggingface_hub.utils import enable_progress_bars

    check_repository_name(name)
    api = log_in()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        exported = export_run(out_dir, folder, name)
        with hf_errors_as_user_errors(f"push to {name}", "check the network connection and that the token may write "
                                      "to this repository, then run the command again"):
            enable_progress_bars()  # of the upload
            url = api.create_repo(name, private=not public, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {exported}")
            private = api.model_info(name).private
            if private and public:
                api.update_repo_settings(name, private=False)
    visibility = "private" if private and not public else "public, it was private before" if private else "public"
    print(f"pushed {exported}; the repository is {visibility}: {url}")


def check_repository_name(name):
    """Raise UserError unless `name` is a valid USER/NAME of a hub repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is not the name of a hub repository, USER/NAME: {error}") from error
    if "/" not in name:
        raise UserError(f"{name!r} is not the name of a hub repository: give USER/NAME, for example USER/{name}")


def log_in():
    """The HfApi of the hub, after checking the token. Raises UserError if it is missing, wrong or read-only."""
    from huggingface_hub import HfApi, constants, get_session, get_token

    api, advice = HfApi(), "give one with write access, by `hf auth login` or in HF_TOKEN"
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, so nothing can be pushed: unset it")
    if not get_token():
        raise UserError(f"no token for {api.endpoint}: {advice}")
    session = get_session()
    timeout, session.timeout = session.timeout, LOGIN_SECONDS
    try:
        with hf_errors_as_user_errors(f"log in to {api.endpoint}", "check the network connection and the token "
                                      "(`hf auth login`, or HF_TOKEN)"):
            user = api.whoami()
    finally:
        session.timeout = timeout  # an upload may take longer
    if user["auth"].get("accessToken", {}).get("role") == "read":  # a login in the browser has no role
        raise UserError(f"the token of {user['name']} for {api.endpoint} is read-only: {advice}")
    return api


# ---- import ----

def import_model(source, out_dir, overwrite):
    """Write a model as a run: a transformers GPT-2, from a local folder or the hub, or a ckpt.pt of nanoGPT.

    Raises UserError if the model cannot be read, or computes another function than model.py.
    """
    if checkpoints(out_dir) and not overwrite:
        raise UserError(f"{out_dir} already contains a run: choose another folder, or replace it with --overwrite")
    model, tokenizer = read_nanogpt(source) if Path(source).is_file() else read_hf(source)
    write_run(out_dir, model, tokenizer, overwrite)
    print(f"{out_dir}: imported {source}, {model.num_parameters():,} parameters, as a run\n"
          f'sample: python sample.py --out_dir {out_dir} --start "Once upon a time"\n'
          f"prepare data: python prepare.py SOURCE --tokenizer {out_dir}\n"
          f"fine-tune: python train.py --init_from={out_dir} --dataset=NAME --out_dir=out/ANOTHER")


def read_nanogpt(path):
    """Read a ckpt.pt of nanoGPT: a GPT, and GPT-2's tokenizer, which the checkpoint does not contain.

    Raises UserError if it is not such a checkpoint, or has another vocabulary than GPT-2's.
    """
    try:
        state = checkpoint.load(path, {"model": dict, "model_args": dict})
    except UserError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError):
            raise UserError(f"{path} contains other objects than tensors and plain numbers, which are not loaded "
                            "because that can run code: save only its 'model' and 'model_args' again") from error
        raise UserError(f"{path} is damaged or not a checkpoint of nanoGPT: give a ckpt.pt of nanoGPT, a model folder "
                        "or the name of a hub model") from error
    try:
        config = GPTConfig(**{"dropout": 0.0, "gelu": "exact"} | state["model_args"])
        Config(**model_settings(config))
    except (TypeError, UserError) as error:
        raise UserError(f"the model_args of {path} are not those of a model of nanoGPT: {error}") from error
    if config.vocab_size not in NANOGPT_VOCABULARY:
        raise UserError(f"{path} has {config.vocab_size} tokens: only models with GPT-2's tokenizer can be imported, "
                        "whose 50257 tokens nanoGPT pads to 50304")
    weights = {name.removeprefix("_orig_mod."): p for name, p in state["model"].items()}  # a prefix of torch.compile
    weights = {name: p for name, p in weights.items() if not name.endswith(".attn.bias")}  # masks of old versions
    tokenizer = Tokenizer.named("gpt2")
    return build_model(path, weights, config, tokenizer.vocab_size), tokenizer


def read_hf(source):
    """Read a transformers GPT-2 model, from a local folder or the hub: a GPT and its tokenizer.

    Raises UserError if the model cannot be read, or computes another function than model.py.
    """
    check_source(source)
    silence_transformers()
    from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel

    with hf_errors_as_user_errors(f"load the model {source}",
                                  "give a complete model folder or, with a network connection, a hub model"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        check_architecture(source, config)  # before the weights are downloaded
        hf_tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        hf_model, loading = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True,
                                                            ignore_mismatched_sizes=True)
    # transformers only warns about these weights and initializes them randomly.
    if bad := sorted(loading["missing_keys"]) or sorted(name for name, *_ in loading["mismatched_keys"]):
        raise UserError(f"{source} is damaged: {bad[0]} is missing or does not have the shape given by config.json")
    tokenizer = from_hf_tokenizer(source, hf_tokenizer, config.eos_token_id)
    weights = transpose_weights(hf_model.state_dict())
    return build_model(source, weights, to_gpt_config(config), tokenizer.vocab_size), tokenizer


def check_source(source):
    """Raise UserError unless `source` is a model folder, or a string that could be the name of a hub model."""
    if source and Path(source).is_dir():
        if not Path(source, "config.json").exists():
            raise UserError(f"{source} has no config.json: give a model folder, or the name of a hub model")
    elif source.endswith(".pt") or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        raise UserError(f"{source!r} is neither a folder, a file nor a valid hub model name: give one of these")


def check_architecture(source, config):
    """Raise UserError if a transformers config describes a model that computes another function than model.py."""
    for name, allowed in (SUPPORTED | {"n_inner": (4 * getattr(config, "n_embd", 0), None)}).items():
        if getattr(config, name, None) not in allowed:
            values = " or ".join(repr(value) for value in allowed if value is not None)
            raise UserError(f"{source} has {name} = {getattr(config, name, None)!r}, but only {values} is supported: "
                            "use a GPT-2 model")
    try:
        Config(**model_settings(to_gpt_config(config)))
    except UserError as error:
        raise UserError(f"config.json of {source} is invalid: {error}") from error


def to_gpt_config(config):
    """Convert a transformers GPT2Config to a GPTConfig."""
    return GPTConfig(vocab_size=config.vocab_size, block_size=config.n_positions, n_layer=config.n_layer,
                     n_head=config.n_head, n_embd=config.n_embd, dropout=config.resid_pdrop, bias=True,
                     gelu=GELU[config.activation_function])


def model_settings(config):
    """The settings (of Config) in a GPTConfig."""
    return {f.name: getattr(config, f.name) for f in fields(ModelSettings)}


def build_model(source, weights, config, vocab_size):
    """A GPT with these weights, a state dict, for a tokenizer of `vocab_size` tokens: further embeddings are dropped.

    Raises UserError if the weights are not those of a GPT with this GPTConfig, or not finite, or the head is not tied
    to the embedding as it is in model.py.
    """
    with torch.device("meta"):
        if difference := parameter_difference(weights, GPT(config).state_dict()):
            raise UserError(f"{source} does not fit model.py: {difference}")
    embeddings = len(weights["transformer.wte.weight"])
    if embeddings < vocab_size:
        raise UserError(f"{source} is damaged: it has {embeddings} token embeddings for a tokenizer of {vocab_size}")
    if embeddings > vocab_size:
        print(f"dropped {embeddings - vocab_size} token embeddings beyond the tokenizer's {vocab_size:,}")
    weights |= {name: weights[name][:vocab_size] for name in ("transformer.wte.weight", "lm_head.weight")}
    if not all(p.isfinite().all() for p in weights.values()):
        raise UserError(f"{source} is damaged: some weights are not finite")
    model = GPT(replace(config, vocab_size=vocab_size))
    model.load_state_dict(weights)
    if not all(torch.equal(p, weights[name]) for name, p in model.state_dict().items()):  # if model.py ties the head
        raise UserError(f"{source} has an untied output head: use a GPT-2 model with tied embeddings")
    return model


def from_hf_tokenizer(source, hf_tokenizer, end_of_text):
    """Convert a transformers tokenizer to a Tokenizer that gives the same ids.

    `end_of_text`: its id, used if the tokenizer has no eos_token. Raises UserError unless the tokenizer is a byte-level
    BPE that splits text by GPT-2's pattern.
    """
    description = json.loads(hf_tokenizer.backend_tokenizer.to_str()) if hf_tokenizer.is_fast else {}
    check_tokenizer_type(source, description)
    special = {token["content"]: token["id"] for token in description["added_tokens"]}
    end_of_text = special.get(hf_tokenizer.eos_token, end_of_text)
    if end_of_text not in special.values():
        raise UserError(f"the tokenizer of {source} has no end-of-text token: set eos_token in tokenizer_config.json")
    special = {token: rank for token, rank in special.items() if rank != end_of_text} | {END_OF_TEXT: end_of_text}

    byte_of = byte_decoder()
    vocab = {token: rank for token, rank in description["model"]["vocab"].items() if rank not in special.values()}
    if not all(set(token) <= byte_of.keys() for token in vocab):
        raise UserError(f"{source} has tokens that are not bytes: use a model with a tokenizer like GPT-2's")
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in vocab.items()}
    merges = [tuple(bytes(byte_of[c] for c in part) for part in (pair.split(" ") if isinstance(pair, str) else pair))
              for pair in description["model"]["merges"]]
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if merges != merges_from_ranks(ranks) or not has_all_bytes or len(ranks) != 256 + len(merges):
        raise UserError(f"the tokens of {source} are not the 256 bytes and one token for each merge, in order: use a "
                        "model with a tokenizer like GPT-2's")
    name = "gpt2" if len(ranks) == 50256 else f"bpe{len(ranks) + len(special)}"
    return Tokenizer(name, GPT2_PATTERN, ranks, special)


def check_tokenizer_type(source, description):
    """Raise UserError unless a tokenizer.json, as a dict, describes a byte-level BPE with GPT-2's pattern."""
    model, split = description.get("model") or {}, description.get("pre_tokenizer") or {}
    if not model.get("vocab"):  # transformers creates an empty tokenizer if its files are missing
        raise UserError(f"{source} has no tokenizer.json: save the tokenizer in the same folder as the model")
    byte_level = split.get("type") == "ByteLevel" and split["use_regex"] and not split["add_prefix_space"]
    if model.get("type") != "BPE" or model["dropout"] or not byte_level or description.get("normalizer"):
        raise UserError(f"the tokenizer of {source} is not a byte-level BPE like GPT-2's: use a model that has one")
    if added := [token["content"] for token in description["added_tokens"] if not token["special"]]:
        raise UserError(f"the tokenizer of {source} has added words, such as {added[0]!r}: use a model without them")


def write_run(out_dir, model, tokenizer, overwrite):
    """Write a model and its tokenizer as a run with 0 training tokens.

    Raises UserError if there is a run already, unless `overwrite`, or another process uses the folder.
    """
    c = model.config
    no_data = {"stories": 0, "tokens": 0, "bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    with tempfile.TemporaryDirectory() as folder:
        meta = {"tokenizer": tokenizer.save(folder), "vocab_size": c.vocab_size, "end_of_text": tokenizer.end_of_text,
                "dtype": "uint16" if c.vocab_size <= 1 << 16 else "uint32",
                "splits": {"train": no_data, "validation": no_data}}
        Path(folder, "meta.json").write_text(json.dumps(with_checksum(meta), indent=2) + "\n", encoding="utf-8")
        claim_run_folder(out_dir, overwrite)
        start_run_folder(out_dir, Path(folder))
    config = Config(out_dir=str(out_dir), **model_settings(c))
    checkpoint.save(out_dir / "ckpt.pt", {
        "model": model.state_dict(), "model_config": asdict(c), "config": asdict(config),
        "data_sha256": data_sha256(meta), "iter": 0, "step": 0, "tokens": 0, "metrics": {"iter": 0}})


if __name__ == "__main__":
    main()

"""A folder for transformers and vLLM: weights in safetensors, the tokenizer, and a model card.

`python -m tools.export out/run stories-30m` writes one. tools/hf.py reads such models.
"""

import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch

import sample
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN, byte_decoder
from storygpt.system.errors import UserError
from tools.formats import NotExportable, check_tokens
from tools.formats.model_card import model_card

# An export is refused if a logit differs by more than this, relative to the largest logit. For the published model
# after 1 M tokens, float32 rounding was 3e-7 and the other GELU 7e-5; of a fully trained one, rounding is
# below 1e-6 and the other GELU above 1e-4.
LOGIT_TOLERANCE = 1e-5


def write_hf_folder(folder, saved, dtype):
    """Write a SavedModel as a folder that transformers' `from_pretrained` loads, with a model card. `dtype`: float32.

    Raises NotExportable if it is not a GPT-2.
    """
    silence_transformers()
    model, tokenizer = saved.model, saved.tokenizer
    hf_model = to_hf_model(saved)
    with library_errors_as_user_errors(f"write {folder.name}"):
        hf_model.save_pretrained(folder)
        to_hf_tokenizer(tokenizer, model.config.block_size).save_pretrained(folder)
    Path(folder, "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    check_logits(saved.path, model, type(hf_model).from_pretrained(folder), tokenizer.end_of_text, LOGIT_TOLERANCE)
    Path(folder, "README.md").write_text(model_card(folder.resolve().name, saved), encoding="utf-8")
    return ", as a GPT-2 for transformers"


def check_logits(source, model, hf_model, end_of_text, tolerance):
    """Raise NotExportable unless a model of transformers gives a GPT's logits.

    Returns the largest difference, divided by the largest logit; `tolerance`: the largest that is accepted. `source`:
    the checkpoint or model that is converted. The models read the `check_tokens` of a whole block and the first half of
    them, because an edit of model.py may have an effect in only one of these cases.
    """
    T, V, differences = model.config.block_size, model.config.vocab_size, []
    with torch.inference_mode():
        # One sequence idx (1, …) at a time, because all logits of a block of GPT-2 are already 200 MB.
        tokens = check_tokens(model, end_of_text, T)  # (1, …) each
        for idx in (*tokens, *(x[:, :max(2, T // 2)] for x in tokens)):
            logits = model(idx)  # (1, …, V)
            differences.append((hf_model(idx).logits[..., :V] - logits).abs().max() / logits.abs().max())
    difference = torch.stack(differences).max().item()
    if not difference <= tolerance:  # so that NaN is an error, too
        raise NotExportable(f"{source} cannot be converted: the logits would change by up to {difference:.2g} of the "
                            f"largest, more than {tolerance:g}, because model.py and transformers' GPT-2 compute "
                            "different things (another norm, activation or the like), or the weights are too large for "
                            "the dtype. An edited model can be exported to NAME.onnx")
    return difference


def to_hf_model(saved):
    """Convert a SavedModel to a GPT2LMHeadModel. The biases of a GPT with bias = False become zeros.

    Raises NotExportable if it has other parameters than GPT-2.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    model, end_of_text, c = saved.model, saved.tokenizer.end_of_text, saved.model.config
    if c.architecture != "gpt2":
        raise NotExportable(f"{saved.path}: transformers and llama.cpp have no model of the architecture "
                            f"{c.architecture!r} (modern.py): export to NAME.html or NAME.onnx, or train with "
                            "--architecture=gpt2")
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
        raise NotExportable(f"{saved.path} is not a GPT-2: export to NAME.onnx instead "
                            f"({' '.join(str(error).split())[:200]})") from error
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


def vocab_and_merges(tokenizer):
    """A Tokenizer as GPT-2's vocab.json and merges.txt have it: a dict text → id, and a list of pairs of texts.

    A byte is written as one character (`byte_decoder`). The dict has the special tokens, too.
    """
    character_of = {byte: character for character, byte in byte_decoder().items()}
    text_of = {token: "".join(character_of[byte] for byte in token) for token in tokenizer.ranks}
    vocab = {text_of[token]: rank for token, rank in tokenizer.ranks.items()} | tokenizer.special_tokens
    return vocab, [(text_of[left], text_of[right]) for left, right in merges_from_ranks(tokenizer.ranks)]


def merges_from_ranks(ranks):
    """The merges of a byte-pair encoding, in order, as pairs of bytes objects. `ranks`: token → rank.

    The merge that creates a token joins the two parts left after all merges of lower rank have been applied to it.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            merge_ranks = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
            i = merge_ranks.index(min(merge_ranks))
            if merge_ranks[i] >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def silence_transformers():
    """Turn off the warnings and progress bars of transformers."""
    from transformers.utils import logging
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

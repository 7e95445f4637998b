"""GGUF, the file format of llama.cpp, Ollama and LM Studio: the weights of a GPT, its vocabulary and its settings.

`python -m tools.export out/run story.gguf` writes one. The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

import io
from contextlib import redirect_stderr

import torch

import sample
from storygpt.corpus.tokenizer import END_OF_TEXT, GPT2_PATTERN
from tools.formats import NotExportable
from tools.formats.hf_folder import LOGIT_TOLERANCE, check_logits, silence_transformers, to_hf_model, vocab_and_merges
from tools.formats.model_card import gguf_texts

# By dtype: the largest difference of a logit, relative to the largest logit, that is accepted. About ten times that of
# a trained model of the published shape.
TOLERANCE = {"f16": 0.004, "bf16": 0.03, "q8_0": 0.1}


def write_gguf(path, saved, dtype):
    """Write a SavedModel as a GGUF file, which transformers reads to check the logits; returns how much they differ.

    Raises NotExportable if it is not a GPT-2, or GGUF cannot hold the model in that dtype or its tokenizer.
    """
    silence_transformers()
    import accelerate  # noqa: F401  (transformers reads GGUF with it)
    model, tokenizer = saved.model, saved.tokenizer
    hf_model = to_hf_model(saved)
    check_gguf(model, dtype, tokenizer)
    check_logits(saved.path, model, hf_model, tokenizer.end_of_text, LOGIT_TOLERANCE)
    write_weights(path, model, dtype, tokenizer, gguf_texts(path.stem, saved))
    hf_model.config.activation_function = "gelu_new"  # llama.cpp has no other one for GPT-2
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        # Without the config, transformers would assume 1,024 positions.
        exported = type(hf_model).from_pretrained(path.parent, gguf_file=path.name, config=hf_model.config)
    difference = check_logits(saved.path, model, exported, tokenizer.end_of_text, TOLERANCE[dtype])
    return f" in {dtype}; logits differ by up to {difference:.1g} of the largest from the run's in float32"


def check_gguf(model, dtype, tokenizer):
    """Raise NotExportable if GGUF cannot hold a GPT in this dtype, or its tokenizer."""
    if dtype == "q8_0" and model.config.n_embd % 32:
        raise NotExportable(f"q8_0 stores blocks of 32 weights, but n_embd = {model.config.n_embd}: use --dtype f16")
    if tokenizer.pattern != GPT2_PATTERN:
        raise NotExportable(f"the tokenizer {tokenizer.name} cannot be written as GGUF, because it splits text into "
                            "words in another way than GPT-2: export to NAME.onnx, or train a model with gpt2 or a "
                            "trained vocabulary (bpe:4096)")


def write_weights(path, model, dtype, tokenizer=None, texts=None):
    """Write a GPT of GPT-2's architecture, for which `check_gguf` passes, as a GGUF file.

    Matrices are stored in `dtype` (f16, bf16, q8_0), the rest in float32. Without a `tokenizer`, prompts and stories
    are token ids. `texts`: further metadata, key → text.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quantize

    matrix_type, config = GGMLQuantizationType[dtype.upper()], model.config
    writer = GGUFWriter(path, "gpt2")
    writer.add_file_type(LlamaFileType[f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(2)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(1e-5)
    for key, text in (texts or {}).items():
        writer.add_string(key, text)
    add_vocabulary(writer, tokenizer, config.vocab_size)
    for name, p in named_weights(model):
        stored_type = matrix_type if p.dim() == 2 and name != "position_embd.weight" else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(p.numpy(), stored_type), raw_dtype=stored_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named_weights(model):
    """The weights of a GPT as (name in llama.cpp, float32 tensor) pairs, without a tied head.

    llama.cpp needs all biases: those of a GPT with bias = False are zeros.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH.GPT2, model.config.n_layer)
    for name, p in model.named_parameters():  # a tied head is named once, as the token embedding
        yield names.get_name(name, (".weight", ".bias")), p.detach().float()
        if not model.config.bias and name.startswith(("transformer.h.", "transformer.ln_f.")):
            yield names.get_name(name.replace(".weight", ".bias"), (".weight", ".bias")), torch.zeros(len(p))


def add_vocabulary(writer, tokenizer, vocab_size):
    """Add a Tokenizer to a GGUFWriter; `vocab_size`: the model's. Without one, only the size is added."""
    from gguf import TokenType

    writer.add_vocab_size(vocab_size)
    if tokenizer is None:
        return writer.add_tokenizer_model("no_vocab")
    vocab, merges = vocab_and_merges(tokenizer)
    tokens, types = [f"[UNUSED{i}]" for i in range(vocab_size)], [TokenType.UNUSED] * vocab_size
    for text, token in vocab.items():
        tokens[token] = text
        types[token] = TokenType.CONTROL if text in tokenizer.special_tokens else TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("gpt-2")  # the pattern
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(True)  # in training, too, a story follows an end-of-text token


def write_modelfile(path, gguf_path, block_size):
    """Write a Modelfile, with which Ollama makes a model of the GGUF file next to it, with sample.py's defaults.

    Positions are learned for block_size tokens only, and llama.cpp cannot move the context window of such a model. So
    three quarters of it are left to the story; a longer prompt needs a smaller num_predict.
    """
    sampling = sample.parse_args([])
    path.write_text(f"""FROM ./{gguf_path.name}
TEMPLATE "{{{{ .Prompt }}}}"
PARAMETER num_ctx {block_size}
PARAMETER num_predict {3 * block_size // 4}
PARAMETER temperature {sampling.temperature}
PARAMETER top_k {sampling.top_k}
PARAMETER top_p {sampling.top_p}
PARAMETER min_p 0
PARAMETER repeat_penalty 1
PARAMETER stop "{END_OF_TEXT}"
# LICENSE "the license that you choose"
""", encoding="utf-8")

"""Programs to compare with in `python -m tools.bench generate`: llama.cpp, CTranslate2 and ONNX Runtime, which gets an
export of the model; with weights in int8.

They are used if they are installed (pip install llama-cpp-python gguf ctranslate2 transformers onnx onnxscript
onnxruntime).
"""

import ctypes
import math
from importlib.util import find_spec

import numpy as np
import torch

import sample
from storygpt.generate import generate, prepare_for_generation
from storygpt.system.hardware import pick_inference_dtype
from tools.formats.gguf_file import write_weights
from tools.formats.onnx_file import convert, example

DEFAULTS = sample.parse_args([])  # temperature and top_k


def programs(config):
    """The programs that can generate with a GPTConfig's model, name → class: this one and those that are installed."""
    is_gpt2 = config.architecture == "gpt2" and config.gelu == "tanh" and config.bias
    found = {"this program": ThisProgram}
    if is_gpt2 and find_spec("ctranslate2") and find_spec("transformers"):
        found["CTranslate2"] = CTranslate2
    if is_gpt2 and find_spec("llama_cpp") and find_spec("gguf") and config.n_embd % 32 == 0:  # the block size of Q8_0
        found["llama.cpp"] = LlamaCpp
    if find_spec("onnxruntime") and find_spec("onnxscript"):
        found["ONNX Runtime"] = OnnxRuntime
    return found


class ThisProgram:
    """storygpt/generate.py in the dtype that sample.py uses for large models: int8 on an x86 CPU."""

    def __init__(self, model, prompt, folder):
        dtype = pick_inference_dtype("auto", torch.device("cpu"), math.inf)
        self.model, self.prompt = prepare_for_generation(model, "cpu", dtype), prompt

    def generate(self, batch_size, new_tokens, greedy=False):
        """Generate that many tokens for each sequence; returns their ids as an array (batch_size, new_tokens)."""
        idx = torch.full((batch_size, 1), self.prompt)
        steps = list(generate(self.model, idx, new_tokens, 0 if greedy else DEFAULTS.temperature, DEFAULTS.top_k))
        return torch.stack(steps, 1).numpy()


class LlamaCpp:
    """llama.cpp through the low-level interface of llama-cpp-python, which adds little time of its own."""

    def __init__(self, model, prompt, folder):
        import llama_cpp

        self.lib, self.prompt = llama_cpp, prompt
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p())
        write_weights(folder / "model.gguf", model, "q8_0")
        self.model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(),
                                                          llama_cpp.llama_model_default_params())
        self.params = llama_cpp.llama_context_default_params()
        self.params.n_ctx = model.config.block_size
        self.params.n_threads = self.params.n_threads_batch = torch.get_num_threads()

    def generate(self, batch_size, new_tokens, greedy=False):
        """As `ThisProgram.generate`, for one sequence only: on the machine it was tried on, several crashed it."""
        lib, tokens = self.lib, [self.prompt]
        context = lib.llama_init_from_model(self.model, self.params)
        sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for each in [lib.llama_sampler_init_greedy()] if greedy else [
                lib.llama_sampler_init_top_k(DEFAULTS.top_k), lib.llama_sampler_init_temp(DEFAULTS.temperature),
                lib.llama_sampler_init_dist(0)]:
            lib.llama_sampler_chain_add(sampler, each)
        while len(tokens) <= new_tokens:
            if lib.llama_decode(context, lib.llama_batch_get_one((lib.llama_token * 1)(tokens[-1]), 1)):
                raise RuntimeError("llama_decode failed")
            tokens.append(lib.llama_sampler_sample(sampler, context, -1))
        lib.llama_sampler_free(sampler)
        lib.llama_free(context)
        return np.array([tokens[1:]])


class CTranslate2:
    """CTranslate2's Generator."""

    def __init__(self, model, prompt, folder):
        import ctranslate2
        from ctranslate2.converters.transformers import GPT2Loader

        self.prompt, config = str(prompt), model.config
        spec = ctranslate2.specs.TransformerDecoderModelSpec.from_config(
            config.n_layer, config.n_head, activation=ctranslate2.specs.Activation.GELUTanh)
        GPT2Loader().set_decoder(spec.decoder, model.transformer)  # its modules have the names of GPT-2's
        GPT2Loader().set_linear(spec.decoder.projection, model.lm_head)
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.register_vocabulary(list(map(str, range(config.vocab_size))))
        spec.validate()
        spec.optimize(quantization="int8")
        spec.save(str(folder))
        self.generator = ctranslate2.Generator(str(folder), intra_threads=torch.get_num_threads())

    def generate(self, batch_size, new_tokens, greedy=False):
        """As `ThisProgram.generate`."""
        results = self.generator.generate_batch(
            [[self.prompt]] * batch_size, max_length=new_tokens, min_length=new_tokens, include_prompt_in_result=False,
            sampling_topk=1 if greedy else DEFAULTS.top_k, sampling_temperature=1 if greedy else DEFAULTS.temperature)
        return np.array([result.sequences_ids[0] for result in results])


class OnnxRuntime:
    """ONNX Runtime with an export to ONNX, as docs/sample_onnx.py uses it."""

    def __init__(self, model, prompt, folder):
        self.file, self.prompt = convert("the model", model.requires_grad_(False), "int8", {}), prompt
        self.models = {}  # batch size → Model, as each has the buffers of its cache

    def generate(self, batch_size, new_tokens, greedy=False):
        """As `ThisProgram.generate`."""
        if batch_size not in self.models:
            self.models[batch_size] = example()["Model"](self.file, batch_size, torch.get_num_threads())
        model, sample_token, rng = self.models[batch_size], example()["sample"], np.random.default_rng()
        temperature, top_k = (1e-6, 1) if greedy else (DEFAULTS.temperature, DEFAULTS.top_k)
        tokens = np.full((batch_size, 1), self.prompt)
        for length in range(new_tokens):
            chosen = [sample_token(logits, rng, temperature, top_k) for logits in model(tokens[:, -1:], length)]
            tokens = np.concatenate([tokens, np.array(model.info["token_ids"])[chosen][:, None]], 1)
        return tokens[:, 1:]

"""Programs to compare with in `python -m tools.bench generate`: llama.cpp and CTranslate2, with weights in int8.

They are used if they are installed (pip install llama-cpp-python gguf ctranslate2).
"""

import ctypes
from importlib.util import find_spec

import numpy as np
import torch

import sample
from storygpt.generate import generate, prepare_for_generation
from tools.gguf_file import write_gguf

DEFAULTS = sample.parse_args([])  # temperature and top_k


def programs(config):
    """The programs that can generate with a GPTConfig's model, name → class: this one and those that are installed."""
    found = {"this program": ThisProgram}
    if not (config.architecture == "gpt2" and config.gelu == "tanh" and config.bias):
        return found
    if find_spec("ctranslate2"):
        found["CTranslate2"] = CTranslate2
    if find_spec("llama_cpp") and find_spec("gguf") and config.n_embd % 32 == 0:  # the size of a block of Q8_0
        found["llama.cpp"] = LlamaCpp
    return found


class ThisProgram:
    """storygpt/generate.py with the weights that sample.py uses by default on an x86 CPU."""

    def __init__(self, model, prompt, folder):
        self.model, self.prompt = prepare_for_generation(model, "cpu", torch.int8), prompt

    def generate(self, batch_size, new_tokens, greedy=False):
        """Generate that many tokens for each sequence; returns their ids as an array (batch_size, new_tokens)."""
        idx = torch.full((batch_size, 1), self.prompt)
        steps = list(generate(self.model, idx, new_tokens, 0 if greedy else DEFAULTS.temperature, DEFAULTS.top_k))
        return torch.stack(steps, 1).numpy()


class LlamaCpp:
    """llama.cpp through the low-level interface of llama-cpp-python, which adds little time of its own."""

    def __init__(self, model, prompt, folder):
        import llama_cpp

        self.lib, self.config, self.prompt = llama_cpp, model.config, prompt
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p())
        write_gguf(folder / "model.gguf", model, "q8_0")
        self.model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(),
                                                          llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the GGUF file")

    def generate(self, batch_size, new_tokens, greedy=False):
        """Generate that many tokens for each sequence; returns their ids as an array (batch_size, new_tokens)."""
        lib = self.lib
        params = lib.llama_context_default_params()
        params.n_ctx = batch_size * self.config.block_size
        params.n_batch = params.n_ubatch = max(batch_size, 32)
        params.n_seq_max = batch_size
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        context = lib.llama_init_from_model(self.model, params)
        sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        samplers = [lib.llama_sampler_init_greedy()] if greedy else [
            lib.llama_sampler_init_top_k(DEFAULTS.top_k), lib.llama_sampler_init_temp(DEFAULTS.temperature),
            lib.llama_sampler_init_dist(0)]
        for each in samplers:
            lib.llama_sampler_chain_add(sampler, each)
        batch = lib.llama_batch_init(batch_size, 0, 1)
        batch.n_tokens = batch_size
        tokens = np.zeros((batch_size, new_tokens), np.int64)
        for position in range(new_tokens):
            for i in range(batch_size):
                batch.token[i] = tokens[i, position - 1] if position else self.prompt
                batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = position, 1, i, 1
            if lib.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            tokens[:, position] = [lib.llama_sampler_sample(sampler, context, i) for i in range(batch_size)]
        lib.llama_batch_free(batch)
        lib.llama_sampler_free(sampler)
        lib.llama_free(context)
        return tokens


class CTranslate2:
    """CTranslate2's Generator."""

    def __init__(self, model, prompt, folder):
        import ctranslate2

        self.prompt = str(prompt)
        c, weights = model.config, {name: p.numpy() for name, p in model.state_dict().items()}
        spec = ctranslate2.specs.TransformerDecoderModelSpec.from_config(
            c.n_layer, c.n_head, activation=ctranslate2.specs.Activation.GELUTanh)
        decoder = spec.decoder

        def fill(layer, name, names=("weight", "bias")):
            for attribute, kind in zip(names, ("weight", "bias")):
                if f"{name}.{kind}" in weights:
                    setattr(layer, attribute, weights[f"{name}.{kind}"])
        decoder.scale_embeddings = False
        fill(decoder.embeddings, "transformer.wte")
        fill(decoder.projection, "transformer.wte")
        fill(decoder.position_encodings, "transformer.wpe", ("encodings",))
        fill(decoder.layer_norm, "transformer.ln_f", ("gamma", "beta"))
        for i, layer in enumerate(decoder.layer):
            name = f"transformer.h.{i}"
            fill(layer.self_attention.layer_norm, f"{name}.ln_1", ("gamma", "beta"))
            fill(layer.self_attention.linear[0], f"{name}.attn.c_attn")
            fill(layer.self_attention.linear[1], f"{name}.attn.c_proj")
            fill(layer.ffn.layer_norm, f"{name}.ln_2", ("gamma", "beta"))
            fill(layer.ffn.linear_0, f"{name}.mlp.c_fc")
            fill(layer.ffn.linear_1, f"{name}.mlp.c_proj")
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
        spec.register_vocabulary(list(map(str, range(c.vocab_size))))
        spec.validate()
        spec.optimize(quantization="int8")
        (folder / "ctranslate2").mkdir(exist_ok=True)
        spec.save(str(folder / "ctranslate2"))
        self.generator = ctranslate2.Generator(str(folder / "ctranslate2"), intra_threads=torch.get_num_threads())

    def generate(self, batch_size, new_tokens, greedy=False):
        """Generate that many tokens for each sequence; returns their ids as an array (batch_size, new_tokens)."""
        results = self.generator.generate_batch(
            [[self.prompt]] * batch_size, max_length=new_tokens, min_length=new_tokens, include_prompt_in_result=False,
            sampling_topk=1 if greedy else DEFAULTS.top_k, sampling_temperature=1 if greedy else DEFAULTS.temperature)
        return np.array([result.sequences_ids[0] for result in results])

"""Generate a story with a file of `python -m tools.export out/run stories.onnx`, without PyTorch:

    pip install numpy "onnxruntime>=1.24" tiktoken
    python sample_onnx.py stories.onnx "Once upon a time" [SEED]
"""

import base64
import json
import sys
import time

import numpy as np
import onnxruntime as ort
import tiktoken


class Model:
    """The model of a file, with a cache for B stories. If it is small, one thread is fastest."""

    def __init__(self, file, B=1, threads=1):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.info = {key: json.loads(text) for key, text in self.session.get_modelmeta().custom_metadata_map.items()}
        self.binding, inputs = self.session.io_binding(), self.session.get_inputs()  # tokens, length, the cache
        values, self.has_cache = [*inputs[2:], self.session.get_outputs()[0]], len(inputs) > 1
        self.buffers = [np.zeros([B, *value.shape[1:]], np.float32) for value in values]
        for value, memory in zip(values, map(ort.OrtValue.ortvalue_from_numpy, self.buffers)):
            if value.name != "logits":
                self.binding.bind_ortvalue_input(value.name, memory)
            self.binding.bind_ortvalue_output(value.name.replace("past", "present"), memory)

    def __call__(self, tokens, length):
        """The logits (B, U) of the last of the tokens (B, T), which follow `length` cached ones."""
        self.binding.bind_cpu_input("tokens", tokens)
        if self.has_cache:
            self.binding.bind_cpu_input("length", np.array(length))
        self.session.run_with_iobinding(self.binding)
        return self.buffers[-1][:, :len(self.info["token_ids"])]  # one more is that of all tokens that do not occur


def generate(model, tokens, rng, temperature=0.8, top_k=200):
    """Continue a list of token ids; yields one token after the other. The context window advances by half a block.

    The temperature has to be above 0, `top_k` 1 or more.
    """
    half, cached_start = model.info["block_size"] // 2, None
    while True:
        start = half * max(0, -((model.info["block_size"] - len(tokens)) // half))
        new = tokens[-1:] if model.has_cache and start == cached_start else tokens[start:]
        logits, cached_start = model(np.array([new]), len(tokens) - start - len(new))[0], start
        tokens = [*tokens, model.info["token_ids"][sample(logits, rng, temperature, top_k)]]
        yield tokens[-1]


def sample(logits, rng, temperature, top_k):
    """Sample from the `top_k` largest logits (U), by rejection: from all logits, until one is among these."""
    cumulative = np.exp((logits - logits.max()) / np.float32(temperature)).cumsum(dtype=np.float64)
    while True:
        choice = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        if np.count_nonzero(logits > logits[choice]) < top_k:
            return choice


def main(file, prompt="", seed=None):
    """Print a story as it is generated."""
    model = Model(file)
    parts, end_of_text = model.info["tokenizer"], model.info["end_of_text"]
    parts["mergeable_ranks"] = {base64.b64decode(token): rank for token, rank in parts["mergeable_ranks"].items()}
    tokenizer, started = tiktoken.Encoding(**parts), time.perf_counter()
    sys.stdout.buffer.write(prompt.encode())
    tokens = [end_of_text, *tokenizer.encode_ordinary(prompt)]
    for count, token in enumerate(generate(model, tokens, np.random.default_rng(seed and int(seed))), 1):
        if token == end_of_text or count > 400:
            break
        sys.stdout.buffer.write(tokenizer.decode_single_token_bytes(token))  # may be a part of a character
        sys.stdout.flush()
    print(flush=True)
    print(f"{count / (time.perf_counter() - started):.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] and not sys.argv[1].startswith("-") else sys.exit(__doc__)

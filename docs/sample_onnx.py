"""Generate a story with a file that `python -m tools.export out/run stories.onnx` has written, without PyTorch:

    pip install numpy onnxruntime tiktoken
    python sample_onnx.py stories.onnx "Once upon a time" [seed]
"""

import base64
import codecs
import json
import sys
import time

import numpy as np
import onnxruntime
import tiktoken


class Model:
    """The model of a file in ONNX Runtime, with a cache for `batch_size` stories."""

    def __init__(self, file, batch_size=1, threads=1):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.metadata = self.session.get_modelmeta().custom_metadata_map
        self.block_size = int(self.metadata["block_size"])
        self.token_ids = np.array(json.loads(self.metadata["token_ids"]))  # of the U logits
        inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.binding, self.has_cache = self.session.io_binding(), "length" in inputs
        self.buffers = []
        for name, shape in [("logits", self.session.get_outputs()[0].shape), *list(inputs.items())[2:]]:
            self.buffers.append(np.zeros([batch_size, *shape[1:]], np.float32))
            value = onnxruntime.OrtValue.ortvalue_from_numpy(self.buffers[-1])  # the same memory
            if name != "logits":
                self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(name.replace("past", "present"), value)
        self.logits = self.buffers[0][:, :len(self.token_ids)]  # one more is that of all tokens that do not occur

    def __call__(self, tokens, length):
        """The logits (B, U) of the last of the tokens (B, T), which follow `length` cached ones; valid until called."""
        self.binding.bind_cpu_input("tokens", tokens)
        if self.has_cache:
            self.binding.bind_cpu_input("length", np.array(length))
        self.session.run_with_iobinding(self.binding)
        return self.logits


def generate(model, tokens, rng, temperature=0.8, top_k=200):
    """Continue a list of token ids; yields one token after the other. The context window advances by half a block."""
    half, cached_start = model.block_size // 2, None
    while True:
        start = half * max(0, -(-(len(tokens) - model.block_size) // half))
        new = tokens[-1:] if model.has_cache and start == cached_start else tokens[start:]
        logits = model(np.array([new]), len(tokens) - start - len(new))[0]
        cached_start = start
        tokens = [*tokens, int(model.token_ids[sample(logits, rng, temperature, top_k)])]
        yield tokens[-1]


def sample(logits, rng, temperature, top_k):
    """Sample one of the `top_k` largest logits (U): one of all, until it is among those. Temperature 0: the largest."""
    if temperature == 0:
        return logits.argmax()
    cumulative = np.exp((logits - logits.max()) / np.float32(temperature)).cumsum()
    while True:
        choice = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        if np.count_nonzero(logits > logits[choice]) < top_k:
            return choice


def main(file, prompt="", seed="1"):
    """Print a story as it is generated."""
    model = Model(file)
    parts = json.loads(model.metadata["tokenizer"])
    parts["mergeable_ranks"] = {base64.b64decode(token): rank for token, rank in parts["mergeable_ranks"].items()}
    encoding, decoder = tiktoken.Encoding(**parts), codecs.getincrementaldecoder("utf-8")("replace")
    end_of_text, count = int(model.metadata["end_of_text"]), 0
    print(prompt, end="", flush=True)
    started = time.perf_counter()
    for token in generate(model, [end_of_text, *encoding.encode_ordinary(prompt)], np.random.default_rng(int(seed))):
        count += 1
        if token == end_of_text or count == 400:
            break
        print(decoder.decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(f"\n{count / (time.perf_counter() - started):.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""llama.cpp through llama-cpp-python's C interface: one JSON line of tokens per second.

Usage: peer_llama_cpp.py MODEL.gguf --threads 2 --context 512 --steps 32
"""

import argparse
import ctypes
import json
import random
import statistics
import time
from pathlib import Path

import llama_cpp as ll

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--context", type=int, default=512)
parser.add_argument("--steps", type=int, default=32)
parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
parser.add_argument("--prefill", type=int, default=512)
arguments = parser.parse_args()

quiet = ll.llama_log_callback(lambda level, text, user: None)
ll.llama_log_set(quiet, ctypes.c_void_p(0))
ll.llama_backend_init()
model = ll.llama_model_load_from_file(str(arguments.model).encode(), ll.llama_model_default_params())
if not model:
    raise SystemExit(f"llama.cpp cannot load {arguments.model}")
vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
token = lambda: random.randrange(3, vocabulary)  # noqa: E731


class Context:
    """One context for `sequences` sequences, and a batch that is filled again for each step."""

    def __init__(self, sequences, tokens):
        parameters = ll.llama_context_default_params()
        parameters.n_ctx = sequences * tokens
        parameters.n_batch = parameters.n_ubatch = max(512, sequences)
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = arguments.threads
        self.handle = ll.llama_init_from_model(model, parameters)
        if not self.handle:
            raise SystemExit("llama.cpp made no context")
        self.batch = ll.llama_batch_init(parameters.n_batch, 0, 1)

    def decode(self, entries):
        """entries: (token, position, sequence, wants logits); returns the seconds it took."""
        self.batch.n_tokens = len(entries)
        for i, (identifier, position, sequence, logits) in enumerate(entries):
            self.batch.token[i] = identifier
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = logits
        start = time.perf_counter()
        if ll.llama_decode(self.handle, self.batch) != 0:
            raise SystemExit("llama_decode failed")
        ll.llama_synchronize(self.handle)
        return time.perf_counter() - start

    def prompt(self, sequence, length):
        return self.decode([(token(), p, sequence, p == length - 1) for p in range(length)])

    def clear(self):
        ll.llama_memory_clear(ll.llama_get_memory(self.handle), True)

    def close(self):
        ll.llama_batch_free(self.batch)
        ll.llama_free(self.handle)


figures = {}
context = Context(1, arguments.prefill + 32)
times = []
for _ in range(5):
    context.clear()
    times.append(context.prompt(0, arguments.prefill))
context.close()
figures[f"prefill_{arguments.prefill}"] = arguments.prefill / statistics.median(times[1:])

for batch in arguments.batches:
    context = Context(batch, arguments.context + arguments.steps + 8)
    for sequence in range(batch):
        context.prompt(sequence, arguments.context)
    times = []
    for step in range(arguments.steps):
        position = arguments.context + step
        times.append(context.decode([(token(), position, s, True) for s in range(batch)]))
    context.close()
    figures[f"decode_{batch}"] = batch / statistics.median(times[2:])

print(json.dumps({"peer": f"llama.cpp {ll.__version__} {arguments.model.stem}", **figures}))

"""The products of a layer in one kernel (gemm_chain.cu): against f64 with poisoned outputs, then timed beside kernels of their own.

chain.py compile DIR   every variant to DIR, on a machine without a GPU
chain.py check DIR     correctness, and the same bits in every replay
chain.py time DIR [models] [NAME=VALUE,...]   layers of Llama-3.1-8B in one graph, or of several models; variants of the kernel besides
"""

import ctypes
import hashlib
import math
import os
import sys

import gemm
import nvrtc
from gemm import Attribute, Config, WEIGHTS, check, cuda

ROWS, SETS = 8, 2
TILES = (1, 4, 8)  # rows of a kernel
REPLAYS = int(os.environ.get("REPLAYS", 300))
SOURCES = ("common.cuh", "gemm_skinny.cuh", "gemm_epilogue.cuh", "gemm_chain.cuh", "gemm_chain.cu")


def cubin(directory, weight, **defines):
    text = b"".join(open(os.path.join(nvrtc.KERNELS, s), "rb").read() for s in SOURCES)
    defines = dict(WEIGHT=WEIGHTS[weight], **defines)
    path = os.path.join(directory, f"chain-{hashlib.sha256(text + repr(sorted(defines.items())).encode()).hexdigest()[:16]}.cubin")
    if not os.path.exists(path):
        image, log = nvrtc.compile_cubin("gemm_chain.cu", "sm_90a", defines)
        print(defines, [line for line in log.splitlines() if "spill" in line or "registers" in line])
        os.makedirs(directory, exist_ok=True)
        with open(path, "wb") as f:
            f.write(image)
    return open(path, "rb").read()


class Product(ctypes.Structure):
    _fields_ = [("w_map", ctypes.c_ubyte * 128), ("w_scale", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("out", ctypes.c_int), ("k", ctypes.c_int),
                ("pad", ctypes.c_ubyte * 40)]


class Parameters(ctypes.Structure):
    _fields_ = [(n, Product) for n in ("o", "gate_up", "down", "qkv")] + [
        ("attended", ctypes.c_void_p), ("residual", ctypes.c_void_p), ("gamma", ctypes.c_void_p * 2), ("z", ctypes.c_void_p * 2),
        ("squares", ctypes.c_void_p * 2), ("inner", ctypes.c_void_p), ("qkv_out", ctypes.c_void_p), ("clear", ctypes.c_void_p),
        ("clear_count", ctypes.c_int), ("rows", ctypes.c_int), ("eps", ctypes.c_float), ("pad", ctypes.c_ubyte * 156)]


assert ctypes.sizeof(Product) == 192 and ctypes.sizeof(Parameters) == 1024


def map_of(w, box_rows):
    """[out][k] as {128 bytes of k, out, k / 128 bytes}: a box is box_rows outputs × 128 / box_rows blocks."""
    buffer = ctypes.create_string_buffer(128 + 64)
    at = (ctypes.addressof(buffer) + 63) // 64 * 64
    out, k = w.shape
    size = w.element_size()
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    code = cuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), {1: 0, 2: 9}[size], 3, ctypes.c_void_p(w.data_ptr()), (u64 * 3)(128 // size, out, k * size // 128), (u64 * 2)(k * size, 128),
        (u32 * 3)(128 // size, box_rows, 128 // box_rows), (u32 * 3)(1, 1, 1), 0, 3, 2, 0)
    check(code, "cuTensorMapEncodeTiled")
    return ctypes.string_at(at, 128)


class Kernel:
    def __init__(self, directory, weight, **defines):
        self.weight = weight
        self.handle, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        check(cuda().cuModuleLoadData(ctypes.byref(self.handle), cubin(directory, weight, **defines)), "module")
        place, size = ctypes.c_uint64(), ctypes.c_size_t()
        check(cuda().cuModuleGetGlobal_v2(ctypes.byref(place), ctypes.byref(size), self.handle, b"gemm_chain_shape"), "shape")
        shape = (ctypes.c_int * 4)()
        check(cuda().cuMemcpyDtoH_v2(shape, place, 16), "shape")
        self.threads, self.shared = shape[0], shape[1]
        check(cuda().cuModuleGetFunction(ctypes.byref(self.function), self.handle, b"gemm_chain"), "kernel")
        check(cuda().cuFuncSetAttribute(self.function, 8, self.shared), "shared memory")
        processors = ctypes.c_int()
        check(cuda().cuDeviceGetAttribute(ctypes.byref(processors), 16, 0), "multiprocessors")
        self.blocks = processors.value  # all of them wait for each other

    def launch(self, p, stream, dependent=True):
        attribute = Attribute(6, 0)
        attribute.value[0] = 1
        config = Config((ctypes.c_uint * 3)(self.blocks, 1, 1), (ctypes.c_uint * 3)(self.threads, 1, 1), self.shared, stream, ctypes.pointer(attribute), int(dependent))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(p))
        check(cuda().cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None), "launch")


class Weights:
    """One layer's matrices, on the device; `exact` in f64 if asked for."""

    def __init__(self, torch, weight, hidden, intermediate, qkv, attended, exact, like=None):
        self.sizes = {"o": (hidden, attended), "gate_up": (2 * intermediate, hidden), "down": (hidden, intermediate), "qkv": (qkv, hidden)}
        self.w, self.scale, self.exact = {}, {}, {}
        for name, (out, k) in self.sizes.items():
            if out == 0:
                continue
            if weight == "bf16":
                w = torch.empty(out, k, device="cuda", dtype=torch.bfloat16).normal_(0, 1 / math.sqrt(k))
                self.w[name], self.scale[name] = w, None
                if exact:
                    self.exact[name] = w.double()
                continue
            b = gemm.e4m3_random(torch, out, k)
            scale, full = self.scales(torch, weight, name, out, k)
            self.w[name], self.scale[name] = gemm.prepack(torch, b), scale
            if exact:
                self.exact[name] = b.view(torch.float8_e4m3fn).double() * full()

    @staticmethod
    def scales(torch, weight, name, out, k):
        size = 0.02 / math.sqrt(k)
        if weight == "fp8":
            scale = torch.rand(out, device="cuda") * size + size / 10
            return scale, lambda: scale.double()[:, None]
        blocks = -(-k // 128)
        if name == "gate_up":
            scale = torch.rand(2, -(-out // 2 // 128), blocks, device="cuda") * size + size / 10
            row = torch.arange(out, device="cuda")
            return scale, lambda: scale[(row // 8) % 2, (row // 16 * 8 + row % 8) // 128].double().repeat_interleave(128, 1)[:, :k]
        scale = torch.rand(-(-out // 128), blocks, device="cuda") * size + size / 10
        return scale, lambda: scale.double().repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :k]


class Chain:
    """Layers whose launches follow each other: attended is the same for all."""

    def __init__(self, torch, kernel, layers, biased=False):
        self.torch, self.kernel, self.layers = torch, kernel, layers
        sizes = layers[0].sizes
        hidden, attended, inner, qkv = sizes["o"][0], sizes["o"][1], sizes["down"][1], sizes["qkv"][0]
        self.hidden, self.inner_size, self.qkv_size = hidden, inner, qkv
        b = lambda *s: torch.randn(*s, device="cuda").bfloat16()
        self.attended, self.residual = b(ROWS, attended), torch.randn(ROWS, hidden, device="cuda")
        self.gamma = [[b(hidden), b(hidden)] for _ in layers]
        self.bias = [b(qkv) if biased and qkv else None for _ in layers]
        self.qkv = [torch.full((ROWS, max(qkv, 8)), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in layers]
        # a set: z and inner (bf16), squares (f32), in one allocation of words
        words = [ROWS * hidden // 2, ROWS * hidden // 2, ROWS * inner // 2, ROWS * hidden // 32, ROWS * hidden // 32]
        self.sets = torch.full((SETS, sum(words)), -1, dtype=torch.int32, device="cuda")
        self.offsets = [sum(words[:i]) * 4 for i in range(len(words))]

    def parameters(self, i, rows):
        layer, sizes = self.layers[i], self.layers[i].sizes
        p = Parameters()
        for name, box in (("o", 32), ("gate_up", 32), ("down", 32), ("qkv", 16)):
            to, (out, k) = getattr(p, name), sizes[name]
            to.out, to.k = out, k
            if out:
                to.w_map[:] = map_of(layer.w[name], box)
                to.w_scale = layer.scale[name].data_ptr() if layer.scale[name] is not None else None
        if self.bias[i] is not None:
            p.qkv.bias = self.bias[i].data_ptr()
        own, other = (self.sets[(i + n) % SETS].data_ptr() for n in (0, 1))
        z0, z1, inner, s0, s1 = (own + o for o in self.offsets)
        p.attended, p.residual, p.inner, p.qkv_out = self.attended.data_ptr(), self.residual.data_ptr(), inner, self.qkv[i].data_ptr()
        p.gamma[:] = [g.data_ptr() for g in self.gamma[i]]
        p.z[:], p.squares[:] = [z0, z1], [s0, s1]
        p.clear, p.clear_count, p.rows, p.eps = other, self.sets.shape[1] // 4, rows, 1e-5
        return p

    def graph(self, rows, dependent=True):
        torch = self.torch
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            raw = torch.cuda.current_stream().cuda_stream
            for i in range(len(self.layers)):
                self.kernel.launch(self.parameters(i, rows), raw, dependent)
        return graph

    def exchanged(self):
        """What the last launch exchanged: z after o and after down, inner, squares; as words."""
        last = self.sets[(len(self.layers) - 1) % SETS]
        ends = [o // 4 for o in self.offsets[1:]] + [last.shape[0]]
        return [last[o // 4 : e].view(ROWS, -1).clone() for o, e in zip(self.offsets, ends)]

    def differences(self, first, got, rows):
        names = ["residual"] + [f"qkv {i}" for i in range(len(self.layers)) if self.qkv_size] + ["z 0", "z 1", "inner", "squares 0", "squares 1"]
        found = []
        for name, a, b in zip(names, first, got):
            where = (a[:rows] != b[:rows]).nonzero()
            if len(where):
                columns = where[:, 1]
                found.append(f"{name}: {len(where)} in rows {sorted(set(where[:, 0].tolist()))}, columns {columns.min().item()}..{columns.max().item()}, {len(set((columns // 16).tolist()))} sixteens")
        return "; ".join(found)

    def expected(self, rows, residual):
        """In f64, but z and inner rounded as they are: residual, and each layer's qkv."""
        torch, out = self.torch, []
        residual = residual[:rows].double()
        for layer, gamma, bias in zip(self.layers, self.gamma, self.bias):
            rms = lambda: torch.sqrt((residual * residual).mean(1, keepdim=True) + 1e-5)
            round_ = lambda v: v.bfloat16().double()
            residual = residual + self.attended[:rows].double() @ layer.exact["o"].T
            t = (round_(residual * gamma[0].double()) @ layer.exact["gate_up"].T / rms()).view(rows, -1, 2, 8)
            inner = round_((torch.nn.functional.silu(t[:, :, 0]) * t[:, :, 1]).reshape(rows, -1))
            residual = residual + inner @ layer.exact["down"].T
            if self.qkv_size:
                q = round_(residual * gamma[1].double()) @ layer.exact["qkv"].T / rms()
                out.append(q + bias.double() if bias is not None else q)
        return residual, out


SHAPES = [  # hidden, intermediate, qkv, attended
    (4096, 14336, 6144, 4096), (576, 1536, 960, 576), (896, 4864, 1152, 896), (2048, 8192, 3072, 2048), (8192, 3584, 10240, 8192), (128, 256, 192, 64), (64, 192, 0, 128),
]


def check_all(directory):
    import torch

    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    torch.zeros(1, device="cuda")
    bad = total = 0
    for weight in WEIGHTS:
        kernels, worst = {rows: Kernel(directory, weight, ROWS=rows) for rows in TILES}, 0.0
        for shape in SHAPES:
            if weight != "bf16" and any(k % 128 for k in (shape[0], shape[1], shape[3])):
                continue
            layers = [Weights(torch, weight, *shape, exact=True) for _ in range(2)]
            chain = Chain(torch, None, layers, biased=shape[0] == 896)
            for rows in (1, 2, 4, 5, 8):
                total += 1
                chain.kernel = kernels[min(t for t in TILES if t >= rows)]
                start = torch.randn(ROWS, shape[0], device="cuda")
                graph, first = chain.graph(rows), None
                for turn in range(REPLAYS):
                    chain.residual.copy_(start)
                    for q in chain.qkv if turn == 0 else ():
                        q.fill_(float("nan"))
                    graph.replay()
                    got = [chain.residual.clone()] + [q.clone() for q in chain.qkv if chain.qkv_size] + chain.exchanged()
                    if first is None:
                        torch.cuda.synchronize()
                        first = got
                    elif not all(torch.equal(a[:rows], b[:rows]) for a, b in zip(first, got) if a.dtype != torch.int32):
                        print(f"NOT THE SAME BITS {weight} {shape} rows={rows} turn={turn}: {chain.differences(first, got, rows)}")
                        bad += 1
                        break
                residual, qkv = chain.expected(rows, start)
                for name, g, w, limit in [("residual", first[0], residual, 4e-3)] + [(f"qkv {i}", g, w, 6e-3) for i, (g, w) in enumerate(zip(first[1:], qkv))]:
                    error = ((g[:rows].double() - w).norm() / w.norm()).item()
                    worst = max(worst, error / limit)
                    if not error < limit:
                        print(f"WRONG {weight} {shape} rows={rows} {name}: {error:.2e}")
                        bad += 1
                if not torch.equal(first[0][rows:], start[rows:]):
                    print(f"WRONG {weight} {shape} rows={rows}: rows beyond written")
                    bad += 1
            del layers, chain
        print(f"{weight}: worst error / limit {worst:.2f}", flush=True)
    print(f"{total} cases, {bad} wrong", flush=True)
    return bad


MODELS = {  # hidden, intermediate, qkv, attended, layers
    "Llama-3.1-8B": (4096, 14336, 6144, 4096, 32),
    "Llama-3.2-1B": (2048, 8192, 3072, 2048, 16),
    "Llama-3.2-3B": (3072, 8192, 5120, 3072, 28),
    "Qwen2.5-7B": (3584, 18944, 4608, 3584, 28),
    "Qwen3-14B": (5120, 17408, 7168, 5120, 40),
    "Llama-3.1-70B": (8192, 28672, 10240, 8192, 20),
}


def own_kernels(torch, module, layers, rows):
    """The same products in launches of their own, as a graph."""
    hidden, attended = layers[0].sizes["o"]
    qkv, inner = layers[0].sizes["qkv"][0], layers[0].sizes["down"][1]
    b = lambda *s: torch.randn(*s, device="cuda").bfloat16()
    x = {"z": b(128, hidden), "attended": b(128, attended), "inner": b(128, inner)}
    maps = {n: gemm.tensor_map(t.data_ptr(), t.shape[1], 128, 2, 64, module.n_tile) for n, t in x.items()}
    ssq, residual, gamma, out = torch.rand(128, -(-hidden // 64), device="cuda") * 128, torch.randn(128, hidden, device="cuda"), b(hidden), b(128, qkv)
    norm = dict(x_ssq=ssq, x_ssq_tiles=-(-hidden // 64), eps=1e-5)
    add = dict(residual=residual, gamma=gamma, y=x["z"], y_ssq=ssq)
    steps = [("o", "attended", "residual", add), ("gate_up", "z", "swiglu", dict(y=x["inner"], **norm)), ("down", "inner", "residual", add), ("qkv", "z", "store", dict(y=out, **norm))]
    kept = [x, ssq, residual, gamma, out]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        raw = torch.cuda.current_stream().cuda_stream
        for layer in layers:
            for name, source, epilogue, more in steps:
                p = gemm.parameters(gemm.Matrix(layer.w[name], layer.scale[name]), x[source], maps[source], rows, **more)
                gemm.launch(module, epilogue, p, *module.plan(p.out, p.k), raw)
    return graph, kept


def time_all(directory):
    import torch

    torch.zeros(1, device="cuda")
    ceiling = gemm.read_ceiling(torch)
    print(f"read ceiling {ceiling:.3f} TB/s", flush=True)
    variants = [dict(v.split("=") for v in a.split(",")) for a in sys.argv[3:] if "=" in a]
    models = MODELS if "models" in sys.argv else {"Llama-3.1-8B": MODELS["Llama-3.1-8B"]}
    for (name, (*shape, count)), weight in ((m, w) for m in models.items() for w in WEIGHTS):
        if weight == "fp8_block" and len(models) > 1:
            continue
        layers = [Weights(torch, weight, *shape, exact=False) for _ in range(count)]
        size = sum(w.numel() * w.element_size() for layer in layers for w in layer.w.values())
        line = lambda what, times: print(f"{name} {weight} {what}, us a layer of {size / count / 1e6:.0f} MB: " + "  ".join(
            f"rows={rows} {ms / count * 1000:.1f} {size / ms / 1e9 / ceiling:.1%}" for rows, ms in times), flush=True)
        for defines in [{}] + variants:
            kernels = {rows: Kernel(directory, weight, ROWS=rows, **defines) for rows in TILES}
            chain, times = Chain(torch, None, layers), []
            for rows in (1, 2, 4, 8):
                chain.kernel = kernels[min(t for t in TILES if t >= rows)]
                times.append((rows, gemm.median_ms(torch, chain.graph(rows).replay)))
            line(f"chain {defines}", times)
        module, times = gemm.Module(directory, weight, 8), []
        for rows in (1, 8):
            graph, kept = own_kernels(torch, module, layers, rows)
            times.append((rows, gemm.median_ms(torch, graph.replay)))
        line("kernels of their own", times)
        del layers, chain, graph, kept
        torch.cuda.empty_cache()


def main():
    what, directory = sys.argv[1], sys.argv[2]
    if what == "compile":
        variants = [dict(v.split("=") for v in a.split(",")) for a in sys.argv[3:]]
        for weight in WEIGHTS:
            for defines in [{}] + variants:
                for rows in TILES:
                    cubin(directory, weight, ROWS=rows, **defines)
            gemm.cubin(directory, WEIGHT=WEIGHTS[weight], N_TILE=8)
    elif what == "check":
        sys.exit(1 if check_all(directory) else 0)
    else:
        time_all(directory)


if __name__ == "__main__":
    main()

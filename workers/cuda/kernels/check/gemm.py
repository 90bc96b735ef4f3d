"""Skinny GEMM: against f64 with poisoned outputs, then timed over weights far larger than L2.

gemm.py compile DIR              every variant to DIR, on a machine without a GPU
gemm.py check DIR [quick]        correctness
gemm.py time DIR                 the four matrices of 32 layers and the output matrix of Llama-3.1-8B, in one graph
"""

import ctypes
import hashlib
import math
import os
import sys

import nvrtc

ROWS_TILES = (8, 16, 24, 32, 48, 64)
WEIGHTS = {"bf16": 0, "fp8": 1, "fp8_block": 2}
# Beside the variants that their rows and weights give: wide tiles, as the executor takes them for some products.
MORE = [(w, n, dict(M_TILE=128)) for w in ("bf16", "fp8") for n in (32, 48, 64)]
EPILOGUES = ("store", "residual", "swiglu", "logits")
SOURCES = ("common.cuh", "gemm_skinny.cuh", "gemm_epilogue.cuh", "gemm_hopper.cuh", "gemm_ampere.cuh", "wgmma.cuh", "gemm_skinny.cu")

READ = r"""
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* from, unsigned long long count, unsigned* to) {
    unsigned sum = 0;
    unsigned long long at = blockIdx.x * 512ull + threadIdx.x, step = gridDim.x * 512ull;
    for (; at + 7 * step < count; at += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int i = 0; i < 8; i++)
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(v[i].x), "=r"(v[i].y), "=r"(v[i].z), "=r"(v[i].w) : "l"(from + at + i * step));
#pragma unroll
        for (int i = 0; i < 8; i++) sum += v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
    }
    for (; at < count; at += step) sum += from[at].x ^ from[at].y ^ from[at].z ^ from[at].w;
    if (sum == 0x12345) *to = sum;
}
"""


def cubin(directory, arch="sm_90a", **defines):
    """Machine code of one variant, from DIR if the sources are the same."""
    text = b"".join(open(os.path.join(nvrtc.KERNELS, s), "rb").read() for s in SOURCES)
    key = hashlib.sha256(text + repr((arch, sorted(defines.items()))).encode()).hexdigest()[:16]
    path = os.path.join(directory, f"gemm-{key}.cubin")
    if not os.path.exists(path):
        image, log = nvrtc.compile_cubin("gemm_skinny.cu", arch, defines)
        if "spill" in log and any(" 0 bytes spill stores" not in l for l in log.splitlines() if "spill" in l):
            print(defines, log)
        os.makedirs(directory, exist_ok=True)
        with open(path + ".new", "wb") as f:
            f.write(image)
        os.rename(path + ".new", path)
    return open(path, "rb").read()


def _compile(job):
    directory, defines = job
    cubin(directory, **defines)


def compile_all(directory, variants):
    """Many variants, a process each."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.map(_compile, [(directory, d) for d in variants], chunksize=1)


# --- the driver -----------------------------------------------------------------------------------


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
                ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint)]


class Parameters(ctypes.Structure):
    _fields_ = [("w_map", ctypes.c_ubyte * 128), ("x_map", ctypes.c_ubyte * 128)] + [
        (n, ctypes.c_void_p) for n in ("w", "x", "w_scale", "bias", "x_ssq", "gamma", "y", "residual", "y_ssq")
    ] + [(n, ctypes.c_int) for n in ("out", "k", "rows", "x_ssq_tiles")] + [("eps", ctypes.c_float), ("pad", ctypes.c_ubyte * 164)]


_cuda = None


def cuda():
    global _cuda
    _cuda = _cuda or ctypes.CDLL("libcuda.so.1")
    return _cuda


def check(code, what):
    if code:
        raise RuntimeError(f"{what}: CUDA error {code}")


def tensor_map(address, columns, rows, element_bytes, box_columns, box_rows):
    """cuTensorMapEncodeTiled of a row-major [rows][columns] matrix, 128-byte swizzle, zeros outside."""
    buffer = ctypes.create_string_buffer(128 + 64)
    at = (ctypes.addressof(buffer) + 63) // 64 * 64
    dtype = {1: 0, 2: 9}[element_bytes]  # UINT8, BFLOAT16
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    code = cuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), dtype, 2, ctypes.c_void_p(address), (u64 * 2)(columns, rows), (u64 * 1)(columns * element_bytes),
        (u32 * 2)(box_columns, box_rows), (u32 * 2)(1, 1), 0, 3, 2, 0)  # no interleave, 128B swizzle, L2 promotion 128B
    check(code, "cuTensorMapEncodeTiled")
    return ctypes.string_at(at, 128)


class Module:
    """One variant, loaded."""

    def __init__(self, directory, weight, n_tile, **defines):
        self.weight, self.portable = weight, "PORTABLE" in defines
        image = cubin(directory, WEIGHT=WEIGHTS[weight], N_TILE=n_tile, **defines)
        self.handle = ctypes.c_void_p()
        check(cuda().cuModuleLoadData(ctypes.byref(self.handle), image), "module")
        place, size = ctypes.c_uint64(), ctypes.c_size_t()
        check(cuda().cuModuleGetGlobal_v2(ctypes.byref(place), ctypes.byref(size), self.handle, b"gemm_skinny_shape"), "shape")
        shape = (ctypes.c_int * 4)()
        check(cuda().cuMemcpyDtoH_v2(shape, place, 16), "shape")
        self.m_tile, self.n_tile, self.threads, self.shared = shape
        self.functions = {}
        for e in EPILOGUES:
            f = ctypes.c_void_p()
            check(cuda().cuModuleGetFunction(ctypes.byref(f), self.handle, f"gemm_skinny_{e}".encode()), e)
            check(cuda().cuFuncSetAttribute(f, 8, self.shared), "shared memory")
            self.functions[e] = f

    def plan(self, out, k, processors=132):
        """(clusters, split): which CTAs there are. With split > 1 every cluster has exactly one tile."""
        tiles = -(-out // self.m_tile)
        chunks = -(-k // 256)
        if 2 * tiles > processors:
            return -(-tiles // -(-tiles // processors)), 1
        split = 1
        while split < 8 and tiles * split * 2 <= (processors if split == 1 else processors // 2) and chunks >= split * 4:
            split *= 2
        return tiles, split


def launch(module, epilogue, parameters, clusters, split, stream, dependent=True):
    attributes = (Attribute * 2)()
    count = 0
    if not module.portable:
        attributes[count].id = 4  # cluster dimension
        attributes[count].value[0:3] = [split, 1, 1]
        count += 1
    if dependent:
        attributes[count].id = 6  # programmatic stream serialization
        attributes[count].value[0] = 1
        count += 1
    grid = (-(-parameters.out // module.m_tile), 1, 1) if module.portable else (clusters * split, 1, 1)
    config = Config((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(module.threads, 1, 1), module.shared, stream, attributes, count)
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
    check(cuda().cuLaunchKernelEx(ctypes.byref(config), module.functions[epilogue], pointers, None), "launch")


class Matrix:
    """w on the device: [out][k] BF16 or e4m3 bytes, with its map and scales."""

    def __init__(self, w, scale=None):
        self.w, self.scale = w, scale
        self.out, self.k = w.shape
        self.bytes = w.element_size()
        self.map = tensor_map(w.data_ptr(), self.k, self.out, self.bytes, 128 // self.bytes, 64)


def parameters(matrix, x, x_map, rows, **more):
    """x: buffer [at least rows][k]; the rest by name, tensors or numbers."""
    p = Parameters()
    p.w_map[:], p.x_map[:] = matrix.map, x_map
    p.w, p.x, p.out, p.k, p.rows = matrix.w.data_ptr(), x.data_ptr(), matrix.out, matrix.k, rows
    if matrix.scale is not None:
        p.w_scale = matrix.scale.data_ptr()
    for name, value in more.items():
        setattr(p, name, value.data_ptr() if hasattr(value, "data_ptr") else value)
    return p


# --- correctness ----------------------------------------------------------------------------------


def e4m3_random(torch, out, k):
    """Bytes without NaN, magnitudes up to 448, subnormals and zeros among them."""
    b = torch.randint(0, 256, (out, k), dtype=torch.uint8, device="cuda")
    return torch.where((b & 0x7F) == 0x7F, b ^ 1, b)


def prepack(torch, w):
    """The order within each 16 of k that the kernels want: see e4m3_pair."""
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    return w.view(w.shape[0], -1, 16)[:, :, order].reshape(w.shape).contiguous()


def one_case(torch, module, epilogue, out, k, rows, split, norm, bias, stream):
    weight, dev = module.weight, "cuda"
    g = lambda *s: torch.randn(*s, device=dev)
    if weight == "bf16":
        w = (g(out, k) / math.sqrt(k)).bfloat16()
        exact, matrix = w.double(), Matrix(w)
    else:
        b = e4m3_random(torch, out, k)
        exact = b.view(torch.float8_e4m3fn).double()
        if weight == "fp8":
            scale = torch.rand(out, device=dev) * 0.02 + 0.001
            exact = exact * scale.double()[:, None]
        elif epilogue == "swiglu":
            half, kb = -(-out // 2 // 128), -(-k // 128)
            scale = torch.rand(2, half, kb, device=dev) * 0.02 + 0.001
            row = torch.arange(out, device=dev)
            full = scale[(row // 8) % 2, (row // 16 * 8 + row % 8) // 128]
            exact = exact * full.double().repeat_interleave(128, 1)[:, :k]
        else:
            scale = torch.rand(-(-out // 128), -(-k // 128), device=dev) * 0.02 + 0.001
            exact = exact * scale.double().repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :k]
        matrix = Matrix(prepack(torch, b), scale.contiguous())
    buffer_rows = max(rows, module.n_tile) + 3
    x = torch.full((buffer_rows, k), float("nan"), device=dev, dtype=torch.bfloat16)
    x[:rows] = g(rows, k).bfloat16()
    x_map = tensor_map(x.data_ptr(), k, buffer_rows, 2, 64, module.n_tile)
    nan = lambda *s, dtype=torch.float32: torch.full(s, float("nan"), device=dev, dtype=dtype)
    more, eps = {}, 1e-5
    y = x[:rows].double() @ exact.T
    if norm:
        tiles = -(-k // 64)
        ssq = torch.rand(rows, tiles, device=dev) * 128
        more.update(x_ssq=ssq, x_ssq_tiles=tiles, eps=eps)
        y = y / torch.sqrt(ssq.double().sum(1, keepdim=True) / k + eps)
    if bias:
        b = g(out).bfloat16()
        more.update(bias=b)
        y = y + b.double()
    outputs = {}
    if epilogue == "store":
        outputs["y"] = (nan(buffer_rows, out, dtype=torch.bfloat16), y)
    elif epilogue == "logits":
        outputs["y"] = (nan(buffer_rows, out), y)
    elif epilogue == "swiglu":
        t = y.view(rows, -1, 2, 8)
        outputs["y"] = (nan(buffer_rows, out // 2, dtype=torch.bfloat16), (torch.nn.functional.silu(t[:, :, 0]) * t[:, :, 1]).reshape(rows, -1))
    else:
        residual, gamma = nan(buffer_rows, out), g(out).bfloat16()
        residual[:rows] = g(rows, out)
        more["gamma"] = gamma
        new = residual[:rows].double() + y
        tiles = -(-out // 64)
        padded = torch.zeros(rows, tiles * 64, device=dev, dtype=torch.float64)
        padded[:, :out] = new * new
        outputs["residual"] = (residual, new)
        outputs["y"] = (nan(buffer_rows, out, dtype=torch.bfloat16), new * gamma.double())
        outputs["y_ssq"] = (nan(buffer_rows, tiles), padded.view(rows, tiles, 64).sum(2))
    more.update({n: t for n, (t, _) in outputs.items()})
    p = parameters(matrix, x, x_map, rows, **more)
    clusters, own = module.plan(out, k)
    tiles = -(-out // module.m_tile)
    if split is not None:
        clusters, own = (tiles, split) if split > 1 else (min(tiles, clusters), 1)
    launch(module, epilogue, p, clusters, own, stream)
    torch.cuda.synchronize()
    worst = 0.0
    for name, (got, want) in outputs.items():
        error = ((got[:rows].double() - want).norm() / want.norm()).item()
        limit = 4e-3 if got.dtype == torch.bfloat16 else 2e-4
        kept = bool(torch.isnan(got[rows:]).all())
        worst = max(worst, error / limit)
        if not error < limit or not kept:
            print(f"WRONG {weight} n_tile={module.n_tile} portable={module.portable} {epilogue} {out}x{k} rows={rows} split={own}: "
                  f"{name} error {error:.2e}, rows beyond kept: {kept}")
            return math.inf
    if epilogue != "residual":  # the same bits again
        name = "y"
        before = outputs[name][0].clone()
        launch(module, epilogue, p, clusters, own, stream)
        torch.cuda.synchronize()
        if not torch.equal(before[:rows], outputs[name][0][:rows]):
            print(f"NOT THE SAME BITS {weight} {epilogue} {out}x{k} rows={rows} split={own}")
            return math.inf
    return worst


def check_all(directory, quick=False):
    import torch

    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    torch.zeros(1, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    shapes = [(4096, 4096), (576, 576), (960, 576), (896, 4864), (128, 64), (49152, 576), (9728, 896), (24, 208)]
    bad = total = 0
    for portable in (False,) if "hopper" in sys.argv else (False, True):
        for weight in WEIGHTS:
            for n_tile in (8, 32, 64) if quick or portable else ROWS_TILES:
                module = Module(directory, weight, n_tile, **({"PORTABLE": 1} if portable else {}))
                worst = 0.0
                for out, k in shapes:
                    for epilogue in EPILOGUES:
                        if epilogue == "swiglu" and out % 16:
                            continue
                        for rows in {max(1, n_tile - 8 + 1), n_tile}:
                            for split in (1, 2, 4, None) if not portable else (1,):
                                if split == 4 and (out > 5000 or k < 256):
                                    continue
                                r = one_case(torch, module, epilogue, out, k, rows, split, total % 2 == 0, total % 3 == 0 and epilogue != "logits", stream)
                                total += 1
                                bad += r == math.inf
                                worst = max(worst, r)
                if not portable:  # a vocabulary that no vector width divides
                    r = one_case(torch, module, "logits", 1003, 896, n_tile, None, True, False, stream)
                    total, bad, worst = total + 1, bad + (r == math.inf), max(worst, r)
                print(f"{'portable' if portable else 'hopper'} {weight} n_tile={n_tile} m_tile={module.m_tile} shared={module.shared}: worst error / limit {worst:.2f}", flush=True)
    for weight, n_tile, defines in MORE:
        module = Module(directory, weight, n_tile, **defines)
        worst = 0.0
        for out, k in [(28672, 4096)] + shapes[:4]:  # the first: several tiles for each CTA
            for epilogue in EPILOGUES:
                for rows in {n_tile - 7, n_tile}:
                    for split in (1, 2, None) if out < 5000 else (None,):
                        r = one_case(torch, module, epilogue, out, k, rows, split, total % 2 == 0, total % 3 == 0 and epilogue != "logits", stream)
                        total, bad, worst = total + 1, bad + (r == math.inf), max(worst, r)
        print(f"{weight} n_tile={n_tile} {defines}: worst error / limit {worst:.2f}", flush=True)
    print(f"{total} cases, {bad} wrong", flush=True)
    return bad


# --- time -----------------------------------------------------------------------------------------

HIDDEN, QKV, GATE_UP, VOCAB, LAYERS = 4096, 6144, 28672, 128256, 32
SHAPES = {"qkv": (QKV, HIDDEN, "store"), "o": (HIDDEN, HIDDEN, "residual"), "gate_up": (GATE_UP, HIDDEN, "swiglu"), "down": (HIDDEN, GATE_UP // 2, "residual")}


def read_ceiling(torch):
    """TB/s of a kernel that only reads 4 GiB; best of many."""
    source = os.path.join(nvrtc.KERNELS, "check", "read_all.cu")
    with open(source, "w") as f:
        f.write(READ)
    image, _ = nvrtc.compile_cubin("check/read_all.cu", "sm_90a")
    os.remove(source)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(cuda().cuModuleLoadData(ctypes.byref(module), image), "module")
    check(cuda().cuModuleGetFunction(ctypes.byref(function), module, b"read_all"), "function")
    data = torch.randint(-(2**31), 2**31 - 1, (2**30,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")
    best = 0
    for blocks in (132 * 2, 132 * 4, 132 * 8, 132 * 32):
        arguments = [ctypes.c_uint64(data.data_ptr()), ctypes.c_uint64(2**28), ctypes.c_uint64(sink.data_ptr())]
        pointers = (ctypes.c_void_p * 3)(*[ctypes.addressof(a) for a in arguments])

        def go():
            check(cuda().cuLaunchKernel(function, blocks, 1, 1, 512, 1, 1, 0, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), pointers, None), "read")

        best = max(best, 2**32 / median_ms(torch, go, 10) / 1e9)
    return best


def median_ms(torch, go, times=15):
    go(), go()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for a, b in events:
        a.record(), go(), b.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in events)[times // 2]


class Bench:
    def __init__(self, torch, directory, weight):
        self.torch, self.directory, self.weight = torch, directory, weight
        self.matrices = {n: [self.matrix(o, k) for _ in range(LAYERS)] for n, (o, k, _) in SHAPES.items()}
        self.head = self.matrix(VOCAB, HIDDEN)

    def matrix(self, out, k):
        torch = self.torch
        if self.weight == "bf16":
            return Matrix(torch.empty(out, k, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02))
        w = torch.randint(0, 256, (out, k), dtype=torch.uint8, device="cuda") & 0xBF
        shape = (out,) if self.weight == "fp8" else (-(-out // 128), -(-k // 128))
        return Matrix(w, torch.full(shape, 0.02, device="cuda"))

    def buffers(self, module):
        torch = self.torch
        b = lambda *s: torch.randn(*s, device="cuda").bfloat16()
        z, attention, hidden = b(64, HIDDEN), b(64, HIDDEN), b(64, GATE_UP // 2)
        return dict(z=z, attention=attention, hidden=hidden, qkv=b(64, QKV), residual=torch.randn(64, HIDDEN, device="cuda"),
                    ssq=torch.rand(64, 64, device="cuda") * 128, gamma=b(HIDDEN), logits=torch.empty(64, VOCAB, device="cuda"),
                    maps={n: tensor_map(t.data_ptr(), t.shape[1], 64, 2, 64, module.n_tile) for n, t in (("z", z), ("attention", attention), ("hidden", hidden))})

    def calls(self, module, rows):
        """name → list of (epilogue, parameters)."""
        t = self.buffers(module)
        self.keep = t
        norm = dict(x_ssq=t["ssq"], x_ssq_tiles=64, eps=1e-5)
        add = dict(residual=t["residual"], gamma=t["gamma"], y=t["z"], y_ssq=t["ssq"])
        m, maps = self.matrices, t["maps"]
        return {
            "qkv": [("store", parameters(w, t["z"], maps["z"], rows, y=t["qkv"], **norm)) for w in m["qkv"]],
            "o": [("residual", parameters(w, t["attention"], maps["attention"], rows, **add)) for w in m["o"]],
            "gate_up": [("swiglu", parameters(w, t["z"], maps["z"], rows, y=t["hidden"], **norm)) for w in m["gate_up"]],
            "down": [("residual", parameters(w, t["hidden"], maps["hidden"], rows, **add)) for w in m["down"]],
            "head": [("logits", parameters(self.head, t["z"], maps["z"], rows, y=t["logits"], **norm))],
        }

    def graph(self, module, sequence, plans, dependent=True):
        torch = self.torch
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            raw = torch.cuda.current_stream().cuda_stream
            for name, (epilogue, p) in sequence:
                clusters, split = plans.get(name) or module.plan(p.out, p.k)
                launch(module, epilogue, p, clusters, split, raw, dependent)
        return median_ms(torch, graph.replay)

    def run(self, rows, ceiling, label="", plans=None, each=True, **defines):
        plans = plans or {}
        n_tile = min(n for n in ROWS_TILES if n >= rows)
        module = Module(self.directory, self.weight, n_tile, **defines)
        calls = self.calls(module, rows)
        whole = [(n, calls[n][i]) for i in range(LAYERS) for n in SHAPES] + [("head", calls["head"][0])]
        count = lambda seq: sum(p.out * p.k for _, (_, p) in seq) * (2 if self.weight == "bf16" else 1)
        ms = self.graph(module, whole, plans)
        line = f"{self.weight} rows={rows:3d} {label:20s} chain {ms:6.3f} ms {count(whole) / ms / 1e9 / ceiling:5.1%}"
        if each:
            for n in calls:
                seq = [(n, c) for c in calls[n]]
                each_ms = self.graph(module, seq, plans)
                line += f" | {n} {each_ms / len(seq) * 1000:6.1f} us {count(seq) / each_ms / 1e9 / ceiling:4.0%}"
        print(line, flush=True)
        return ms

    def library(self, rows, ceiling):
        """The same matrices through torch (cuBLASLt), without norms, additions or SwiGLU."""
        torch = self.torch
        x = {k: torch.randn(rows, k, device="cuda").bfloat16() for k in (HIDDEN, GATE_UP // 2)}
        out = {o: torch.empty(rows, o, device="cuda", dtype=torch.bfloat16) for o in (QKV, HIDDEN, GATE_UP, VOCAB)}
        order = [self.matrices[n][i] for i in range(LAYERS) for n in SHAPES] + [self.head]

        def timed(matrices):
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            with torch.cuda.graph(graph, stream=stream):
                for m in matrices:
                    torch.mm(x[m.k], m.w.T, out=out[m.out])
            return median_ms(torch, graph.replay)

        for m in order[:4] + order[-1:]:
            torch.mm(x[m.k], m.w.T, out=out[m.out])
        torch.cuda.synchronize()
        ms = timed(order)
        bytes_read = sum(m.out * m.k for m in order) * 2
        line = f"bf16 rows={rows:3d} cuBLAS               chain {ms:6.3f} ms {bytes_read / ms / 1e9 / ceiling:5.1%}"
        for name in SHAPES:
            line += f" | {name} {timed(self.matrices[name]) / LAYERS * 1000:6.1f} us"
        print(line, flush=True)


def time_all(directory):
    import torch

    torch.zeros(1, device="cuda")
    ceiling = read_ceiling(torch)
    print(f"read ceiling {ceiling:.3f} TB/s", flush=True)
    for weight in ("bf16", "fp8"):
        bench = Bench(torch, directory, weight)
        for rows in (1, 8, 16, 32, 64):
            bench.run(rows, ceiling)
            for _, _, defines in (m for m in MORE if m[:2] == (weight, max(rows, 8))):
                bench.run(rows, ceiling, ", ".join(f"{k}={v}" for k, v in defines.items()), **defines)
        if weight == "bf16":
            for rows in (1, 8, 32, 64):
                bench.library(rows, ceiling)
        del bench
        torch.cuda.empty_cache()


def main():
    what, directory = sys.argv[1], sys.argv[2]
    if what == "compile":
        variants = [dict(WEIGHT=w, N_TILE=n) for w in WEIGHTS.values() for n in ROWS_TILES]
        variants += [dict(WEIGHT=WEIGHTS[w], N_TILE=n, **d) for w, n, d in MORE]
        compile_all(directory, variants + [dict(WEIGHT=w, N_TILE=n, PORTABLE=1) for w in WEIGHTS.values() for n in (8, 32, 64)])
    elif what == "check":
        sys.exit(1 if check_all(directory, "quick" in sys.argv) else 0)
    else:
        time_all(directory)


if __name__ == "__main__":
    main()

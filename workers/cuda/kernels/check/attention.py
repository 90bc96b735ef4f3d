"""Attention kernels against an f64 reference, then timed.

    attention.py build DIR     compile every variant into DIR (no GPU needed)
    attention.py check DIR     correctness, random inputs, arena and outputs poisoned with NaN; decode replayed: the same bits every time
    attention.py time DIR      graph replays over 32 layers (more than L2 holds), share of the floor
"""

import functools
import glob
import hashlib
import math
import multiprocessing
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import nvrtc

ARCH = os.environ.get("BATON_ARCH", "sm_90a")
READ_BYTES_S = 4.4e12
REPLAYS = 1000

DECODE = [(128, 4, 32), (128, 4, 16), (128, 4, 64), (128, 1, 32), (128, 7, 32), (128, 8, 32), (128, 16, 32)]
DECODE += [(64, 3, 32), (64, 8, 16), (80, 1, 32), (96, 4, 32), (256, 2, 32), (256, 8, 64)]
PREFILL = [(128, 4, 32), (128, 4, 16), (128, 4, 64), (128, 7, 32), (128, 8, 32), (64, 3, 32), (64, 1, 16)]
PREFILL += [(96, 4, 32), (192, 2, 32), (256, 8, 64)]
KERNELS = {"attention_decode": DECODE, "attention_prefill": PREFILL, "attention_prefill_sm90": PREFILL}
if os.environ.get("ONLY"):
    KERNELS = {k: v for k, v in KERNELS.items() if k in os.environ["ONLY"].split(",")}


@functools.cache
def sources():
    """A hash of all kernel sources: what was compiled from others is not taken for theirs."""
    files = sorted(glob.glob(os.path.join(nvrtc.KERNELS, "*.cu*")) + glob.glob(os.path.join(nvrtc.KERNELS, "check", "*.cu")))
    return hashlib.sha256(b"".join(open(f, "rb").read() for f in files)).hexdigest()[:12]


def cubin_path(folder, kernel, shape):
    return os.path.join(folder, "-".join([kernel, sources(), ARCH, *map(str, shape)]) + ".cubin")


def build(folder):
    """Every variant, a process for each processor."""
    os.makedirs(folder, exist_ok=True)
    jobs = [(folder, None, None)] + [(folder, kernel, shape) for kernel, shapes in KERNELS.items() for shape in shapes]
    with multiprocessing.get_context("spawn").Pool() as pool:
        for line in pool.imap(_build, jobs):
            print(line, flush=True)


def _build(job):
    folder, kernel, shape = job
    if kernel is None:
        cubin, _ = nvrtc.compile_cubin("check/stand_in.cu", ARCH)
        path, line = os.path.join(folder, f"stand_in-{ARCH}.cubin"), "stand_in"
    else:
        defines = dict(zip(("HEAD_DIM", "GROUP", "BLOCK_TOKENS"), shape))
        defines.update(d.split("=") for d in os.environ.get("EXTRA", "").split(",") if d)
        cubin, log = nvrtc.compile_cubin(kernel + ".cu", ARCH, defines)
        note = [x.strip() for x in log.splitlines() if "Used" in x or "spill" in x or "otential" in x]
        path, line = cubin_path(folder, kernel, shape), " ".join([kernel, *map(str, shape), *note])
    with open(path, "wb") as f:
        f.write(cubin)
    return line


def load(folder, kernel, shape):
    import driver
    import torch

    torch.cuda.init()
    torch.zeros(1, device="cuda")  # makes the primary context current

    with open(cubin_path(folder, kernel, shape), "rb") as f:
        return driver.Kernel(f.read(), kernel)


class Case:
    """Sequences of given lengths and rows in an arena of NaN, with only their own tokens written. `beyond`: how many more a
    batch has room for, which nobody may look at."""

    def __init__(self, shape, kv_heads, layers, lengths, rows, seed=0, fill=True, beyond=0):
        import driver
        import torch

        self.torch = torch
        self.D, self.G, self.T = shape
        self.H, self.L, self.lengths, self.rows = kv_heads, layers, lengths, rows
        rng = random.Random(seed)
        torch.manual_seed(seed)
        needed = [-(-n // self.T) for n in lengths]
        self.blocks = sum(needed) + 3
        order = list(range(self.blocks))
        rng.shuffle(order)
        dims = (self.blocks, kv_heads, layers, 2, self.T, self.D)
        if fill:
            self.arena = torch.empty(dims, dtype=torch.bfloat16, device="cuda")
            flat = self.arena.view(-1)
            for i in range(0, flat.numel(), 1 << 28):
                flat[i : i + (1 << 28)].normal_()
        else:
            self.arena = torch.full(dims, float("nan"), dtype=torch.bfloat16, device="cuda")
        tables, offsets = [], []
        for n, blocks in zip(lengths, needed):
            offsets.append(len(tables))
            own = [order.pop() for _ in range(blocks)]
            tables += own
            if not fill:
                for i, b in enumerate(own):
                    used = min(self.T, n - i * self.T)
                    self.arena[b, :, :, :, :used].normal_()
        self.scale = 1 / math.sqrt(self.D)
        i32 = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")
        firsts, at = [], 0
        for r in rows:
            firsts.append(at)
            at += r
        self.R = at
        self.firsts = firsts
        self.table_list, self.offset_list = tables, offsets
        self.tables, self.seq_table, self.seq_kv_len = i32(tables), i32(offsets + [1 << 28] * beyond), i32(lengths + [1 << 24] * beyond)
        self.seq_first_row, self.seq_rows = i32(firsts), i32(rows)
        self.header = i32([self.R, len(lengths), 0, 0, 0, 0, 0, 0])
        self.q = (torch.randn(self.R, kv_heads * self.G, self.D, device="cuda") * 2).bfloat16()
        # What decode makes its queries and the new keys and values of; every other case has norms, every third a bias.
        all_heads = kv_heads * (self.G + 2)
        self.qkv = (torch.randn(self.R, all_heads, self.D, device="cuda") * 2).bfloat16()
        small = lambda *dims: (torch.randn(*dims, device="cuda") * 0.3 + 1).bfloat16()
        self.bias = small(all_heads, self.D) if seed % 3 == 1 else None
        self.norms = (small(self.D), small(self.D)) if seed % 2 else (None, None)
        self.eps = 1e-5
        angle = torch.rand(self.R, self.D // 2, device="cuda") * 2 * math.pi
        self.turns = torch.stack((angle.cos(), angle.sin()), -1).contiguous()
        self.map = driver.TensorMap(
            self.arena.data_ptr(),
            (self.D, self.blocks * kv_heads * layers * 2 * self.T),
            (self.D * 2,),
            (64, min(self.T, 32)),
        )
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.out_all = torch.full((self.R + beyond, *self.q.shape[1:]), float("nan"), dtype=torch.bfloat16, device="cuda")
        self.out = self.out_all[: self.R]

    def stream(self):
        return self.torch.cuda.current_stream().cuda_stream

    def made(self):
        """Queries, and keys and values of the new tokens, of decode."""
        x = self.qkv.double() + (0 if self.bias is None else self.bias.double())
        groups = x.split((self.H * self.G, self.H, self.H), 1)
        cosine, sine = self.turns.double().unbind(-1)

        def turned(x, norm):
            if norm is not None:
                x = x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * norm.double()
            low, high = x.split(self.D // 2, -1)
            c, s = cosine[:, None], sine[:, None]
            return self.torch.cat((low * c - high * s, high * c + low * s), -1).bfloat16()

        return turned(groups[0], self.norms[0]), turned(groups[1], self.norms[1]), groups[2].bfloat16()

    def new_rows(self, arena, layer):
        """Where the new tokens' keys and values lie, [sequence] of [head][K, V][head_dim]."""
        for n, offset in zip(self.lengths, self.offset_list):
            block = self.table_list[offset + (n - 1) // self.T]
            yield arena[block, :, layer, :, (n - 1) % self.T]

    def reference(self, layer, window, q=None):
        torch = self.torch
        q_all = self.q if q is None else q
        out = torch.empty(self.R, self.H, self.G, self.D, dtype=torch.float64, device="cuda")
        for n, r, first, offset in zip(self.lengths, self.rows, self.firsts, self.offset_list):
            ids = torch.tensor(self.table_list[offset : offset + -(-n // self.T)], device="cuda")
            kv = self.arena[ids][:, :, layer].permute(2, 1, 0, 3, 4).reshape(2, self.H, -1, self.D)[:, :, :n].double()
            q = q_all[first : first + r].view(r, self.H, self.G, self.D).double()
            s = torch.einsum("rhgd,hkd->rhgk", q, kv[0]) * self.scale
            p = torch.arange(n - r, n, device="cuda")[:, None]
            k = torch.arange(n, device="cuda")[None]
            seen = (k <= p) & ((k > p - window) if window else True)
            s = s.masked_fill(~seen[:, None, None], float("-inf"))
            out[first : first + r] = torch.einsum("rhgk,hkd->rhgd", s.softmax(-1), kv[1])
        return out.view(self.R, self.H * self.G, self.D)

    def decode(self, kernel, layer, window=0, pdl=False):
        if not hasattr(self, "partial"):
            size = 2 * self.sms * self.G * (self.D + 2)
            self.partial = self.torch.full((size,), float("nan"), device="cuda")
            self.counters = self.torch.zeros(1024 * self.H, dtype=self.torch.int32, device="cuda")
        arguments = [self.map, self.qkv, self.bias, *self.norms, self.turns, self.out, self.arena, self.header]
        arguments += [self.seq_kv_len, self.seq_table, self.tables]
        arguments += [self.partial, self.counters, 1, len(self.seq_kv_len), layer, self.L, self.H, self.scale, window, self.eps]
        kernel.launch(self.stream(), self.sms, arguments, pdl)

    def prefill(self, kernel, layer, window=0, pdl=False):
        _, _, unit, persistent = kernel.launch_values
        if getattr(self, "unit", None) != unit:
            self.unit = unit
            work = []
            for s, (n, r) in enumerate(zip(self.lengths, self.rows)):
                for first in range(0, r, unit):
                    work.append((n - r + min(first + unit, r), s, first))
            work.sort(key=lambda w: -w[0])
            self.work = self.torch.tensor([w[1:] for w in work], dtype=self.torch.int32, device="cuda")
            self.work_count = len(work)
        items = self.work_count * self.H
        if not hasattr(self, "query_map"):
            import driver

            heads = self.H * self.G
            self.query_map = driver.TensorMap(
                self.q.data_ptr(),
                (self.D, heads, self.R),
                (self.D * 2, heads * self.D * 2),
                (64, self.G, 128 // self.G),
            )
        arguments = [self.map, self.query_map, self.q, self.out, self.arena, self.work, self.seq_first_row, self.seq_rows, self.seq_kv_len]
        arguments += [self.seq_table, self.tables, self.work_count, layer, self.L, self.H, self.scale, window]
        kernel.launch(self.stream(), min(self.sms, items) if persistent else items, arguments, pdl)

    def run(self, name, kernel, layer, window=0, pdl=False):
        (self.decode if name == "attention_decode" else self.prefill)(kernel, layer, window, pdl)


def verify(name, kernel, case, layer, window):
    torch = case.torch
    q = before = None
    if name == "attention_decode":
        q, key, value = case.made()
        for row in case.new_rows(case.arena, layer):
            row.fill_(float("nan"))
        before = case.arena.clone()
    case.out.fill_(float("nan"))
    case.run(name, kernel, layer, window)
    torch.cuda.synchronize()
    first = case.out.clone()
    if not case.out_all[case.R :].isnan().all():
        return 9.0, 9.0, "WRONG rows beyond"
    if before is not None:
        # New keys and values are right to a rounding; nothing else has changed.
        worst = 0
        for s, row in enumerate(case.new_rows(case.arena, layer)):
            for c, new in enumerate((key, value)):
                error = (row[:, c].double() - new[s].double()).abs() / new[s].double().abs().clamp(min=0.05)
                worst = max(worst, torch.nan_to_num(error, nan=9.0).max().item())
        for now, then in zip(case.new_rows(case.arena, layer), case.new_rows(before, layer)):
            then.copy_(now)
        if not worst < 1e-2 or not torch.equal(case.arena.view(torch.int16), before.view(torch.int16)):
            return worst, worst, "WRONG arena"
    reference = case.reference(layer, window, q)
    error = (first.double() - reference).norm(dim=-1) / reference.norm(dim=-1)
    worst, mean = error.max().item(), error.mean().item()
    for _ in range(3):
        case.out.fill_(float("nan"))
        if before is not None:
            for row in case.new_rows(case.arena, layer):
                row.fill_(float("nan"))
        case.run(name, kernel, layer, window)
        torch.cuda.synchronize()
        if not torch.equal(case.out.view(torch.int16), first.view(torch.int16)):
            return worst, mean, "NOT the same bits"
    if not worst < 1.5e-2 or not mean < 5e-3:
        bad = (~(error < 1.5e-2)).nonzero()
        return worst, mean, f"WRONG at {len(bad)} of {error.numel()}, first (row, head) {bad[:4].tolist()}"
    return worst, mean, "ok"


def decode_cases():
    """(lengths, KV heads, sequences beyond, windows)."""
    some = lambda seed, count, low, high: [random.Random(seed).randrange(low, high) for _ in range(count)]
    both = (0, 50)
    yield from (([1], 3, 0, both), ([31, 32, 33], 2, 2, both), ([700], 3, 0, both), ([1, 2, 64, 1000, 5, 333], 2, 0, both))
    yield some(7, 150, 1, 300), 3, 3, both
    yield [5000, 3], 2, 0, both
    # Heads for most CTAs, and not more.
    yield some(8, 40, 1, 400), 3, 0, both
    yield some(9, 43, 300, 600), 2, 1, both
    # More heads than CTAs: alike, ragged, hardly more than one or two each; more than a CTA's rounds.
    yield [200] * 64, 8, 8, (0,)
    yield some(10, 48, 172, 429), 8, 0, both
    yield some(11, 33, 100, 700), 4, 7, (0,)
    yield some(12, 67, 1, 200), 4, 0, (50,)
    yield [1] * 200, 4, 0, (0,)
    yield [20] * 256, 17, 0, (0,)
    # In equal pieces all the same: one much longer than the others; more than are put in order.
    yield [100] * 20 + [6000] + [90] * 20, 8, 3, both
    yield some(13, 300, 1, 100), 2, 20, (0,)


def replay(folder):
    """Decode behind a kernel that leaves memory idle, four layers in a graph, again and again: what is read of a stage that has been
    given back too early is seldom wrong. Once of four layers, once of one, whose KV may stay in L2."""
    import torch

    shape, L = (128, 4, 32), 4
    kernel, none, failed = load(folder, "attention_decode", shape), stand_in(folder), 0
    for batch, length in [(8, 512), (64, 512), (1, 8192)]:
        case = Case(shape, 8, L, running(batch, length), [1] * batch)
        for layers in [list(range(L)), [0] * L]:
            outs = torch.full((L, *case.out.shape), float("nan"), dtype=torch.bfloat16, device="cuda")

            def step():
                for out, layer in zip(outs, layers):
                    none.launch(case.stream(), case.sms, [case.header, 5000], True, 128, 0)
                    case.out = out
                    case.decode(kernel, layer, pdl=True)

            graph = captured(torch, step)
            first, other = outs.clone(), torch.zeros((), dtype=torch.int32, device="cuda")
            for _ in range(REPLAYS):
                outs.fill_(float("nan"))
                graph.replay()
                other += (outs.view(torch.int16) != first.view(torch.int16)).any()
            others, finite = other.item(), first.isfinite().all().item()
            verdict = "ok" if others == 0 and finite else f"{others} NOT the same bits" if finite else "WRONG: not finite"
            failed += verdict != "ok"
            print(f"attention_decode {batch}x{length}, layers {layers}, {REPLAYS} replays: {verdict}", flush=True)
        del case
    return failed


def check(folder):
    failed = replay(folder) if "attention_decode" in KERNELS else 0
    for name, shapes in KERNELS.items():
        for shape in shapes:
            kernel = load(folder, name, shape)
            if name == "attention_decode":
                cases = [(n, [1] * len(n), *rest) for n, *rest in decode_cases()]
            else:
                cases = [([1], [1]), ([32], [32]), ([200], [200]), ([700, 33, 128], [300, 1, 128]), ([129, 64, 1000, 77], [1, 64, 990, 13])]
                cases = [(*c, 2 if i % 2 else 3, 0, (0, 50)) for i, c in enumerate(cases)]
            for i, (lengths, rows, heads, beyond, windows) in enumerate(cases):
                for window in windows:
                    case = Case(shape, heads, 2, lengths, rows, seed=i, fill=False, beyond=beyond)
                    worst, mean, verdict = verify(name, kernel, case, i % 2, window)
                    if verdict != "ok":
                        failed += 1
                    if verdict != "ok" or i == 3:
                        print(f"{name} {shape} lengths {str(lengths)[:40]} window {window}: worst {worst:.2e} mean {mean:.2e} {verdict}", flush=True)
    print("check:", f"{failed} FAILED" if failed else "all ok", flush=True)
    return failed


def stand_in(folder):
    """A kernel of no work, in the place of those before attention in a step: what PDL can hide shows only with one."""
    import driver

    path = os.path.join(folder, f"stand_in-{ARCH}.cubin")
    with open(path, "rb") as f:
        return driver.Kernel(f.read(), "stand_in")


def captured(torch, run):
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def measure(case, run, launches):
    torch = case.torch
    graph = captured(torch, run)
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(7):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        graph.replay()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / launches)
    return sorted(times)[3]


def running(batch, length):
    """Lengths about the mean, as a running batch has them."""
    rng = random.Random(1)
    return [length if batch == 1 else rng.randrange(length - 128, length + 129) for _ in range(batch)]


DECODE_TIMES = [(1, 512), (1, 8192), (8, 512), (8, 1024), (8, 2048), (12, 512), (16, 512), (16, 1024), (16, 2048), (24, 512), (24, 2048), (32, 512)]
DECODE_TIMES += [(32, 2048), (40, 512), (40, 2048), (48, 512), (64, 512), (64, 2048), (96, 512), (128, 512), (128, 1024)]


def time_decode(folder):
    import torch

    H, L = 8, 32
    for shape in [(128, 4, 32), (128, 4, 64), (64, 8, 16)]:
        kernel, none = load(folder, "attention_decode", shape), stand_in(folder)
        for batch, length in DECODE_TIMES if shape == (128, 4, 32) else [(1, 512), (128, 512)]:
            lengths = running(batch, length)
            case = Case(shape, H, L, lengths, [1] * batch)
            floor = sum(lengths) * H * shape[0] * 4 / READ_BYTES_S * 1e6
            small = lambda: none.launch(case.stream(), case.sms, [case.header, 5000], True, 128, 0)
            alone = measure(case, lambda: [small() for l in range(L)], L)
            us = measure(case, lambda: [case.decode(kernel, l, pdl=True) for l in range(L)], L)
            cells = f"pdl {us:7.2f} us {floor / us:5.1%}"
            us = measure(case, lambda: [(small(), case.decode(kernel, l, pdl=True)) for l in range(L)], L) - alone
            cells += f"  after another kernel {us:7.2f} us {floor / us:5.1%}"
            print(f"decode D{shape[0]} G{shape[1]} T{shape[2]} {batch:4}x{length:<5} floor {floor:7.2f} us  {cells}", flush=True)
            del case
            torch.cuda.empty_cache()


def time_all(folder):
    import torch

    H = 8
    if "attention_decode" in KERNELS:
        time_decode(folder)
    for name in ("attention_prefill_sm90", "attention_prefill"):
        if name not in KERNELS:
            continue
        for shape in [(128, 4, 32), (64, 3, 32)]:
            kernel = load(folder, name, shape)
            for batch, length in [(1, 512), (1, 2048), (1, 8192), (16, 1024), (64, 512)]:
                if name == "attention_prefill" and (batch, length) not in [(1, 512), (1, 8192)]:
                    continue
                case = Case(shape, H, 4, [length] * batch, [length] * batch)
                flops = 4 * shape[0] * H * shape[1] * batch * length * (length + 1) / 2
                us = measure(case, lambda: [case.prefill(kernel, l) for l in range(4)], 4)
                print(f"{name} D{shape[0]} G{shape[1]} {batch:3}x{length:<5} {us:8.1f} us  {flops / us / 1e6:6.1f} TFLOP/s", flush=True)
                del case
                torch.cuda.empty_cache()
        if name == "attention_prefill_sm90":
            kernel = load(folder, name, (128, 4, 32))
            case = Case((128, 4, 32), H, 4, [2048] * 32, [16] * 32)
            us = measure(case, lambda: [case.prefill(kernel, l) for l in range(4)], 4)
            print(f"{name} 32 sequences, 16 rows each after 2032: {us:.1f} us, KV floor {32 * 2048 * 8 * 512 / READ_BYTES_S * 1e6:.1f}", flush=True)


if __name__ == "__main__":
    mode, folder = sys.argv[1:3]
    if mode == "build":
        build(folder)
    elif mode == "check":
        sys.exit(1 if check(folder) else 0)
    else:
        time_all(folder)

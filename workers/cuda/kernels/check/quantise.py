"""Quantise kernels (quantise.cu, rms_norm.cu, swiglu.cu) against f64, outputs poisoned, and their times.

python3 quantise.py        on a machine with a GPU, torch and NVRTC
"""

import ctypes

import torch

import driver
import nvrtc

ORDER = torch.tensor([i // 2 + 8 * (i % 2) for i in range(16)])  # place -> number, within each 16
ARCH = "sm_%d%d" % torch.cuda.get_device_capability() + ("a" if torch.cuda.get_device_capability() == (9, 0) else "")
STREAM = 0


def kernel(file, name):
    return driver.Kernel(nvrtc.compile_cubin(file, ARCH, verbose=False)[0], name)


def natural(codes):
    """[..][n] e4m3 as stored -> f64 in natural order."""
    rows, n = codes.shape
    out = torch.empty(rows, n // 16, 16, dtype=torch.float64)
    out[:, :, ORDER] = codes.view(torch.float8_e4m3fn).float().double().view(rows, n // 16, 16).cpu()
    return out.view(rows, n)


def stored(codes):
    rows, n = codes.shape
    return codes.view(rows, n // 16, 16)[:, :, ORDER.to(codes.device)].contiguous().view(rows, n)


def half_step(x):
    """Half the distance of e4m3 numbers at |x|."""
    return 2.0 ** (x.abs().clamp(min=2.0**-6).log2().floor() - 4)


def compare(label, codes, scale, truth):
    scale = scale.double().cpu()
    rows, n = truth.shape
    if scale.dim() == 2:  # [groups][rows]: every 128 is a row of its own
        pad = -n % 128
        truth = torch.nn.functional.pad(truth, (0, pad)).view(-1, 128)
        expected, scale = truth.abs().amax(1) / 448, scale.T.reshape(-1)
        found = torch.nn.functional.pad(natural(codes), (0, pad)).view(-1, 128)
    else:
        expected, found = truth.abs().amax(1) / 448, natural(codes)
    assert torch.isfinite(scale).all(), label
    assert ((scale - expected).abs() <= 1e-5 * expected + 1e-37).all(), (label, (scale / expected - 1).abs().max())
    assert torch.isfinite(found).all(), label
    safe = scale.clamp(min=1e-37)[:, None]
    off = (found - truth / safe).abs()
    bound = half_step(truth / safe) * (1 + 1e-4) + 1e-4
    assert (off <= bound).all(), (label, (off / bound).max())
    print(f"{label}: right; error of a row {((found * safe - truth).norm() / truth.norm()).item():.4f}")


def timed(f):
    for _ in range(3):
        f()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    marks[0].record()
    for mark in marks[1:]:
        f()
        mark.record()
    torch.cuda.synchronize()
    return sorted(marks[i].elapsed_time(marks[i + 1]) for i in range(10))[5]


def main():
    print("seed", torch.seed())
    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)
    global STREAM
    STREAM = stream.cuda_stream
    poison = lambda *shape: torch.full(shape, 0x7F, dtype=torch.uint8, device="cuda")
    nan = lambda *shape: torch.full(shape, float("nan"), device="cuda")
    quantise, dequantise = kernel("quantise.cu", "quantise"), kernel("quantise.cu", "dequantise")
    norm, swiglu = kernel("rms_norm.cu", "rms_norm_e4m3"), kernel("swiglu.cu", "swiglu_e4m3")

    null = torch.empty(0, device="cuda")
    threads = lambda n, kept: min(512, -(-(-(-n // kept)) // 32) * 32)
    for rows, n in [(1, 16), (3, 80), (65, 112), (7, 4096), (5, 14336), (2, 8208), (2, 20000)]:
        for groups in (0, 1):
            scales = lambda: nan(-(-n // 128), rows) if groups else nan(rows)
            of = " by 128" if groups else ""
            x = (torch.randn(rows, n, device="cuda") * torch.rand(rows, 1, device="cuda") * 20).bfloat16()
            if rows > 2:
                x[1] = 0
            y, scale = poison(rows, n), scales()
            quantise.launch(STREAM, rows, [y, scale, x, n, groups], threads=threads(n, 16), shared=0)
            torch.cuda.synchronize()
            compare(f"quantise {rows}x{n}{of}", y, scale, x.double().cpu())

            r = torch.randn(rows + 2, n, device="cuda") * 3
            gamma = (1 + 0.3 * torch.randn(n, device="cuda")).bfloat16()
            chosen = torch.randperm(rows + 2, device="cuda")[:rows].int()
            for pick in (null, chosen):
                y, scale = poison(rows, n), scales()
                arguments = [y, scale, r, gamma, pick, n, 1e-5, groups]
                norm.launch(STREAM, rows, arguments, threads=threads(n, 16), shared=-(-n // 128) * 4)
                torch.cuda.synchronize()
                residual = (r[:rows] if pick is null else r[chosen.long()]).double().cpu()
                truth = residual / (residual.square().mean(1, keepdim=True) + 1e-5).sqrt() * gamma.double().cpu()
                compare(f"rms_norm {rows}x{n}{of}{'' if pick is null else ', chosen'}", y, scale, truth)

            gate, up = ((torch.randn(rows, n, device="cuda") * 4).bfloat16() for _ in range(2))
            gate[0, :8] = -200.0  # the exponential overflows
            both = torch.stack([gate.view(rows, n // 8, 8), up.view(rows, n // 8, 8)], 2).contiguous()
            y, scale = poison(rows, n), scales()
            swiglu.launch(STREAM, rows, [y, scale, both, n, groups], threads=threads(n, 32), shared=0)
            torch.cuda.synchronize()
            g = gate.double().cpu()
            compare(f"swiglu {rows}x{n}{of}", y, scale, g / (1 + (-g).exp()) * up.double().cpu())

        for kind in (0, 1, 2):
            out = 16 * ((rows + 300) // 16)
            codes = torch.randint(0, 256, (out, n), dtype=torch.uint8, device="cuda")
            codes[(codes & 0x7F) == 0x7F] = 3
            values = codes.view(torch.float8_e4m3fn).float().double().cpu()
            down = lambda k: -(-k // 128)
            if kind == 0:
                s = torch.rand(out, device="cuda") + 0.1
                full = s.double().cpu()[:, None]
            else:
                tall = down(out) if kind == 1 else 2 * down(out // 2)
                s = torch.rand(tall, down(n), device="cuda") + 0.1
                row = torch.arange(out)
                if kind == 1:
                    block = row // 128
                else:
                    block = (row // 8 % 2) * down(out // 2) + (row // 16 * 8 + row % 8) // 128
                full = s.double().cpu()[block][:, torch.arange(n) // 128]
            truth = (values * full).float().bfloat16().double()
            y = torch.full((out, n), float("nan"), dtype=torch.bfloat16, device="cuda")
            plane(dequantise, (out, -(-(n // 16) // 128)), 128, [y, stored(codes), s, n, out, kind])
            torch.cuda.synchronize()
            off = (y.double().cpu() - truth).abs()
            assert (off <= truth.abs() * 2**-8).all(), (kind, rows, n)
        print(f"dequantise ...x{n}: right")

    rows = 8192
    x = torch.randn(rows, 4096, device="cuda")
    xb, gamma = x.bfloat16(), torch.ones(4096, device="cuda").bfloat16()
    gu = torch.randn(rows, 2 * 14336, device="cuda").bfloat16()
    y, scale = poison(rows, 14336), nan(rows * 112)
    w = torch.randint(0, 100, (28672, 4096), dtype=torch.uint8, device="cuda")
    wide = torch.empty(28672, 4096, dtype=torch.bfloat16, device="cuda")
    times = [("dequantise 28672x4096", 28672 * 4096 * 3, lambda: plane(dequantise, (28672, 2), 128, [wide, w, x, 4096, 28672, 0]))]
    for g, of in ((0, ""), (1, " by 128")):
        times += [
            (f"quantise 8192x4096{of}", rows * 4096 * 3, lambda g=g: quantise.launch(STREAM, rows, [y, scale, xb, 4096, g], threads=256, shared=0)),
            (f"rms_norm 8192x4096{of}", rows * 4096 * 5, lambda g=g: norm.launch(STREAM, rows, [y, scale, x, gamma, null, 4096, 1e-5, g], threads=256, shared=128)),
            (f"swiglu 8192x14336{of}", rows * 14336 * 5, lambda g=g: swiglu.launch(STREAM, rows, [y, scale, gu, 14336, g], threads=448, shared=0)),
        ]
    for label, bytes_, f in times:
        ms = timed(f)
        print(f"{label}: {ms * 1e3:.1f} us, {bytes_ / ms / 1e9:.2f} TB/s")


def plane(k, grid, threads, arguments):
    kept = [ctypes.c_int(a) if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in arguments]
    pointers = (ctypes.c_void_p * len(kept))(*[ctypes.addressof(a) for a in kept])
    driver.call("cuLaunchKernel", k.function, grid[0], grid[1], 1, threads, 1, 1, 0, ctypes.c_void_p(STREAM), pointers, None)


if __name__ == "__main__":
    main()

"""NVRTC and the CUDA driver through ctypes: enough to compile a kernel on a machine without a GPU, and to run it."""

import ctypes
import ctypes.util
import glob
import os
import site
import sys

KERNELS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _wheel_dirs():
    roots = site.getsitepackages() + [p for p in sys.path if p.endswith("-packages")]
    for root in dict.fromkeys(roots):
        for pattern in ("nvidia/cu13", "nvidia/cuda_nvrtc", "nvidia/cuda_runtime"):
            yield from glob.glob(os.path.join(root, pattern))


def _library():
    for directory in _wheel_dirs():
        for path in sorted(glob.glob(os.path.join(directory, "lib", "libnvrtc.so.*"))):
            # NVRTC opens its builtins by name alone: have them loaded already.
            for builtins in glob.glob(os.path.join(directory, "lib", "libnvrtc-builtins.so.*")):
                if ".alt." not in builtins:
                    ctypes.CDLL(builtins, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(path)
    return ctypes.CDLL("libnvrtc.so.13")


def _includes():
    found = [os.path.join(d, "include") for d in _wheel_dirs()]
    found += ["/usr/local/cuda/include"]
    return [d for d in found if os.path.exists(os.path.join(d, "cuda_bf16.h"))]


_nvrtc = None


def compile_cubin(name, arch, defines=None, verbose=True):
    """Compile kernels/NAME for an architecture such as 'sm_90a'. Returns (cubin, log)."""
    global _nvrtc
    _nvrtc = _nvrtc or _library()
    with open(os.path.join(KERNELS, name), "rb") as f:
        source = f.read()
    options = [f"-arch={arch}", "-std=c++17", "-default-device", f"-I{KERNELS}"]
    options += [f"-I{d}" for d in _includes()]
    options += [f"-D{k}={v}" for k, v in (defines or {}).items()]
    if verbose:
        options += ["--ptxas-options=-v"]
    program = ctypes.c_void_p()

    def check(code, what):
        if code:
            raise RuntimeError(f"NVRTC: {what} failed with {code}\n{log(program)}")

    def log(p):
        size = ctypes.c_size_t()
        if _nvrtc.nvrtcGetProgramLogSize(p, ctypes.byref(size)) or size.value < 2:
            return ""
        text = ctypes.create_string_buffer(size.value)
        _nvrtc.nvrtcGetProgramLog(p, text)
        return text.value.decode()

    check(_nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None), "create")
    array = (ctypes.c_char_p * len(options))(*[o.encode() for o in options])
    check(_nvrtc.nvrtcCompileProgram(program, len(options), array), f"compiling {name} for {arch}")
    size = ctypes.c_size_t()
    check(_nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "cubin size")
    cubin = ctypes.create_string_buffer(size.value)
    check(_nvrtc.nvrtcGetCUBIN(program, cubin), "cubin")
    text = log(program)
    _nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, text


if __name__ == "__main__":
    # nvrtc.py FILE ARCH [NAME=VALUE...] [-o CUBIN]: compile and print the compiler's report.
    arguments = sys.argv[1:]
    target = None
    if "-o" in arguments:
        at = arguments.index("-o")
        target = arguments[at + 1]
        del arguments[at : at + 2]
    cubin, report = compile_cubin(arguments[0], arguments[1], dict(a.split("=", 1) for a in arguments[2:]))
    print(report.strip())
    if target:
        with open(target, "wb") as f:
            f.write(cubin)

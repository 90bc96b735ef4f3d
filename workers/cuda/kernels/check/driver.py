"""The CUDA driver through ctypes: load a cubin, launch it (also with programmatic dependent launch), make a tensor map."""

import ctypes

_cuda = None


def cuda():
    global _cuda
    if _cuda is None:
        _cuda = ctypes.CDLL("libcuda.so.1")
    return _cuda


def call(name, *arguments):
    code = getattr(cuda(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        cuda().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name}: {text.value and text.value.decode()} ({code})")


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint) for n in ("gx", "gy", "gz", "bx", "by", "bz", "shared")] + [
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class TensorMap:
    """A CUtensorMap, 64-byte aligned."""

    def __init__(self, address=None, dims=(), strides=(), box=()):
        self.buffer = ctypes.create_string_buffer(128 + 64)
        self.address = (ctypes.addressof(self.buffer) + 63) // 64 * 64
        if address is None:
            return
        rank = len(dims)
        call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(self.address),
            9,  # BFLOAT16
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*dims),
            (ctypes.c_uint64 * (rank - 1))(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*([1] * rank)),
            0,  # INTERLEAVE_NONE
            3,  # SWIZZLE_128B
            3,  # L2_PROMOTION_L2_256B
            0,  # OOB_FILL_NONE: zeros
        )


class Kernel:
    def __init__(self, cubin, name):
        self.module = ctypes.c_void_p()
        self.function = ctypes.c_void_p()
        self.cubin = cubin
        call("cuModuleLoadData", ctypes.byref(self.module), cubin)
        call("cuModuleGetFunction", ctypes.byref(self.function), self.module, name.encode())
        self.launch_values = self._symbol(name + "_launch")
        if self.launch_values:
            # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", self.function, 8, self.launch_values[1])

    def _symbol(self, name):
        pointer, size = ctypes.c_void_p(), ctypes.c_size_t()
        if cuda().cuModuleGetGlobal_v2(ctypes.byref(pointer), ctypes.byref(size), self.module, name.encode()):
            return None
        values = (ctypes.c_int * (size.value // 4))()
        call("cuMemcpyDtoH_v2", values, pointer, size)
        return list(values)

    def launch(self, stream, grid, arguments, pdl=False, threads=None, shared=None):
        """Arguments: torch tensors (their address), None (null), int, float, TensorMap."""
        threads = threads or self.launch_values[0]
        shared = self.launch_values[1] if shared is None else shared
        kept = []
        pointers = (ctypes.c_void_p * len(arguments))()
        for i, a in enumerate(arguments):
            if isinstance(a, TensorMap):
                pointers[i] = a.address
                continue
            if a is None:
                value = ctypes.c_void_p(0)
            elif isinstance(a, float):
                value = ctypes.c_float(a)
            elif isinstance(a, int):
                value = ctypes.c_int(a)
            else:
                value = ctypes.c_void_p(a.data_ptr())
            kept.append(value)
            pointers[i] = ctypes.addressof(value)
        attribute = _Attribute(6, 0)  # PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value[0] = 1
        config = _Config(grid, 1, 1, threads, 1, 1, shared, stream, ctypes.pointer(attribute), 1 if pdl else 0)
        call("cuLaunchKernelEx", ctypes.byref(config), self.function, pointers, None)

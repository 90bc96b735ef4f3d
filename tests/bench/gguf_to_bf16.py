"""Writes a quantised GGUF again with BF16 matrices: what llama.cpp needs to run the weights Baton runs.

Usage: gguf_to_bf16.py IN.gguf OUT.gguf
"""

import sys

import gguf
import numpy
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

source = GGUFReader(sys.argv[1])
architecture = source.fields["general.architecture"].contents()
writer = GGUFWriter(sys.argv[2], architecture)

for name, field in source.fields.items():
    if name.startswith("GGUF.") or name == "general.architecture":
        continue
    kind = field.types[0]
    element = field.types[-1] if kind == GGUFValueType.ARRAY else None
    value = gguf.LlamaFileType.MOSTLY_BF16 if name == "general.file_type" else field.contents()
    writer.add_key_value(name, value, kind, sub_type=element)

for tensor in source.tensors:
    values = dequantize(tensor.data, tensor.tensor_type)
    if values.ndim == 1:
        writer.add_tensor(tensor.name, values.astype(numpy.float32))
        continue
    packed = gguf.quants.quantize(values.astype(numpy.float32), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor(tensor.name, packed, raw_dtype=gguf.GGMLQuantizationType.BF16)

writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

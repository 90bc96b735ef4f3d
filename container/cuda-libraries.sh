#!/usr/bin/env bash
# Lays out what a GPU needs beside its driver, from NVIDIA's Python wheels: NVRTC with its headers, cuBLASLt, UCX with CUDA.
# No toolkit, no static libraries, no NCCL (nothing of Baton loads it).
#
#   container/cuda-libraries.sh DIR        DIR is made; CUDA_HOME=DIR and BATON_UCX_LIB_DIR=DIR/libucx have Baton find it all
#
# Packages and their hashes are in container/cuda-wheels.txt; some 600 MB are fetched, once: pip keeps them in its cache.
set -euo pipefail
out=$(mkdir -p "${1:?usage: container/cuda-libraries.sh DIR}" && realpath "$1")
cd "$(dirname "$0")/.."
if [ "$(uname -m)" != x86_64 ]; then
  echo "cuda-libraries: these are wheels for x86_64, and this machine is $(uname -m)" >&2
  exit 1
fi
examples/venv.sh examples/requirements.txt

# Beside the result, so that moving is no copying.
wheels=$(mktemp -d "$out.wheels.XXXXXX")
trap 'rm -rf "$wheels"' EXIT
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes --no-compile \
  --target "$wheels" --requirement container/cuda-wheels.txt

mkdir -p "$out/lib64" "$out/libucx/lib/ucx" "$out/libucx_cu13.libs" "$out/licenses"
cuda=$wheels/nvidia/cu13
# By the names by which they are loaded: wheels have each library three times over, for want of links.
mv "$cuda"/lib/libnvrtc.so.13 "$cuda"/lib/libnvrtc-builtins.so.13.0 "$cuda"/lib/libcublasLt.so.13 "$out/lib64/"
rm -rf "$out/include"
mv "$cuda/include" "$out/"
mv "$wheels"/libucx/lib/libuc{m,s,t,p}.so.0 "$out/libucx/lib/"
mv "$wheels"/libucx/lib/ucx/lib{ucm_cuda,uct_cuda,uct_cma}.so.0 "$out/libucx/lib/ucx/"
# UCX's modules look for it there.
mv "$wheels"/libucx_cu13.libs/libcudart-*.so.* "$out/libucx_cu13.libs/"
for info in "$wheels"/*.dist-info; do
  name=$(basename "$info" .dist-info)
  mv "$info"/licenses/* "$out/licenses/$name.txt"
done
chmod -R a+rX "$out"

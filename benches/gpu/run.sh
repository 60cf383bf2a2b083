#!/bin/sh
# Holds the GPU of this machine to its CPU, then prints tokens per second of both, and of PyTorch if
# this Python has it. Exits with 0 if they agree, 1 if not, 3 if there is no GPU.
#
# usage: ./run.sh [--threads N] [--rehearse]
# PYTHON names another Python than python3; a rehearsal needs no GPU.
cd "$(dirname "$0")" || exit 2
python=${PYTHON:-python3}

# Where Python's packages have the libraries of CUDA that are no part of the driver.
libraries=$("$python" - 2>/dev/null <<'END'
import glob, site

folders = [f for s in site.getsitepackages() for f in glob.glob(f"{s}/nvidia/*/lib")]
print(":".join(folders))
END
)
# An empty part would be the folder of whoever runs this.
if [ -n "$libraries" ]; then
    export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries"
fi

work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
if "$python" -c 'import torch, safetensors' 2>/dev/null; then
    ./gpu_suite fixtures "$work" --torch "$python" torch_engine.py "$@"
else
    ./gpu_suite fixtures "$work" "$@"
fi

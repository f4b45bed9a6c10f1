"""A CUDA that computes nothing, so that ONNX Runtime's CUDA provider can be loaded without a GPU.

The provider decides which nodes it takes, and constructs its kernels, on the host. For that it needs the libraries
that it is linked with. This makes stand-ins for them: every function that the provider imports succeeds and does
nothing, but for those that hand out memory, handles or properties (of a card of compute capability 9.0). What a graph
computes so means nothing.

:func:`placements` loads a model so, in a process of its own, and says which provider got how many nodes of which
operator.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
LIBRARIES = ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcuda.so.1")

_PRELUDE = """
#include <stdlib.h>
#include <string.h>
#include <driver_types.h>
typedef unsigned long size;
static int give(void **p, size n) { if (posix_memalign(p, 256, n ? n : 1)) return 2; memset(*p, 0, n); return 0; }
"""
# Functions that cannot just succeed. A device pointer is host memory here.
_SPECIAL = {
    "cudaMalloc": "int cudaMalloc(void **p, size n) { return give(p, n); }",
    "cudaMallocFromPoolAsync": "int cudaMallocFromPoolAsync(void **p, size n) { return give(p, n); }",
    "cudaMallocHost": "int cudaMallocHost(void **p, size n) { return give(p, n); }",
    "cudaHostAlloc": "int cudaHostAlloc(void **p, size n) { return give(p, n); }",
    "cudaFree": "int cudaFree(void *p) { free(p); return 0; }",
    "cudaFreeHost": "int cudaFreeHost(void *p) { free(p); return 0; }",
    "cudaFreeAsync": "int cudaFreeAsync(void *p) { free(p); return 0; }",
    "cudaMemcpy": "int cudaMemcpy(void *d, void *s, size n) { memcpy(d, s, n); return 0; }",
    "cudaMemcpyAsync": "int cudaMemcpyAsync(void *d, void *s, size n) { memcpy(d, s, n); return 0; }",
    "cudaMemset": "int cudaMemset(void *d, int v, size n) { memset(d, v, n); return 0; }",
    "cudaMemsetAsync": "int cudaMemsetAsync(void *d, int v, size n) { memset(d, v, n); return 0; }",
    "cudaGetDevice": "int cudaGetDevice(int *d) { *d = 0; return 0; }",
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *d) { *d = 1; return 0; }",
    "cudaMemGetInfo": "int cudaMemGetInfo(size *a, size *b) { *a = *b = 1ul << 34; return 0; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }",
    "cudaStreamIsCapturing": "int cudaStreamIsCapturing(void *s, int *c) { *c = 0; return 0; }",
    "cudaDeviceGetAttribute": """int cudaDeviceGetAttribute(int *v, int a) {
        *v = a == cudaDevAttrComputeCapabilityMajor ? 9 : a == cudaDevAttrComputeCapabilityMinor ? 0
           : a == cudaDevAttrWarpSize ? 32 : 65536; return 0; }""",
    "cudnnGetVersion": "long cudnnGetVersion(void) { return 91000; }",
    "cudaGetErrorString": 'const char *cudaGetErrorString(int e) { return "stand-in"; }',
    "cudaGetErrorName": 'const char *cudaGetErrorName(int e) { return "stand-in"; }',
    "cudaPointerGetAttributes": """int cudaPointerGetAttributes(struct cudaPointerAttributes *a) {
        memset(a, 0, sizeof *a); a->type = cudaMemoryTypeDevice; return 0; }""",
    "cudaFuncGetAttributes": """int cudaFuncGetAttributes(struct cudaFuncAttributes *a) {
        memset(a, 0, sizeof *a); return 0; }""",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags":
        "int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n) { *n = 1; return 0; }",
    "cudaGetDeviceProperties": """int cudaGetDeviceProperties(struct cudaDeviceProp *p) {
        memset(p, 0, sizeof *p); strcpy(p->name, "stand-in"); p->major = 9; p->warpSize = 32; p->regsPerBlock = 65536;
        p->multiProcessorCount = 100; p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048;
        p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 200000; p->sharedMemPerMultiprocessor = 220000;
        p->totalGlobalMem = 1ul << 34; return 0; }""",
    **{
        name: f"int {name}(void **p) {{ return give(p, 256); }}"
        for name in ("cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaEventCreateWithFlags",
                     "cudaMemPoolCreate", "cublasCreate_v2", "cublasLtCreate")
    },
}  # fmt: skip


def provider() -> Path:
    """The released CUDA provider."""
    import onnxruntime

    return Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"


def missing() -> str | None:
    """Why the stand-ins cannot be made here; None where they can."""
    tools = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if tools:
        return f"{tools[0]} is absent"
    if not (HEADERS / "driver_types.h").is_file():
        return f"{HEADERS / 'driver_types.h'} is absent; CUDA_HOME says where CUDA's headers are"
    return None if provider().is_file() else f"{provider().name} is absent: it comes with onnxruntime-gpu"


def make(folder: Path) -> None:
    """Compile the stand-ins of :data:`LIBRARIES`, and of cuDNN, which the provider looks up by name."""
    imports = subprocess.run(["nm", "-D", "--undefined-only", provider()], check=True, capture_output=True, text=True)
    symbols = [line.split()[-1] for line in imports.stdout.splitlines()]
    for library in LIBRARIES:
        names = {name for name, _, version in (s.partition("@") for s in symbols) if version == library}
        loose = {s for s in symbols if library == "libcuda.so.1" and re.match(r"cu[A-Z]\w+$", s)}
        _compile(folder, library, names, loose)
    cudnn = set(re.findall(rb"\x00(cudnn[A-Z]\w+)(?=\x00)", provider().read_bytes()))
    _compile(folder, "libcudnn.so.9", set(), {name.decode() for name in cudnn})
    shutil.copy(folder / "libcudnn.so.9", folder / "libcudnn.so")


def _compile(folder: Path, library: str, versioned: Iterable[str], loose: Iterable[str]) -> None:
    names = sorted({*versioned, *loose})
    plain = "long {0}(void) {{ return 0; }}"
    handle = "int {0}(void **p) {{ return give(p, 256); }}"
    lines = [_SPECIAL.get(name, (handle if name.startswith("cudnnCreate") else plain).format(name)) for name in names]
    source, script = folder / "stand_in.c", folder / "stand_in.map"
    source.write_text(_PRELUDE + "\n".join(lines) + "\n")
    command = ["gcc", "-w", "-shared", "-fPIC", f"-I{HEADERS}", f"-Wl,-soname,{library}"]
    if versioned:
        script.write_text(f"{library} {{ {' '.join(f'{n};' for n in sorted(versioned))} }};\n")
        command.append(f"-Wl,--version-script={script}")
    subprocess.run([*command, "-o", folder / library, source], check=True)


def placements(model: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Provider to operator to number of nodes, branches and loops included, of a session in a process of its own."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-m", "tests.targets.cuda_stand_in", model, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main(model: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    session: Any = onnxruntime.InferenceSession(model, options, providers=providers)
    counts: dict[str, Counter[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        counts.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    sys.stdout.write(json.dumps(counts) + "\n")
    sys.stdout.flush()
    os._exit(0)  # what the provider does at exit with a device that is none is of no interest


if __name__ == "__main__":
    _main(sys.argv[1])

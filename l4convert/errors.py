"""The errors a user can cause or meet, one class a kind of failure.

Every one is shown as a single line (``message``) and an optional ``hint`` that says what to do; the class decides the
process's exit code (docs/DESIGN: 0 done, 1 internal, 2 usage, 3 bad input, 4 check failed, 5 backend missing).
"""

from __future__ import annotations

MAX_CHARACTERS = 1000
SUMMARY_CHARACTERS = 240


def one_line(text: str) -> str:
    """Text that may hold what an untrusted file says, as one printable line of at most :data:`MAX_CHARACTERS`.

    White space becomes single spaces, what cannot be printed its escape, and of a longer text the middle is left out.
    """
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    if len(line) <= MAX_CHARACTERS:
        return line
    gap = " ... "
    end = (MAX_CHARACTERS - len(gap)) // 4  # most of what a message is about comes first
    return line[: MAX_CHARACTERS - len(gap) - end] + gap + line[-end:]


def summary_of(error: BaseException) -> str:
    """What an exception of another library says, short enough to stand in a message; its class if it says nothing."""
    return one_line(str(error))[:SUMMARY_CHARACTERS] or type(error).__name__


class L4Error(Exception):
    """Base of all errors that are reported without a traceback.

    Args:
        message: One line: which file, which tensor, what is wrong; see :func:`one_line`.
        hint: One line: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = one_line(message)
        self.hint = None if hint is None else one_line(hint)
        super().__init__(self.message)


class UsageError(L4Error):
    """Options that contradict each other or name something that does not exist."""

    exit_code = 2


class InputError(L4Error):
    """A checkpoint, artifact, recipe, policy or text that cannot be used as it is."""

    exit_code = 3


class ClusterError(InputError):
    """Machines that were to help cannot be reached, are lost, or cannot see the same files."""


class RemoteError(InputError):
    """A server that holds a checkpoint cannot be reached, refuses, or does not answer as the hub's protocol says."""


class DeviceError(InputError):
    """A GPU or its library refused what it was given: an engine of another version, too much memory, a fault."""


class CheckFailed(L4Error):
    """A parity or integrity check that ran and did not hold."""

    exit_code = 4


class BackendMissing(L4Error):
    """An optional package is not installed; the message is the exact install command."""

    exit_code = 5


# Import name -> what to install, by names that any package index has. These are optional, so a missing one is the
# user's to solve, not a defect.
INSTALL = {
    "cmake": "pip install cmake",
    "compressed_tensors": "pip install compressed-tensors",
    "modelopt": "pip install nvidia-modelopt",
    "cuda": "pip install cuda-bindings",
    "huggingface_hub": "pip install huggingface_hub",
    "kernel_lens": "pip install kernel-lens",
    "llama_models": "pip install llama-models fairscale",
    "matplotlib": "pip install matplotlib",
    "onnxruntime": "pip install onnxruntime-gpu",
    "peft": "pip install peft",
    "ray": "pip install 'ray[client]'",
    "tensorrt": "pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
    "torch": "pip install torch transformers",
    "triton": "pip install triton==3.6.0",
    "transformers": "pip install torch transformers",
}


def backend_missing(module: str) -> BackendMissing:
    """The error for an optional import that failed; ``module`` is a key of :data:`INSTALL`."""
    return BackendMissing(f"{module} is not installed: {INSTALL[module]}")

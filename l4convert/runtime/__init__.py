"""Run an artifact: sessions with their key/value caches, sampling, the tokenizer and text generation."""

from l4convert.runtime.engine_session import EngineSession, EngineStream
from l4convert.runtime.generate import check_positions, eos_token_ids, generate, generate_text
from l4convert.runtime.manifest import ArtifactInfo, read_artifact
from l4convert.runtime.open import ON_CPU, RunWith
from l4convert.runtime.prefill import prefill, prefill_steps, step_limit
from l4convert.runtime.runner import ModelRunner, Runner, Stream
from l4convert.runtime.sampling import Sampler, SamplingOptions
from l4convert.runtime.session import OrtSession
from l4convert.runtime.stream import OrtStream
from l4convert.runtime.tokenizer import TextStream, TextTokenizer

__all__ = [
    "ON_CPU",
    "ArtifactInfo",
    "EngineSession",
    "EngineStream",
    "ModelRunner",
    "OrtSession",
    "OrtStream",
    "RunWith",
    "Runner",
    "Sampler",
    "SamplingOptions",
    "Stream",
    "TextStream",
    "TextTokenizer",
    "check_positions",
    "eos_token_ids",
    "generate",
    "generate_text",
    "prefill",
    "prefill_steps",
    "read_artifact",
    "step_limit",
]

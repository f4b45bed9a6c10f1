"""Engines by the real TensorRT-RTX builder, and every way in which a build can end, by a stub."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l4convert.emit import read_manifest, verify_artifact
from l4convert.emit.digest import file_digest
from l4convert.emit.engines import engine_entries
from l4convert.engine import BuildOptions, build_engines, plan_build
from l4convert.engine.backend import find_backend, load_module
from l4convert.engine.build import is_built
from l4convert.engine.plan_file import plan_file
from l4convert.errors import BackendMissing, InputError, L4Error, UsageError
from l4convert.pipeline import ConvertOptions, convert
from l4convert.plugins.library import native
from tests.engine.conftest import retarget

SMALL = {"max_context": 64, "prefill_tokens": 8}


def _options(out: Path, *targets: str, **changes: Any) -> BuildOptions:
    return BuildOptions(out, targets or ("l4",), **(SMALL | changes))


def _stub_options(out: Path, **changes: Any) -> BuildOptions:
    return _options(out, "h100", **changes)


def _plan(out: Path) -> dict[str, Any]:
    content = (out / "engines/h100/decoder.plan").read_text()
    found: dict[str, Any] = json.loads(content.removeprefix("half of it "))
    return found


def test_a_real_engine_is_built_recorded_and_built_only_once(artifact: Path) -> None:
    [engine] = build_engines(_options(artifact)).engines
    plan = artifact / "engines/l4/decoder.plan"
    assert file_digest(plan) == (engine.entry["bytes"], engine.entry["sha256"])
    assert verify_artifact(artifact).ok
    assert engine_entries(read_manifest(artifact)) == [engine.entry]
    expected = {
        "compute_capability": "8.9",
        "layers": [0, 2],
        "max_context": 64,
        "capacity": {"global": 64, "chunked": 8},
        "profiles": [{"name": "prefill", "tokens": [1, 8, 8]}, {"name": "decode", "tokens": [1, 1, 1]}],
        "flags": [],
        "source_sha256": file_digest(artifact / "model.onnx")[1],
    }
    assert {key: engine.entry[key] for key in expected} == expected
    shapes = {value["name"]: (value["dtype"], value["shape"]) for value in engine.entry["inputs"]}
    assert shapes["input_ids"] == ("int64", [-1, -1])
    assert shapes["past_key_values.0.key"] == ("bfloat16", [-1, 2, 8, 16])
    assert len(engine.entry["scratch_bytes"]) == 2
    assert engine.peak_memory > 50 << 20
    assert not list(plan.parent.glob(".*"))
    begun = plan.stat().st_mtime_ns
    [again] = build_engines(_options(artifact)).engines
    assert (again.skipped, again.entry, plan.stat().st_mtime_ns) == (True, engine.entry, begun)


def test_the_real_parser_refuses_in_one_line(artifact: Path) -> None:
    """The canonical node that TensorRT-RTX has no importer for."""
    import onnx

    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    model.graph.node[0].op_type = "Unheard"
    model.graph.node[0].name = "here"
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    manifest = read_manifest(artifact)
    manifest["files"]["model.onnx"] = dict(zip(("bytes", "sha256"), file_digest(artifact / "model.onnx"), strict=True))
    retarget(artifact, files=manifest["files"])
    with pytest.raises(InputError, match=r"model.onnx: node here \(Unheard\): the parser refuses it") as error:
        build_engines(_options(artifact))
    assert "\n" not in error.value.message
    assert "engines" not in read_manifest(artifact)


def test_full_tensorrt_is_driven_the_same_way(stubbed: Callable[[str], Path]) -> None:
    out = stubbed("")
    [engine] = build_engines(_stub_options(out, max_batch=2)).engines
    content = _plan(out)
    assert content["network"]["flags"] == 2  # strongly typed
    assert content["network"]["path"] == str(out / "model.onnx")  # beside which the weights are
    assert content["profiles"][0]["input_ids"] == [[1, 1], [2, 8], [2, 8]]
    assert content["profiles"][1]["input_ids"] == [[1, 1], [2, 1], [2, 1]]
    assert content["profiles"][1]["attention_mask"] == [[1, 1], [2, 64], [2, 64]]
    assert content["profiles"][0]["past_key_values.1.value"] == [[1, 2, 8, 16], [2, 2, 8, 16], [2, 2, 8, 16]]
    assert (engine.entry["scratch_bytes"], engine.entry["weights_bytes"]) == ([100, 50], 7)
    assert engine.entry["builder"] == {"name": "tensorrt", "version": "10.99.0"}
    log = (out / "engines/h100/decoder.log").read_text()
    assert "printed by native code" in log
    assert "INFO: Total Weights Memory: 7 bytes" in log
    assert verify_artifact(out).ok


def test_plugin_nodes_lose_their_definitions_for_the_parser_only(
    scout_layout: Path, tmp_path: Path, interpreted_library: native.Library
) -> None:
    out = tmp_path / "out"
    convert(ConvertOptions(scout_layout, out, target="tensorrt", recipe="int4", kv_cache="static"))
    plan = plan_build(_stub_options(out, plugins=interpreted_library.path))
    [job] = plan.jobs
    assert {function.domain for function in plan.whole.functions} == {"l4convert"}
    assert not job.model.functions
    assert {node.op_type for node in job.model.graph.node if node.domain == "l4convert"} == {
        "LongContextAttention",
        "MoE",
    }


def test_a_timing_cache_is_kept_and_used(stubbed: Callable[[str], Path]) -> None:
    out = stubbed("")
    for kept in (b".", b".."):
        build_engines(_stub_options(out, overwrite=True))
        assert (out / "engines/h100/timing.cache").read_bytes() == kept


def test_other_inputs_or_another_builder_are_another_engine(stubbed: Callable[[str], Path]) -> None:
    out = stubbed("")
    build_engines(_stub_options(out))
    backend = find_backend("tensorrt")
    [same] = plan_build(_stub_options(out)).jobs
    assert is_built(out, same, backend)
    assert not is_built(out, same, replace(backend, version="10.100.0"))
    for changes in ({"max_batch": 2}, {"max_context": 32}, {"prefill_tokens": 4}):
        [job] = plan_build(_stub_options(out, **changes)).jobs
        assert not is_built(out, job, backend)
    manifest = read_manifest(out)
    manifest["engines"][0]["weights_sha256"] = {"model.safetensors": "other weights"}
    retarget(out, engines=manifest["engines"])
    assert not is_built(out, same, backend)
    (out / same.path).unlink()
    build_engines(_stub_options(out))
    assert is_built(out, same, backend)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("fail", "h100 decoder: the builder failed: no kernel for this"),
        ("crash", "h100 decoder: the builder crashed (SIGSEGV)"),
        (
            "parse",
            "(MoE): the parser refuses it: Plugin not found, are the name and version correct? (and 1 more)",
        ),
    ],
)
def test_a_failed_build_says_why_and_leaves_what_was_there(
    stubbed: Callable[[str], Path], mode: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = stubbed("")
    build_engines(_stub_options(out))
    before, manifest = _plan(out), read_manifest(out)
    stubbed(mode)
    with pytest.raises(InputError) as error:
        build_engines(_stub_options(out, overwrite=True))
    assert error.value.message.endswith(message)
    assert "decoder.log" in str(error.value.hint)
    assert capfd.readouterr() == ("", "")
    assert (_plan(out), read_manifest(out)) == (before, manifest)
    assert verify_artifact(out).ok


def test_a_full_disk_leaves_nothing(stubbed: Callable[[str], Path]) -> None:
    out = stubbed("")
    code = (
        "import resource, signal, sys\n"
        "from l4convert.engine import BuildOptions, build_engines\n"
        "import l4convert.engine.backend as b; b.present_capabilities = lambda: ('9.0',)\n"
        "from pathlib import Path\n"
        "from l4convert.errors import L4Error\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        "try: build_engines(BuildOptions(Path(sys.argv[1]), ('h100',), max_context=64))\n"
        "except L4Error as error: print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "the plan cannot be written: File too large" in done.stdout
    assert not list((out / "engines/h100").glob("*plan*"))
    assert "engines" not in read_manifest(out)


def test_ctrl_c_ends_the_builder_at_once(stubbed: Callable[[str], Path]) -> None:
    out = stubbed("slow")
    partial = out / "engines/h100/.decoder.plan.partial"

    def interrupt() -> None:
        for _ in range(600):
            if partial.exists() and partial.stat().st_size:
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        build_engines(_stub_options(out))
    assert time.monotonic() - begun < 40  # the stub would take 60 seconds
    assert sorted(path.name for path in (out / "engines/h100").iterdir()) == ["decoder.log"]
    assert verify_artifact(out).ok


def _hold(path: str, held: Any, release: Any) -> None:
    with plan_file(Path(path)):
        held.set()
        release.wait(30)


def test_two_processes_do_not_build_the_same_engine(stubbed: Callable[[str], Path]) -> None:
    out = stubbed("")
    (out / "engines/h100").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(out / "engines/h100/decoder.plan"), held, release))
    other.start()
    assert held.wait(30)
    with pytest.raises(UsageError, match="is being built by another process"):
        build_engines(_stub_options(out))
    release.set()
    other.join()
    build_engines(_stub_options(out))


def test_what_a_killed_build_left_is_in_nobodys_way(stubbed: Callable[[str], Path]) -> None:
    out = stubbed("")
    (out / "engines/h100").mkdir(parents=True)
    (out / "engines/h100/.decoder.plan.partial").write_bytes(b"x" * 100_000)
    build_engines(_stub_options(out))
    assert verify_artifact(out).ok


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("raise ModuleNotFoundError('no such module', name='tensorrt')", "tensorrt is not installed"),
        ("import os; os.abort()", "tensorrt does not load (its import ended with code -6)"),
        ("raise OSError('libnvinfer.so.11:\\n not found')", "does not load (OSError: libnvinfer.so.11: not found)"),
    ],
)
def test_tensorrt_absent_is_an_install_command(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, message: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    retarget(artifact, target="tensorrt")
    with pytest.raises(BackendMissing) as error:
        build_engines(_stub_options(artifact))
    assert message in error.value.message
    assert error.value.message.endswith(": pip install tensorrt-cu13 --extra-index-url https://pypi.nvidia.com")


@pytest.mark.parametrize(("present", "refused"), [((), "has no GPU"), (("8.9",), "GPUs have 8.9")])
def test_tensorrt_builds_for_the_gpu_that_is_there(
    stubbed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...], refused: str
) -> None:
    out = stubbed("")
    monkeypatch.setattr("l4convert.engine.backend.present_capabilities", lambda: present)
    monkeypatch.setenv("TRT_INTERNAL_OPTIONS", "--other")
    with pytest.raises(UsageError, match=refused):
        build_engines(_stub_options(out))
    load_module("tensorrt")
    assert os.environ["TRT_INTERNAL_OPTIONS"] == ("--other" if present else "--other --cpu_only=1")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"targets": ("h100",)}, UsageError, "h100: tensorrt-rtx has no engines for compute capability 9.0"),
        ({"targets": ("cpu",)}, UsageError, "cpu: has no GPU"),
        ({"targets": ("l5",)}, UsageError, "l5 is not a hardware profile"),
        ({"max_context": 4097}, UsageError, "--max-context 4097 is not from 1 to the model's 4096"),
        ({"max_batch": 0}, UsageError, "--max-batch 0 is not above 0"),
        ({"layers_per_engine": 1, "segments": (2,)}, UsageError, "there is no segment 2; the last one is 1"),
        ({"memory_limit": "1M"}, InputError, "building needs about 6"),
        ({"memory_limit": "much"}, UsageError, "is not an amount of memory"),
        ({"max_batch": 100_000_000}, UsageError, "for caches, the GPU has 24.0 GB"),
    ],
)
def test_what_cannot_work_is_refused_before_building(
    dense: Path, changes: dict[str, Any], kind: type[L4Error], message: str
) -> None:
    with pytest.raises(kind) as error:
        plan_build(replace(_options(dense), **changes))
    assert message in error.value.message


def test_fp8_is_refused_on_ampere_only(dense_fp8: Path) -> None:
    with pytest.raises(UsageError, match="the artifact has FP8 numbers, which compute capability 8"):
        plan_build(_options(dense_fp8, "a100-80g"))
    assert len(plan_build(_options(dense_fp8, "l4", "rtx-5090")).jobs) == 2


def test_bf16_is_refused_on_turing(dense: Path, tmp_path: Path) -> None:
    text = (
        'summary = "Turing"\ncompute_capability = "7.5"\nmemory_bytes = 16_000_000_000\n'
        'bandwidth_bytes_per_second = 320_000_000_000\nprecisions = ["fp32", "fp16", "int8", "int4"]\n'
        'runtimes = ["tensorrt-rtx"]\nrecipe = "int4"\n'
    )
    (tmp_path / "t4.toml").write_text(text)
    with pytest.raises(UsageError, match="BF16 numbers, which compute capability 7") as error:
        plan_build(_options(dense, str(tmp_path / "t4.toml")))
    assert error.value.hint == "convert again with --compute float16"


def test_an_artifact_of_another_target_is_refused(artifact: Path) -> None:
    retarget(artifact, target="portable")
    with pytest.raises(UsageError, match="converted for the target 'portable'") as error:
        plan_build(_options(artifact))
    assert error.value.hint == "convert again with --target tensorrt-rtx"


def test_a_changed_graph_is_refused(artifact: Path) -> None:
    with (artifact / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match="was changed after it was written"):
        plan_build(_options(artifact))

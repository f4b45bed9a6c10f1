"""Checkpoints named ``hf://org/name``: opened, planned, converted and compared as those in folders are."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from huggingface_hub import close_session, constants, hf_hub_download

from l4convert import cli
from l4convert.checkpoint import open_checkpoint, remote
from l4convert.checkpoint.hub import faults, local_checkpoint, spool
from l4convert.emit import source_digests
from l4convert.emit.manifest import same_sources
from l4convert.errors import BackendMissing, InputError, UsageError
from l4convert.pipeline import ConvertOptions, PlanOptions, convert, plan_conversion
from tests.adapters import write_adapter
from tests.checkpoint.refusals import assert_refused
from tests.checkpoints import write_random_checkpoint
from tests.compressed import compress
from tests.hub.conftest import REPO, Serve, environment
from tests.hub.server import Answer, Hub, Request, first, ranged
from tests.meta_checkpoints import quantize_impls, write_quantized

CKPT = Path(f"hf://{REPO}")
# Wide enough that no weight is so small that it is stored in the graph.
WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "intermediate_size_mlp": 256,
    "num_hidden_layers": 2,
    "num_local_experts": 2,
    "vocab_size": 512,
    "head_dim": 128,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("wide") / "stacked", shards=3, **WIDE)


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("wide") / "unfused", unfused=True, shards=3, **WIDE)


@pytest.fixture(scope="module")
def expected(wide: Path) -> bytes:
    """The weights of its default conversion."""
    convert(ConvertOptions(checkpoint=wide, output=wide.parent / "converted"))
    return (wide.parent / "converted" / "model.safetensors").read_bytes()


def weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored_locally(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.parametrize(
    ("layout", "recipe", "target"),
    [
        ("wide", "int4", "cpu"),
        ("wide", "fp8", "portable"),
        ("wide", "none", "cpu"),
        ("unfused", "int4", "cpu"),
        ("unfused", "fp8", "cpu"),
        ("unfused", "none", "portable"),
    ],
)
def test_the_artifact_is_the_same_and_every_byte_comes_once(
    request: pytest.FixtureRequest,
    serve: Serve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    recipe: str,
    target: str,
) -> None:
    wide: Path = request.getfixturevalue(layout)
    monkeypatch.setattr(spool, "CHUNK_BYTES", 50_000)  # many for each tensor
    monkeypatch.setattr(spool, "_LEAST_BYTES", 100_000)
    hub = serve(wide)
    here, far = tmp_path / "here", tmp_path / "far"
    convert(ConvertOptions(checkpoint=wide, output=here, recipe=recipe, target=target))
    result = convert(ConvertOptions(checkpoint=CKPT, output=far, recipe=recipe, target=target))
    for name in ("model.safetensors", "model.onnx", "config.json", "genai_config.json"):
        assert (here / name).read_bytes() == (far / name).read_bytes()
    # Three beginnings of shards, each tensor, and a block that has the nine norms, or a part of them, in it.
    assert weights_size(wide) <= hub.sent <= weights_size(wide) + 3 * 65536 + 9 * 16384
    assert result.traffic is not None
    assert result.traffic.nbytes == hub.sent
    assert stored_locally(constants.HF_HUB_CACHE) < weights_size(wide) / 10
    ours, theirs = (json.loads((out / "l4convert.json").read_text()) for out in (far, here))
    assert ours["source"]["hub"] == {"repo": REPO, "commit": hub.commit}
    assert ours["source"]["files"] == theirs["source"]["files"]  # the SHA-256 of Git LFS is that of the file
    assert "hub" not in theirs["source"]


def test_packed_weights_come_once_too(serve: Serve, maverick_layout: Path, tmp_path: Path) -> None:
    folder = compress(maverick_layout, tmp_path / "packed", shards=2)
    hub = serve(folder)
    here, far = tmp_path / "here", tmp_path / "far"
    assert open_checkpoint(CKPT).quantization == open_checkpoint(folder).quantization is not None
    assert len(hub.asked("signature")) <= 2 + weights_size(folder) // 16384, "each shape was asked for by itself"
    convert(ConvertOptions(checkpoint=folder, output=here, recipe="keep"))
    hub.requests.clear()
    convert(ConvertOptions(checkpoint=CKPT, output=far, recipe="keep"))
    assert (here / "model.safetensors").read_bytes() == (far / "model.safetensors").read_bytes()
    assert hub.sent <= 2 * weights_size(folder)


def test_columns_of_a_matrix_larger_than_the_cache_come_once(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(spool, "_LEAST_BYTES", 30_000)
    monkeypatch.setattr(remote, "_STEP_BYTES", 10_000)
    folder = write_random_checkpoint(tmp_path / "ckpt", **{**WIDE, "vocab_size": 4096, "num_hidden_layers": 1})
    hub = serve(folder)
    tensor = open_checkpoint(CKPT).tensors["lm_head.weight"]
    whole = open_checkpoint(folder).tensors["lm_head.weight"].numpy()
    hub.requests.clear()
    with remote.streaming(2):
        for start in range(0, 512, 64):
            some = slice(start, start + 64)
            assert (tensor.tile(0, slice(0, 4096), some) == whole[:, some]).all()
    assert hub.sent == tensor.nbytes
    with remote.streaming(1):  # rows are read once, and fall out
        assert (tensor.tile(0, slice(100, 1000), slice(0, 512)) == whole[100:1000]).all()
    assert (tensor.tile(0, slice(7, 9), slice(3, 5)) == whole[7:9, 3:5]).all()  # and without a cache


def test_a_plan_reads_headers_only_and_says_so(wide: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    hub = serve(wide)
    plan = plan_conversion(PlanOptions(checkpoint=CKPT))
    assert {request.range for request in hub.requests if ranged(request)} == {(0, 65536)}
    assert plan.traffic is not None
    assert plan.traffic.nbytes == hub.sent == 3 * 65536
    assert cli.run(["plan", str(CKPT), "--no-measure"]) == 0
    shown = capsys.readouterr().out
    assert f"would convert  hf://{REPO}@{hub.commit}\n" in shown
    assert " 196.6 kB of weight files in 3 requests\n" in shown  # where the files are was known
    assert cli.run(["inspect", str(CKPT), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["hub"] == {"repo": REPO, "commit": hub.commit}
    assert described["network"]["bytes"] == 3 * 65536


def test_a_header_longer_than_its_beginning_is_read(serve: Serve, tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "ckpt")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    longer = (length + 100_000).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 100_000
    path.write_bytes(longer + data[8 + length :])
    serve(folder)
    ours, theirs = (open_checkpoint(place).tensors["model.norm.weight"].numpy() for place in (CKPT, folder))
    assert (ours == theirs).all()


def test_large_files_get_the_digests_that_a_copy_gets_too(
    serve: Serve, maverick_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("l4convert.emit.manifest.WHOLE_BYTES", 10_000)
    serve(maverick_layout)
    far, here = (source_digests(open_checkpoint(place).files) for place in (CKPT, maverick_layout))
    assert far["model.safetensors"].keys() == {"bytes", "sha256", "header_sha256"}
    assert here["model.safetensors"].keys() == {"bytes", "header_sha256"}
    assert same_sources(far, here)
    hf_hub_download(REPO, "model.safetensors")
    assert source_digests(open_checkpoint(CKPT).files) == far
    changed = {**here, "model.safetensors": {**here["model.safetensors"], "header_sha256": "0"}}
    assert not same_sources(far, changed)
    assert not same_sources(far, {})


def test_files_outside_of_lfs_are_read_too(serve: Serve, maverick_layout: Path) -> None:
    hub = serve(maverick_layout)
    hub.lfs = ()
    checkpoint = open_checkpoint(CKPT)
    assert checkpoint.tensors["model.norm.weight"].numpy().size == 64
    assert source_digests(checkpoint.files)["model.safetensors"]["git_sha1"] == hub.etag("model.safetensors")


def test_a_revision_is_pinned(serve: Serve, maverick_layout: Path) -> None:
    hub = serve(maverick_layout)
    hub.refs["v1"] = hub.commit
    for revision in ("v1", "main", hub.commit):
        assert str(open_checkpoint(Path(f"{CKPT}@{revision}")).title) == f"hf://{REPO}@{hub.commit}"
    resolved = [request.path for request in hub.asked("/resolve/")]
    assert resolved
    assert all(hub.commit in path for path in resolved)


def test_what_the_cache_has_is_not_fetched(serve: Serve, wide: Path, tmp_path: Path) -> None:
    hub = serve(wide)
    names = sorted(path.name for path in wide.glob("*.safetensors"))
    hf_hub_download(REPO, names[0])
    hub.requests.clear()
    checkpoint = open_checkpoint(CKPT)
    assert not [request for request in hub.asked(names[0]) if ranged(request)]
    assert [file.exists() for file in checkpoint.files if file.suffix == ".safetensors"] == [True, False, False]
    hub.requests.clear()
    convert(ConvertOptions(checkpoint=CKPT, output=tmp_path / "out"))
    assert hub.sent <= weights_size(wide) - (wide / names[0]).stat().st_size + 2 * 65536 + 9 * 16384


def test_without_a_network_the_cache_serves(serve: Serve, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve(wide)
    open_checkpoint(CKPT)
    for offline in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        close_session()
        why = "HF_HUB_OFFLINE is set" if offline else "cannot be reached"
        assert_refused(lambda: open_checkpoint(CKPT), ["absent", why, "not whole in the cache"])
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    for path in wide.glob("*.safetensors"):
        hf_hub_download(REPO, path.name)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    checkpoint = open_checkpoint(CKPT)
    assert checkpoint.hub is not None
    assert checkpoint.hub.commit == hub.commit
    assert not hub.requests


def test_nothing_cached_and_no_network_is_one_line_soon(tmp_path: Path) -> None:
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "l4convert", "convert", str(CKPT), "-o", str(tmp_path / "out")]
    begin = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert time.monotonic() - begin < sum(faults.WAITS), "it was tried again"
    assert done.returncode == 3
    error, hint = done.stderr.splitlines()
    assert error.startswith(f"error: hf://{REPO}: http://127.0.0.1:1 cannot be reached: no connection")
    assert hint.startswith("hint: check the network")
    assert not (tmp_path / "out").exists()


def test_offline_with_nothing_cached_is_told(serve: Serve, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = serve(wide)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(lambda: open_checkpoint(CKPT), [f"hf://{REPO}: HF_HUB_OFFLINE is set", f"`hf download {REPO}`"])
    assert not hub.requests


def test_validate_downloads_and_says_how_much_first(
    serve: Serve, maverick_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = serve(maverick_layout)
    out = tmp_path / "out"
    assert cli.run(["convert", str(CKPT), "-o", str(out), "--recipe", "none"]) == 0
    assert f"Next: l4convert validate {out} --reference hf://{REPO}\n" in capsys.readouterr().out
    for told in (True, False):
        hub.requests.clear()
        assert cli.run(["validate", str(out), "--reference", str(CKPT), "--tokens", "120", "--window", "60"]) == 0
        shown = capsys.readouterr()
        assert (f"hf://{REPO}: downloading " in shown.err) is told
        assert "digests differ" not in shown.out
        assert bool([r for r in hub.requests if r.server == "storage"]) is told
    assert (Path(constants.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}").is_dir()


def test_an_adapter_on_the_hub_is_downloaded(
    serve: Serve, maverick_layout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(maverick_layout, tmp_path / "lora", target_modules=["q_proj"])
    hub = serve(adapter)
    given = [str(maverick_layout), "--recipe", "none", "--adapter"]
    assert cli.run(["convert", *given, str(CKPT), "-o", str(tmp_path / "remote")]) == 0
    shown = capsys.readouterr()
    assert f"hf://{REPO}: downloading " in shown.err
    assert f" --adapter hf://{REPO}@{hub.commit}\n" in shown.out
    entry = json.loads((tmp_path / "remote" / "l4convert.json").read_text())["adapters"][0]
    assert entry["folder"] == f"hf://{REPO}@{hub.commit}"
    assert cli.run(["convert", *given, str(adapter), "-o", str(tmp_path / "local")]) == 0
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("remote", "local")]
    assert weights[0] == weights[1]


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub's, of the small files
def test_a_disk_that_is_too_small_for_the_reference_is_told(
    serve: Serve, maverick_layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l4convert.checkpoint.hub import local_checkpoint

    serve(maverick_layout)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert_refused(lambda: local_checkpoint(CKPT), ["are to be downloaded", "1.0 kB free", "HF_HUB_CACHE"])
    assert local_checkpoint(maverick_layout) == maverick_layout


def answers(how: Callable[[Answer], None]) -> Callable[[Hub], None]:
    """Everything is answered so."""
    return lambda hub: hub.faults.append(lambda _, answer: how(answer) is None)


def lists(**changes: object) -> Callable[[Hub], None]:
    """Every file of the listing says so."""
    return lambda hub: setattr(hub, "listed", lambda rows: [{**row, **changes} for row in rows])


REFUSED: dict[str, tuple[Callable[[Hub], None], list[str]]] = {
    "gated": (lambda hub: setattr(hub, "gated", True), ["licence", "hf auth login"]),
    "private": (lambda hub: setattr(hub, "token", "hf_other"), ["private", "HF_TOKEN"]),
    "down": (answers(lambda answer: answer.send(503)), ["503"]),
    "html": (answers(lambda answer: answer.send(200, {}, b"<html>")), ["HF_ENDPOINT"]),
    "no object": (answers(lambda answer: answer.json([1])), ["HF_ENDPOINT"]),
    "no commit": (answers(lambda answer: answer.json({"id": "a/b", "sha": "../.."})), ["commit"]),
    "redirects": (answers(lambda answer: answer.send(302, {"Location": "/x"})), ["reached", "TooManyRedirects"]),
    "no size": (lists(size=None, lfs=None), ["does not say"]),
    "no such etag": (lists(blobId="../x", lfs=None), ["does not say"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hub_that_refuses_or_is_none(serve: Serve, maverick_layout: Path, case: str) -> None:
    hub = serve(maverick_layout)
    change, mentions = REFUSED[case]
    change(hub)
    error = assert_refused(lambda: open_checkpoint(CKPT), [f"hf://{REPO}", *mentions])
    assert "hf_other" not in f"{error.message}{error.hint}"


@pytest.mark.parametrize(
    ("address", "mentions"),
    [("hf://some-org/other", "no such model"), (f"hf://{REPO}@v9", "no such revision")],
)
def test_what_is_not_there(serve: Serve, maverick_layout: Path, address: str, mentions: str) -> None:
    serve(maverick_layout)
    assert_refused(lambda: open_checkpoint(Path(address)), [address, mentions])


@pytest.mark.parametrize(
    "address", ["hf://", "hf://name", "hf://a/b/c.json", "hf://datasets/a/b", "hf://a/../b", "hf://a/b@", "hf://a/b c"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="no address of a model"):
        open_checkpoint(Path(address))


def test_names_that_lead_elsewhere_name_nothing(serve: Serve, maverick_layout: Path, tmp_path: Path) -> None:
    names = ["../evil.json", "/etc/evil.json", "a/../../evil.json", "evil\n.json", "..", "*.json", "x" * 400 + ".json"]
    hub = serve(maverick_layout)
    hub.listed = lambda rows: [*rows, *({**rows[0], "rfilename": name} for name in names)]
    open_checkpoint(CKPT)
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]
    assert not hub.asked("evil")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(serve: Serve, tmp_path: Path, name: str) -> None:
    folder = write_random_checkpoint(tmp_path / "ckpt", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    serve(folder)
    assert_refused(lambda: open_checkpoint(CKPT), [f"hf://{REPO}@", "plain file name"])


@pytest.mark.parametrize("prefix", [(1 << 40).to_bytes(8, "little"), (99_000_000).to_bytes(8, "little"), b"\0\0"])
def test_a_header_that_cannot_be_is_not_fetched(serve: Serve, tmp_path: Path, prefix: bytes) -> None:
    folder = write_random_checkpoint(tmp_path / "ckpt")
    (folder / "model.safetensors").write_bytes(prefix)
    hub = serve(folder)
    assert_refused(lambda: open_checkpoint(CKPT), [f"hf://{REPO}@", "model.safetensors"])
    assert hub.sent <= 8


def test_other_formats_are_named(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "config.json").write_text("{}")
    (tmp_path / "ckpt" / "pytorch_model.bin").write_bytes(b"PK")
    serve(tmp_path / "ckpt")
    assert_refused(lambda: open_checkpoint(CKPT), ["no weights", ".safetensors"])
    (tmp_path / "ckpt" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "ckpt" / "config.json").rename(tmp_path / "ckpt" / "adapter_config.json")
    serve(tmp_path / "ckpt")
    assert_refused(lambda: open_checkpoint(CKPT), ["an adapter", "--adapter"])
    (tmp_path / "ckpt" / "adapter_config.json").unlink()
    serve(tmp_path / "ckpt").commit = "c" * 40
    assert_refused(lambda: open_checkpoint(CKPT), ["no config.json"])


def test_metas_own_files_are_read_in_ranges(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_quantized(tmp_path / "ckpt", "int4", quantize_impls(monkeypatch), shards=2)
    weights = [path for path in folder.iterdir() if path.suffix in {".pth", ".pt"}]
    assert len(weights) == 4
    hub = serve(folder)
    for source, out in ((folder, "here"), (CKPT, "far")):
        assert cli.run(["-q", "convert", str(source), "-o", str(tmp_path / out), "--recipe", "keep"]) == 0
    here, far = (json.loads((tmp_path / out / "l4convert.json").read_text()) for out in ("here", "far"))
    assert here["files"] == far["files"]
    assert same_sources(far["source"]["files"], here["source"]["files"])
    total = sum(path.stat().st_size for path in weights)
    entries = sum(len(ZipFile(path).namelist()) for path in weights)
    assert hub.sent <= total + (entries + 40) * 4096, "more than each byte once, and a block an entry"
    assert stored_locally(constants.HF_HUB_CACHE) < 10_000
    downloaded = local_checkpoint(CKPT)
    assert {path.name: path.read_bytes() for path in downloaded.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_without_the_library_the_install_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BackendMissing, match="pip install huggingface_hub"):
        open_checkpoint(CKPT)


def test_weights_of_the_hub_cannot_be_shared(serve: Serve, maverick_layout: Path, tmp_path: Path) -> None:
    serve(maverick_layout)
    options: Any = {"recipe": "none", "target": "portable", "share_weights": True}
    with pytest.raises(UsageError, match="on the hub"):
        convert(ConvertOptions(checkpoint=CKPT, output=tmp_path / "out", **options))


def test_tensors_travel(serve: Serve, maverick_layout: Path) -> None:
    serve(maverick_layout)
    tensor = open_checkpoint(CKPT).tensors["model.norm.weight"]
    assert (pickle.loads(pickle.dumps(tensor)).numpy() == tensor.numpy()).all()


def test_faults_in_the_middle_of_a_conversion_do_not_show(
    serve: Serve, wide: Path, expected: bytes, tmp_path: Path
) -> None:
    hub = serve(wide)
    hub.faults += [first(3, large, lambda _, answer: answer.reset()), first(3, large, lambda _, a: a.send(429))]
    result = convert(ConvertOptions(checkpoint=CKPT, output=tmp_path / "far"))
    assert result.traffic is not None
    assert result.traffic.retries == 6
    assert (tmp_path / "far" / "model.safetensors").read_bytes() == expected


def large(request: Request) -> bool:
    """Whether it asks for weights."""
    return request.range is not None and request.range[0] > 65536


def test_an_outage_ends_a_run_that_can_go_on(serve: Serve, wide: Path, expected: bytes, tmp_path: Path) -> None:
    hub = serve(wide)
    options = ConvertOptions(checkpoint=CKPT, output=tmp_path / "far", jobs=1)
    served = iter(range(12))
    hub.faults.append(
        lambda request, answer: large(request) and next(served, None) is None and answer.send(503) is None
    )
    with pytest.raises(InputError, match="503") as caught:
        convert(options)
    assert "run the same command again" in str(caught.value.hint)
    hub.faults.clear()
    hub.requests.clear()
    assert convert(options).resumed_bytes > 0
    assert hub.sent < weights_size(wide)
    assert (tmp_path / "far" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on(serve: Serve, wide: Path, expected: bytes, tmp_path: Path, how: signal.Signals) -> None:
    hub = serve(wide)
    out = tmp_path / "far"
    enough = len(expected) // 2
    # What comes after that takes so long that the run cannot end before the signal.
    hub.faults.append(lambda request, _: large(request) and time.sleep(0.03 if hub.sent < enough else 2) is not None)
    command = [sys.executable, "-m", "l4convert", "convert", str(CKPT), "-o", str(out)]
    env = {**os.environ, **environment(hub, tmp_path / "home")}
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while hub.sent < enough and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(how)
        process.wait(timeout=30)
    assert process.returncode in {-how, 130}
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    hub.faults.clear()
    convert(ConvertOptions(checkpoint=CKPT, output=out))
    assert (out / "model.safetensors").read_bytes() == expected

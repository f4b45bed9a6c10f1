"""``l4convert plugins``: what it prints, and what it ends with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from l4convert import cli
from l4convert.plugins.library import checking
from l4convert.plugins.library.variants import gather
from tests.conftest import REPO


def run_json(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> dict:
    assert cli.run([*map(str, args), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["build", "list", "check"])
def test_every_command_of_the_group_has_help_examples_and_the_global_options(name, capsys):
    assert cli.run(["plugins", name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"l4convert plugins {name}" in text
    for option in ("--json", "--quiet", "--config"):
        assert option in text


def test_a_dry_run_shows_what_would_be_compiled(capsys, tmp_path):
    args = ("plugins", "build", "--dry-run", "--output", tmp_path / "out", "--cache", tmp_path / "cache")
    content = run_json(capsys, *args, "--sm", 90)
    assert content["schema"] == "l4convert.plugins.build/1"
    assert content["dry_run"] is True
    names = sorted(variant.name for found in gather().values() for variant in found)
    assert sorted(kernel["name"] for kernel in content["kernels"]) == names
    assert {(kernel["sm"], kernel["compiled"]) for kernel in content["kernels"]} == {(90, False)}
    assert cli.run([*map(str, args)]) == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[2:7]] == ["80", "89", "90", "100", "120"]
    assert not list(tmp_path.iterdir())


def test_wrong_numbers_are_usage_errors(capsys):
    assert cli.run(["plugins", "build", "--sm", "70"]) == 2
    assert capsys.readouterr().err.startswith("error: --sm 70: there are kernels for 80,")
    assert cli.run(["plugins", "build", "--sm", "90", "--update-resources"]) == 2


def test_options_can_come_from_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("l4convert.toml").write_text('[plugins.build]\noutput = "elsewhere"\nsm = [120]\n')
    content = run_json(capsys, "plugins", "build", "--dry-run")
    assert content["library"] == "elsewhere/libl4convert_plugins.so"
    assert {kernel["sm"] for kernel in content["kernels"]} == {120}
    Path("l4convert.toml").write_text("[plugins.build]\nsms = [90]\n")
    assert cli.run(["plugins", "build", "--dry-run"]) == 2
    assert "[plugins.build] sms is not an option" in capsys.readouterr().err


def test_list_shows_what_is_in_a_library(capsys, built_library):
    content = run_json(capsys, "plugins", "list", built_library, "--sm", 90)
    assert content["sms"] == [80, 89, 90, 100, 120]
    assert {kernel["sm"] for kernel in content["kernels"]} == {90}
    assert cli.run(["plugins", "list", str(built_library)]) == 0
    text = capsys.readouterr().out
    for kernel in content["kernels"]:
        assert kernel["name"] in text
    assert cli.run(["plugins", "list", str(built_library.parent / "absent.so")]) == 3
    assert cli.run(["plugins", "list", str(built_library), "--sm", "70"]) == 2
    assert "has kernels for 80, 89, 90, 100, 120" in capsys.readouterr().err


def test_check_reports_every_check_and_fails_with_4(capsys, tmp_path):
    """The program itself has its own tests; here it is a script that says what it would."""
    library = tmp_path / "library.so"
    assert cli.run(["plugins", "check", str(library)]) == 3
    library.write_text("")
    assert cli.run(["plugins", "check", str(library)]) == 3
    assert "kernel-lens" in capsys.readouterr().err
    program = tmp_path / checking.CONFORMANCE
    row = {"subject": "MoE", "name": "clone", "ok": False, "wrong": "it differs"}
    report = json.dumps({"schema": 1, "failed": 1, "checks": [row, row | {"ok": True, "wrong": ""}]})
    program.write_text(f"#!{sys.executable}\nprint('''{report}''')\nraise SystemExit(4)\n")
    program.chmod(0o755)
    assert cli.run(["plugins", "check", str(library)]) == 4
    out, err = capsys.readouterr()
    assert "it differs" in out
    assert "2 checks, 1 failed" in out
    assert err.startswith(f"error: {library}: 1 of 2 checks failed")
    program.write_text("#!/bin/sh\necho a fault >&2\nexit 139\n")
    assert cli.run(["plugins", "check", str(library)]) == 3
    assert "to the end: a fault" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing_but_finished_kernels(tmp_path):
    command = [sys.executable, "-m", "l4convert", "plugins", "build", "--sm", "80", "--jobs", "1"]
    command += ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finished = tmp_path / "cache" / "cubins"
    limit = time.monotonic() + 300
    while not list(finished.glob("*.json")) and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert list(finished.glob("*.json"))
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        _wait_for_group(process.pid)


def _wait_for_group(group: int) -> None:
    for _ in range(100):
        os.killpg(group, 0)
        time.sleep(0.05)

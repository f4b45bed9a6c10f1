"""The group: exit codes, errors as one line, precedence of settings, start-up time."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from l4convert import cli
from l4convert.cli._settings import global_options, settings_of
from l4convert.errors import BackendMissing, CheckFailed, InputError, L4Error, UsageError

# A shard of the environment that would leak into the tests.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("L4CONVERT_")}


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Adds a command ``probe`` that shows its options and calls what the test gives it; runs in an empty folder."""
    action: list[Callable[[], None]] = []

    @click.command("probe")
    @click.argument("items", nargs=-1)
    @click.option("--recipe", default="int4")
    @click.option("--block-size", type=int)
    @global_options
    @click.pass_context
    def command(ctx: click.Context, items: tuple[str, ...], recipe: str, block_size: int | None) -> None:
        settings = settings_of(ctx)
        for act in action:
            act()
        payload = {"recipe": recipe, "block_size": block_size, "items": list(items), "verbose": settings.verbose}
        settings.emit("probe", payload, f"recipe {recipe}", summary=True)

    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("L4CONVERT_"):
            monkeypatch.delenv(name)
    cli.cli.add_command(command)
    yield action.append
    del cli.cli.commands["probe"]


def raiser(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def result(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    assert cli.run(["probe", "--json", *args]) == 0
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (L4Error("broken"), 1),
        (UsageError("broken"), 2),
        (InputError("broken"), 3),
        (CheckFailed("broken"), 4),
        (BackendMissing("broken"), 5),
    ],
)
def test_our_errors_are_one_line_and_their_exit_code(probe, capsys, error, code):
    probe(raiser(error))
    assert cli.run(["probe"]) == code
    assert capsys.readouterr() == ("", "error: broken\n")


def test_a_hint_is_a_second_line(probe, capsys):
    probe(raiser(InputError("model.safetensors: truncated\nat byte 9", "download it again")))
    cli.run(["probe"])
    assert capsys.readouterr().err == "error: model.safetensors: truncated at byte 9\nhint: download it again\n"


def test_a_defect_says_so_without_a_traceback(probe, capsys):
    probe(raiser(KeyError("x")))
    assert cli.run(["probe"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: internal error: KeyError: 'x'\n")
    assert "--debug" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("args", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_shows_the_traceback(probe, capsys, args):
    probe(raiser(InputError("broken")))
    assert cli.run(args) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: broken\n")


def test_interrupt(probe, capsys):
    probe(raiser(KeyboardInterrupt()))
    assert cli.run(["probe"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"


def test_a_missing_optional_package_is_exit_5_with_the_command(probe, capsys):
    probe(raiser(ModuleNotFoundError("No module named 'transformers.models'", name="transformers.models")))
    assert cli.run(["probe"]) == 5
    assert "pip install torch transformers" in capsys.readouterr().err


def test_a_missing_module_of_ours_is_a_defect(probe, capsys):
    probe(raiser(ModuleNotFoundError("No module named 'l4convert.nothing'", name="l4convert.nothing")))
    assert cli.run(["probe"]) == 1
    assert "internal error" in capsys.readouterr().err


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_too_little_memory_is_not_a_defect(probe, capsys, error):
    probe(raiser(error))
    assert cli.run(["probe"]) == 1
    assert capsys.readouterr().err.startswith("error: out of memory")


def test_a_closed_output_is_not_a_defect():
    command = f"exec {sys.executable} -m l4convert inspect absent >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 3


def test_a_full_disk_is_not_a_defect(probe, capsys):
    probe(raiser(OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")))
    assert cli.run(["probe"]) == 3
    assert capsys.readouterr().err == "error: out/model.safetensors: No space left on device\n"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["probe", "--recipes", "x"], "Did you mean '--recipe'?"),
        (["probe", "--block-size", "x"], "'x' is not a valid integer"),
        (["convert"], "Missing argument 'CKPT'"),
    ],
)
def test_usage_errors_are_exit_2_and_point_at_the_help(probe, capsys, args, part):
    assert cli.run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert part in err
    assert err.splitlines()[0].startswith("error: ")
    assert err.splitlines()[1].startswith("hint: see l4convert")
    assert err.splitlines()[1].endswith("--help")


def test_without_arguments_the_help_is_shown(capsys):
    assert cli.run([]) == 2
    assert "Start here" in capsys.readouterr().err


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == "l4convert 0.1.0\n"


def test_json_names_its_schema(probe, capsys):
    assert result(capsys)["schema"] == "l4convert.probe/1"


def test_quiet_drops_the_summary_but_not_json(probe, capsys):
    assert cli.run(["probe", "-q"]) == 0
    assert capsys.readouterr().out == ""
    assert result(capsys, "-q")["recipe"] == "int4"


def test_precedence_flag_environment_file_default(probe, capsys, monkeypatch):
    assert result(capsys)["recipe"] == "int4"
    Path("l4convert.toml").write_text('verbose = true\n[probe]\nrecipe = "from-file"\nblock-size = 64\n')
    assert result(capsys) == {
        "schema": "l4convert.probe/1", "recipe": "from-file", "block_size": 64, "items": [], "verbose": True,
    }  # fmt: skip
    monkeypatch.setenv("L4CONVERT_PROBE_RECIPE", "from-environment")
    assert result(capsys)["recipe"] == "from-environment"
    assert result(capsys, "--recipe", "from-flag")["recipe"] == "from-flag"


@pytest.mark.parametrize("before", [True, False])
def test_config_before_or_after_the_command(probe, capsys, before):
    Path("my.toml").write_text("verbose = true\n[probe]\nblock_size = 128\n")
    args = ["--config", "my.toml", "probe", "--json"] if before else ["probe", "--config", "my.toml", "--json"]
    assert cli.run(args) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["block_size"], content["verbose"]) == (128, True)


def test_config_by_environment_wins_over_the_file_of_the_folder(probe, capsys, monkeypatch):
    Path("l4convert.toml").write_text('[probe]\nrecipe = "folder"\n')
    Path("other.toml").write_text('[probe]\nrecipe = "other"\n')
    monkeypatch.setenv("L4CONVERT_CONFIG", "other.toml")
    assert result(capsys)["recipe"] == "other"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[probe]\nrecip = 1\n", "[probe] recip is not an option"),
        ("recipe = 1\n", "recipe is not an option"),
        ("[prob]\n", "[prob] is not a command"),
        ("x = [\n", "not a TOML file"),
        ("x = " + "[" * 10_000, "nested too deeply"),
    ],
)
def test_a_wrong_config_file_is_exit_2_and_named(probe, capsys, text, part):
    Path("l4convert.toml").write_text(text)
    assert cli.run(["probe"]) == 2
    err = capsys.readouterr().err
    assert "l4convert.toml: " in err
    assert part in err


def test_an_absent_config_file_is_exit_2(probe, capsys):
    assert cli.run(["--config", "absent.toml", "probe"]) == 2
    assert "absent.toml: cannot be read: No such file" in capsys.readouterr().err


def test_a_bad_value_says_where_it_came_from(probe, capsys, monkeypatch):
    Path("l4convert.toml").write_text('[probe]\nblock-size = "big"\n')
    assert cli.run(["probe"]) == 2
    assert "hint: the value comes from l4convert.toml" in capsys.readouterr().err
    monkeypatch.setenv("L4CONVERT_PROBE_BLOCK_SIZE", "huge")
    assert cli.run(["probe"]) == 2
    assert "hint: the value comes from the environment variable L4CONVERT_PROBE_BLOCK_SIZE" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_examples_and_the_global_options(name, capsys):
    assert cli.run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Examples:" in text
    assert f"l4convert {name}" in text
    for option in ("--json", "--quiet", "--verbose", "--debug", "--config"):
        assert option in text


def test_help_lists_every_command(capsys):
    assert cli.run(["--help"]) == 0
    listed = [
        line.split()[0]
        for line in capsys.readouterr().out.partition("Commands:")[2].splitlines()
        if line[2:3].isalpha()
    ]
    assert listed[: len(cli.COMMANDS)] == list(cli.COMMANDS)


def test_help_imports_nothing_heavy():
    code = "import sys; from l4convert import cli; cli.run(['--help']); print(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    loaded = set(done.stdout.splitlines())
    assert not loaded & {"numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "transformers", "tokenizers", "rich"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(shell, capsys):
    assert cli.run(["completion", shell]) == 0
    assert "_L4CONVERT_COMPLETE" in capsys.readouterr().out


def complete(words: str, cwd: Path) -> list[str]:
    """What bash would be offered for the last of ``words``."""
    parts = words.split(" ")
    request = {"_L4CONVERT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(parts) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "l4convert"],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env=ENVIRONMENT | request,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_completion_offers_commands_options_and_values(tmp_path):
    (tmp_path / "l4convert.toml").write_text("this is broken")  # must not disturb
    assert complete("l4convert con", tmp_path) == ["convert"]
    assert complete("l4convert convert --rec", tmp_path) == ["--recipe"]
    assert complete("l4convert convert --recipe fp8", tmp_path) == ["fp8", "fp8-experts"]
    assert complete("l4convert convert --kv-cache s", tmp_path) == ["static"]
    assert complete("l4convert convert --target p", tmp_path) == ["portable"]
    assert complete("l4convert plan --target h1", tmp_path) == ["h100"]
    assert complete("l4convert plan --target c", tmp_path) == ["cpu", "cuda"]


def test_a_closed_pipe_is_silent():
    # More output than a pipe holds (64 KiB), and a reader that goes away before the first byte.
    code = (
        "import click; from l4convert import cli\n"
        "cli.cli.add_command(click.Command('flood', callback=lambda: click.echo('x' * 1_000_000)))\n"
        "raise SystemExit(cli.run(['flood']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_cleans_up_and_has_its_exit_code(number, code):
    script = (
        "import click, sys, time; from l4convert import cli\n"
        "def act():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('cleaned', flush=True)\n"
        "cli.cli.add_command(click.Command('wait', callback=act))\n"
        "sys.argv = ['l4convert', 'wait']\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert out == "cleaned\n"
    assert "Traceback" not in err
    assert process.returncode == code

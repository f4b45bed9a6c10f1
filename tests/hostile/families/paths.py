"""Names and links that lead out of the checkpoint's folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.hostile.bases import sharded
from tests.hostile.case import Damage, Family, cases
from tests.hostile.files import (
    FIRST,
    INDEX,
    NORM,
    SECOND,
    after,
    edit_json,
    folder_instead,
    link,
    outside,
    pipe,
    remove,
)


def named(name: str) -> tuple[Damage, tuple[str, ...]]:
    """The index says that a tensor is in this file."""
    return edit_json(INDEX, lambda index: index["weight_map"].update({NORM: name})), (INDEX, NORM, "plain file name")


def planted(name: str) -> tuple[Damage, tuple[str, ...]]:
    """The same, and the file is there: nothing but its name speaks against it."""
    damage, names = named(name)

    def both(folder: Path) -> None:
        shutil.copy(folder / FIRST, folder.parent / "outside" / "planted.safetensors")
        damage(folder)

    return both, names


def sidecar(name: str) -> tuple[Damage, tuple[str, ...]]:
    return outside(name), (name, "outside of its folder")


def folder_link(folder: Path) -> None:
    """A folder within the checkpoint that leads out, and a shard in it."""
    shutil.copy(folder / FIRST, folder.parent / "outside" / FIRST)
    (folder / "weights").symlink_to("../outside")
    named(f"weights/{FIRST}")[0](folder)


def chain(folder: Path) -> None:
    """A link to a link to a file elsewhere."""
    outside("tokenizer.json")(folder)
    (folder / "tokenizer.json").rename(folder / "second")
    (folder / "tokenizer.json").symlink_to("second")


def snapshots(folder: Path) -> None:
    """A folder named as a cache's, with a file from beside its blobs."""
    place = folder / "snapshots" / "1"
    place.mkdir(parents=True)
    for file in list(folder.iterdir()):
        if file.is_file():
            file.rename(place / file.name)
    (place / "tokenizer.json").unlink()
    (place / "tokenizer.json").symlink_to("../../../outside/secret")


def absolute(name: str) -> Callable[[Path], None]:
    """A link by its absolute path."""
    return lambda folder: link(name, str(folder.parent / "outside" / "secret"))(folder)


FAMILY = Family(
    base=sharded,
    cases=cases(
        {
            "the parent's": planted("../outside/planted.safetensors"),
            "an absolute path": (
                lambda p: named(str(p.parent / "outside" / "secret"))[0](p),
                (INDEX, NORM, "plain file name"),
            ),
            "/etc/passwd": named("/etc/passwd"),
            "/dev/stdin": named("/dev/stdin"),
            "the parent itself": named(".."),
            "the folder itself": named("."),
            "no name": named(""),
            "a dot before": named(f"./{FIRST}"),
            "in a subfolder": named(f"weights/{FIRST}"),
            "there and back": named(f"../input/{FIRST}"),
            "through a folder that is a link": (folder_link, (INDEX, NORM, "plain file name")),
            "backslashes": named(f"..\\outside\\{FIRST}"),
            "a drive": named("C:model.safetensors"),
            "a network share": named("\\\\host\\share\\model.safetensors"),
            "an alternate stream": named(f"{FIRST}:stream"),
            "a URL": named("file:///etc/passwd"),
            "a remote URL": named("http://127.0.0.1:9/model.safetensors"),
            "NUL": named(f"{FIRST}\0.txt"),
            "two lines": named("a\nb.safetensors"),
            "an escape sequence": named("\x1b]0;x\x07"),
            "right to left": named("\u202esrotcafes.ledom"),
            "a megabyte": named("a" * 10**6),
            "longer than a file's name can be": named("\u00e9" * 200 + ".safetensors"),
            "a home folder": named("~/model.safetensors"),
            "procfs": named("/proc/self/environ"),
            **{
                f"{name} from elsewhere": sidecar(name)
                for name in (
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "chat_template.jinja",
                    "chat_template.json",
                    "special_tokens_map.json",
                    "generation_config.json",
                )
            },
            "config.json from elsewhere": sidecar("config.json"),
            "a weight file's name is not UTF-8": (
                lambda p: (
                    [(p / name).unlink() for name in (INDEX, SECOND)] and (p / FIRST).rename(p / "\udcff.safetensors")
                ),
                ("udcff.safetensors", "plain file name"),
            ),
            "the index from elsewhere": sidecar(INDEX),
            "the index is an endless file of procfs": (link(INDEX, "/proc/kmsg"), (INDEX, "outside of its folder")),
            "a shard is an endless file of procfs": (link(SECOND, "/proc/kmsg"), (SECOND,)),
            "the template links to itself": (
                link("chat_template.jinja", "chat_template.jinja"),
                ("chat_template.jinja", "does not exist"),
            ),
            "an absolute link": (absolute("tokenizer.json"), ("tokenizer.json", "outside of its folder")),
            "a chain of links": (chain, ("tokenizer.json", "outside of its folder")),
            "a cache's folder, but not its blobs": (snapshots, ("input",)),
            "config is a pipe": (pipe("config.json"), ("config.json", "not a file")),
            "config is a folder": (folder_instead("config.json"), ("config.json", "not a file")),
            "config is a device": (link("config.json", "/dev/zero"), ("config.json", "not a file")),
            "config is the terminal": (link("config.json", "/dev/tty"), ("config.json",)),
            "config links to itself": (link("config.json", "config.json"), ("config.json",)),
            "config links to nothing": (link("config.json", "gone"), ("config.json", "does not exist")),
            "the index is a device": (link(INDEX, "/dev/zero"), (INDEX, "not a file")),
            "the index is a pipe": (pipe(INDEX), (INDEX, "not a file")),
            "a shard is a pipe": (pipe(SECOND), (SECOND, "absent")),
            "a socket for a shard": (
                after(remove(SECOND), lambda p: os.mknod(p / SECOND, 0o140644)),
                (SECOND, "absent"),
            ),
            "the template is a pipe": (pipe("chat_template.jinja"), ("chat_template.jinja",)),
            "the tokenizer is a folder": (folder_instead("tokenizer.json"), ("tokenizer.json",)),
        }
    ),
)

"""What the compiler makes of the attention loops: tensor cores that are not held up, and few instructions a byte."""

from __future__ import annotations

from collections import Counter

import pytest

from l4convert.plugins.library.compile import compile_all, jobs_of
from l4convert.plugins.long_context_attention.variants import variants
from tests.plugins.sass import CUBINS, inner_loop

# Bytes of memory a clock of one H100 multiprocessor: 3.35 TB/s, 132 of them, 1.755 GHz.
BYTES_A_CLOCK = 3.35e12 / 132 / 1.755e9
TILE = 64  # keys of a turn of decode's loop


def loop_of(name: str, sm: int = 90) -> Counter[str]:
    """Instructions of a warp in one turn."""
    chosen = [variant for variant in variants() if variant.name == name]
    return inner_loop(compile_all(jobs_of({"long_context_attention": chosen}, [sm]), CUBINS, 1)[0])


def count(loop: Counter[str], *names: str) -> int:
    """Of the instructions that begin so."""
    return sum(number for name, number in loop.items() if name.startswith(names))


# Measured 0.14, 0.44 and 0.56 of the clocks in which the memory brings the bytes of a turn.
@pytest.mark.parametrize(("kv_dtype", "bound"), [("none", 0.2), ("fp8", 0.5), ("int8", 0.6)])
def test_decode_issues_its_instructions_while_the_bytes_arrive(kv_dtype, bound):
    loop = loop_of(f"attention_decode_bf16_{kv_dtype}_d128")
    nbytes = TILE * 128 * 2 * (2 if kv_dtype == "none" else 1)
    assert loop.total() <= bound * nbytes / BYTES_A_CLOCK  # each of four schedulers has one of a block's four warps
    # Copies to shared memory are asynchronous, and all of them of 16 bytes: 128 threads.
    copies = [name for name in loop if name.startswith("LDGSTS")]
    assert all(name.endswith(".128") for name in copies)
    assert count(loop, "LDGSTS") == nbytes / 16 / 128
    assert not count(loop, "LDG.", "LDL", "STL", "LDS.U8")
    # Values reach the tensor cores turned, by the instruction that does so, whatever their size.
    assert count(loop, "LDSM.16.MT88")


@pytest.mark.parametrize("kv_dtype", ["none", "fp8", "int8"])
def test_prefill_keeps_the_tensor_cores_going(kv_dtype):
    """128 queries, 128 keys: a warpgroup's 64 rows are 8 products of 64 x 128 x 16 for the scores, 8 for the values.

    Where the compiler cannot overlap them with anything it puts a WARPGROUP.ARRIVE before every single one.
    """
    loop = loop_of(f"attention_prefill_bf16_{kv_dtype}_d128")
    assert count(loop, "HGMMA") == 16
    assert count(loop, "WARPGROUP.ARRIVE") == 2
    assert not count(loop, "LDL", "STL", "HMMA")
    assert loop.total() <= {"none": 920, "fp8": 940, "int8": 1270}[kv_dtype]  # measured 885, 900 and 1230

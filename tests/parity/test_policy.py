from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from l4convert.errors import InputError
from l4convert.parity.metrics import Metrics
from l4convert.parity.policy import ELEMENTWISE, Thresholds, default_policy, load_policy, parse_policy
from l4convert.quantization.kv import KvDtype, KvScheme

GOOD = Metrics(
    tokens=3000, scored=2997, non_finite=0, non_finite_reference=0, max_abs_logit=0.0, max_rel_logit=0.0, mean_kl=0.0,
    p50_kl=0.0, p99_kl=0.0, max_kl=0.0, top1=1.0, ppl_reference=13.0, ppl_artifact=13.0,
)  # fmt: skip
HEAD = 'schema = "l4convert.policy/1"\n'


@pytest.mark.parametrize("recipe", ["none", "int4", "fp8", "fp8-experts"])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_every_bundled_recipe_has_a_policy_that_equality_passes_and_a_wrong_layer_does_not(
    recipe: str, target: str
) -> None:
    policy = default_policy(recipe, (), target)
    assert not policy.reference.broken_by(GOOD)
    assert not policy.drift.broken_by(GOOD)
    wrong = dataclasses.replace(GOOD, mean_kl=0.5, p99_kl=3.0, top1=0.7, ppl_artifact=20.0, max_rel_logit=0.5)
    assert len(policy.reference.broken_by(wrong)) >= 4
    assert policy.drift.broken_by(wrong)


@pytest.mark.parametrize(
    ("schemes", "expected"),
    [({"none", "fp8", "int4"}, "int4"), ({"none", "fp8"}, "fp8"), ({"none"}, "none"), ((), "none")],
)
def test_a_recipe_of_ones_own_is_held_to_the_policy_of_its_coarsest_scheme(schemes: set[str], expected: str) -> None:
    assert default_policy("mine", schemes, "cpu") == default_policy(expected, (), "cpu")


@pytest.mark.parametrize(
    ("limit", "value", "metric", "holds"),
    [
        ("mean_kl", 0.1, {"mean_kl": 0.1}, True),
        ("mean_kl", 0.1, {"mean_kl": 0.10001}, False),
        ("p99_kl", 0.1, {"p99_kl": 0.2}, False),
        ("max_kl", 0.1, {"max_kl": 0.2}, False),
        ("max_abs_logit", 0.1, {"max_abs_logit": 0.2}, False),
        ("max_rel_logit", 0.1, {"max_rel_logit": 0.2}, False),
        ("min_top1", 0.9, {"top1": 0.9}, True),
        ("min_top1", 0.9, {"top1": 0.89}, False),
        ("max_ppl_ratio", 1.1, {"ppl_artifact": 14.2}, True),
        ("max_ppl_ratio", 1.1, {"ppl_artifact": 14.4}, False),
        ("min_tokens", 3001, {}, False),
    ],
)
def test_limits_are_inclusive_and_on_the_right_side(
    limit: str, value: float, metric: dict[str, float], holds: bool
) -> None:
    broken = Thresholds(**{limit: value}).broken_by(dataclasses.replace(GOOD, **metric))
    assert bool(broken) is not holds


@pytest.mark.parametrize("limit", ["mean_kl", "min_top1", "max_ppl_ratio", "max_rel_logit"])
def test_nan_holds_no_limit(limit: str) -> None:
    nan = float("nan")
    metrics = dataclasses.replace(GOOD, mean_kl=nan, top1=nan, ppl_artifact=nan, max_rel_logit=nan)
    assert Thresholds(**{limit: 1.0}).broken_by(metrics)


def test_only_some_limits_can_be_looked_at() -> None:
    thresholds = Thresholds(mean_kl=0.1, max_rel_logit=0.1)
    broken = thresholds.broken_by(dataclasses.replace(GOOD, mean_kl=1.0, max_rel_logit=1.0), only=ELEMENTWISE)
    assert [line.split()[0] for line in broken] == ["max_rel_logit"]


def test_a_target_overrides_only_what_it_names() -> None:
    content = HEAD + "[reference]\nmean_kl = 0.1\nmin_top1 = 0.9\n[target.cpu.reference]\nmean_kl = 0.2\n"
    base = parse_policy(content, "portable", name="p", where="p")
    cpu = parse_policy(content, "cpu", name="p", where="p")
    assert (base.reference.mean_kl, base.reference.min_top1) == (0.1, 0.9)
    assert (cpu.reference.mean_kl, cpu.reference.min_top1) == (0.2, 0.9)


COMPUTE = (
    HEAD
    + "[reference]\nmean_kl = 0.1\nmin_top1 = 0.9\np99_kl = 1\n[drift]\nmax_rel_logit = 0.01\n"
    + "[target.tensorrt-rtx.reference]\nmean_kl = 0.3\n"  # before the tables that it has precedence over
    + "[compute.bfloat16.reference]\nmean_kl = 0.2\nmin_top1 = 0.8\n[compute.bfloat16.drift]\nmax_rel_logit = 0.5\n"
)


@pytest.mark.parametrize(
    ("target", "compute", "expected"),
    [
        ("cpu", "float32", (0.1, 0.9, 1, 0.01)),
        ("cpu", "float16", (0.1, 0.9, 1, 0.01)),  # another type has no tables here
        ("cpu", "bfloat16", (0.2, 0.8, 1, 0.5)),
        ("tensorrt-rtx", "float32", (0.3, 0.9, 1, 0.01)),
        ("tensorrt-rtx", "bfloat16", (0.3, 0.8, 1, 0.5)),  # the target's word is the last
    ],
)
def test_a_compute_type_overrides_and_a_target_overrides_that(
    target: str, compute: str, expected: tuple[float, ...], tmp_path: Path
) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(COMPUTE)
    policy = load_policy(file, target, compute)
    reference = policy.reference
    assert (reference.mean_kl, reference.min_top1, reference.p99_kl, policy.drift.max_rel_logit) == expected


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("recipe", ["none", "int4", "fp8", "fp8-experts"])
def test_16_bits_have_limits_of_their_own_that_a_wrong_layer_breaks(recipe: str, compute: str) -> None:
    exact = default_policy(recipe, (), "tensorrt-rtx")
    policy = default_policy(recipe, (), "tensorrt-rtx", compute)
    assert policy != exact
    assert not policy.reference.broken_by(GOOD)
    assert not policy.drift.broken_by(GOOD)
    for name in ("mean_kl", "max_rel_logit"):  # never stricter than float32
        for one, other in ((policy.reference, exact.reference), (policy.drift, exact.drift)):
            assert (getattr(one, name) or 0) >= (getattr(other, name) or 0)
    wrong = dataclasses.replace(GOOD, mean_kl=0.5, p99_kl=3.0, top1=0.7, ppl_artifact=20.0, max_rel_logit=1.5)
    assert len(policy.reference.broken_by(wrong)) >= 3
    assert policy.drift.broken_by(wrong)


CACHES = (
    HEAD
    + "[target.cpu.reference]\nmin_top1 = 0.5\n[kv.int4-head.reference]\np99_kl = 3\n[kv.int4.reference]\np99_kl = 2\n"
    + "mean_kl = 0.4\n[compute.bfloat16.reference]\nmean_kl = 0.2\n[reference]\nmean_kl = 0.1\np99_kl = 1\n"
)


@pytest.mark.parametrize(
    ("kv", "expected"),
    [
        (None, (0.2, 1, 0.5)),
        (KvScheme("fp8"), (0.2, 1, 0.5)),
        (KvScheme("int4", "channel"), (0.4, 2, 0.5)),
        (KvScheme("int4", "head", "global"), (0.4, 3, 0.5)),
    ],
)
def test_quantized_caches_override_between_the_two(kv: KvScheme | None, expected: tuple[float, ...]) -> None:
    reference = parse_policy(CACHES, "cpu", "bfloat16", kv, name="p", where="p").reference
    assert (reference.mean_kl, reference.p99_kl, reference.min_top1) == expected


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("recipe", ["none", "int4", "fp8", "fp8-experts"])
def test_quantized_caches_have_limits_that_are_never_stricter(recipe: str, dtype: KvDtype) -> None:
    for compute in ("float32", "bfloat16", "float16"):
        plain = default_policy(recipe, (), "portable", compute)
        policy = default_policy(recipe, (), "portable", compute, KvScheme(dtype))
        assert policy != plain or compute != "float32"
        assert (policy.reference.mean_kl or 0) >= (plain.reference.mean_kl or 0)
        assert (policy.reference.min_top1 or 0) <= (plain.reference.min_top1 or 0)
        assert (policy.drift.mean_kl or 0) >= (plain.drift.mean_kl or 0)
        wrong = dataclasses.replace(GOOD, mean_kl=0.5, p99_kl=3.0, top1=0.7, ppl_artifact=20.0, max_rel_logit=1.5)
        assert len(policy.reference.broken_by(wrong)) >= 3
        assert policy.drift.broken_by(wrong)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "schema"),
        (HEAD + "[reference]\nmean_kl = 1\n[kv]\nint8 = 1", r"\[kv\.NAME\.reference\]"),
        ('schema = "l4convert.policy/2"\n[reference]\nmean_kl = 1', "schema"),
        ("[reference", "not a TOML file"),
        (HEAD, "limits nothing"),
        (HEAD + "[reference]\n", "limits nothing"),
        (HEAD + "mean_kl = 1", "unknown table or key 'mean_kl'"),
        (HEAD + "reference = 1", "not a table"),
        (HEAD + "[reference]\nmean_ki = 1", "unknown limit 'mean_ki'"),
        (HEAD + "[reference]\nmean_kl = '1'", "mean_kl is '1'"),
        (HEAD + "[reference]\nmean_kl = true", "mean_kl is True"),
        (HEAD + "[reference]\nmean_kl = nan", "mean_kl is nan"),
        (HEAD + "[reference]\nmean_kl = inf", "mean_kl is inf"),
        (HEAD + "[reference]\nmean_kl = -1", "mean_kl is -1"),
        (HEAD + "[reference]\nmean_kl = 1" + "0" * 400, "mean_kl is 10"),
        (HEAD + "[reference]\nmean_kl = 1\n[target]\ncpu = 1", r"\[target\.NAME\.reference\]"),
        (HEAD + "[reference]\nmean_kl = 1\n[compute]\nbfloat16 = 1", r"\[compute\.NAME\.reference\]"),
        (HEAD + "compute = 1\n[reference]\nmean_kl = 1", r"\[compute\.NAME\.reference\]"),
        (HEAD + "[reference]\nmean_kl = 1\n[compute.float64.reference]\nmean_ki = 1", "unknown limit 'mean_ki'"),
        (HEAD + "[reference]\nmean_kl = 1\n[compute.float16]\nmean_kl = 1", "unknown table or key 'mean_kl'"),
        (HEAD + "[compute.bfloat16.reference]\nmean_kl = 1", "limits nothing"),
        (HEAD + "[reference]\nmean_kl = 1\n[target.tpu.reference]\nmean_ki = 1", "unknown limit 'mean_ki'"),
    ],
)
def test_policies_are_read_strictly(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        load_policy(file, "cpu")
    assert str(file) in caught.value.message


def test_an_absent_policy_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_policy(tmp_path / "absent.toml", "cpu")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a TOML file"):
        load_policy(tmp_path / "binary.toml", "cpu")

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l4convert.errors import InputError, UsageError
from l4convert.quantization.kv import KvScheme
from l4convert.quantization.recipe import Recipe, Rule, Scheme, bundled_recipes, load_recipe, parse_recipe, unused_rules

LAYER = "model.layers.3."
STACKED = (LAYER + "feed_forward.experts.gate_up_proj", LAYER + "feed_forward.experts.down_proj")
UNFUSED = tuple(f"{LAYER}feed_forward.experts.7.{name}_proj.weight" for name in ("gate", "up", "down"))
LINEARS = (
    *(f"{LAYER}self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"{LAYER}feed_forward.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"{LAYER}feed_forward.{name}_proj.weight" for name in ("gate", "up", "down")),
)
HIGH = (
    "model.embed_tokens.weight",
    "lm_head.weight",
    "model.norm.weight",
    LAYER + "input_layernorm.weight",
    LAYER + "post_attention_layernorm.weight",
    LAYER + "feed_forward.router.weight",
)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "quantized", "scheme"),
    [
        ("int4", STACKED + UNFUSED + LINEARS, Scheme("int4", 32, "lse")),
        ("fp8", STACKED + UNFUSED + LINEARS, Scheme("fp8", activations=True)),
        ("fp8-experts", STACKED + UNFUSED, Scheme("fp8", activations=True)),
        ("none", (), Scheme("none")),
    ],
)
def test_bundled(name: str, quantized: tuple[str, ...], scheme: Scheme) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for tensor in STACKED + UNFUSED + LINEARS + HIGH:
        assert recipe.scheme_for(tensor) == (scheme if tensor in quantized else Scheme("none")), tensor
    for experts in (STACKED, UNFUSED):
        assert unused_rules(recipe, experts + LINEARS[:4] + HIGH) == ()


def test_bundled_names() -> None:
    assert bundled_recipes() == ("fp8", "fp8-experts", "int4", "keep", "none")


def test_first_match_wins_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    text = """
        name = "mine"
        [[rule]]
        pattern = "*.self_attn.v_proj.weight"
        scheme = "none"
        [[rule]]
        pattern = "*.self_attn.[kv]_proj.weight"
        scheme = "int4"
        block_size = 128
        scale = "absmax"
        [[rule]]
        pattern = "*.feed_forward.*"
        scheme = "fp8"
    """
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.scheme_for(LAYER + "self_attn.v_proj.weight") == Scheme("none")
    assert recipe.scheme_for(LAYER + "self_attn.k_proj.weight") == Scheme("int4", 128, "absmax")
    assert recipe.scheme_for(LAYER + "self_attn.q_proj.weight") == Scheme("none")
    assert recipe.scheme_for(STACKED[0]) == Scheme("fp8", activations=False)


@pytest.mark.parametrize("name", ["int4", "fp8", "fp8-experts", "none"])
def test_dict_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    data = json.loads(json.dumps(recipe.to_dict()))
    assert parse_recipe(data, "manifest") == recipe
    assert list(data) == ["name", "description", "rule"]


def test_dict_says_every_option() -> None:
    assert load_recipe("int4", 64).to_dict()["rule"][0] == {
        "pattern": "model.layers.*.feed_forward.experts.*",
        "scheme": "int4",
        "block_size": 64,
        "scale": "lse",
    }


@pytest.mark.parametrize(
    ("table", "scheme"),
    [
        ('dtype = "fp8"', KvScheme("fp8", "head", "all")),
        ('dtype = "int8"', KvScheme("int8", "channel", "all")),
        ('dtype = "int4"\nlayers = "global"', KvScheme("int4", "channel", "global")),
        ('dtype = "fp8"\ngranularity = "channel"', KvScheme("fp8", "channel", "all")),
    ],
)
def test_kv_cache_table(tmp_path: Path, table: str, scheme: KvScheme) -> None:
    recipe = load_recipe(write(tmp_path, f'name = "mine"\n[kv_cache]\n{table}'))
    assert recipe == Recipe("mine", (), "", scheme)
    assert parse_recipe(json.loads(json.dumps(recipe.to_dict())), "manifest") == recipe


def test_bundled_recipes_leave_caches_alone() -> None:
    assert {load_recipe(name).kv_cache for name in bundled_recipes()} == {None}


def test_block_size_replaces_that_of_every_int4_rule() -> None:
    recipe = load_recipe("int4", block_size=128)
    assert {rule.scheme for rule in recipe.rules} == {Scheme("int4", 128, "lse")}


@pytest.mark.parametrize(("name", "block_size"), [("fp8", 32), ("none", 32), ("int4", 16)])
def test_block_size_that_makes_no_sense(name: str, block_size: int) -> None:
    with pytest.raises(UsageError):
        load_recipe(name, block_size)


def test_unused_rules(tmp_path: Path) -> None:
    text = """
        name = "mine"
        [[rule]]
        pattern = "*_proj*"
        scheme = "fp8"
        [[rule]]
        pattern = "*.q_proj.weight"
        scheme = "int4"
        [[rule]]
        pattern = "*.Router.*"
        scheme = "none"
    """
    unused = unused_rules(load_recipe(write(tmp_path, text)), STACKED + LINEARS + HIGH)
    assert unused == (Rule("*.q_proj.weight", Scheme("int4")), Rule("*.Router.*", Scheme("none")))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no recipe 'int5'; there are fp8, fp8-experts, int4, keep, none"):
        load_recipe("int5")


RULE = '\n[[rule]]\npattern = "*"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "not a TOML file"),
        ("name = " + "9" * 5000, "not a TOML file"),
        ("name = " + "{a = " * 10_000, "nested too deeply"),
        ('name = "a"\n[[rule]]\npattern = "' + "*a" * 600 + '"\nscheme = "none"', "rule 1: a pattern of 1,200"),
        ("a." * 30_000 + "b = 1", "more than 200 dots"),
        ("# " + "x" * (1 << 20), "more than the 1,048,576 bytes"),
        ("", "no 'name'"),
        ('name = ""', "'name' must be a text"),
        ("name = 3", "'name' must be a text"),
        ('name = "a"\ndescription = 3', "'description' must be a text"),
        ('name = "a"\n[[rules]]\npattern = "*"', "unknown key 'rules'"),
        ('name = "a"\n[rule]\npattern = "*"', "'rule' must be a list"),
        ('name = "a"\nrule = [1]', "'rule' must be a list"),
        ('name = "a"\n[[rule]]\nscheme = "int4"', "rule 1: no 'pattern'"),
        ('name = "a"' + RULE, "rule 1: no 'scheme'"),
        ('name = "a"' + RULE + 'scheme = "none"' + RULE + 'scheme = "int8"', "rule 2: unknown scheme 'int8'"),
        ('name = "a"' + RULE + 'scheme = "int4"\nblock = 32', "rule 1: unknown key 'block'"),
        ('name = "a"' + RULE + 'scheme = "fp8"\nblock_size = 32', "rule 1: unknown key 'block_size'"),
        ('name = "a"' + RULE + 'scheme = "int4"\nblock_size = 48', "rule 1: block_size = 48 is not possible"),
        ('name = "a"' + RULE + 'scheme = "int4"\nblock_size = 32.0', "rule 1: block_size = 32.0 is not possible"),
        ('name = "a"' + RULE + 'scheme = "int4"\nscale = true', "rule 1: scale = True is not possible"),
        ('name = "a"' + RULE + 'scheme = "fp8"\nactivations = true', "rule 1: activations = True is not possible"),
        ('name = "a"\nkv_cache = "fp8"', "kv_cache must be a table"),
        ('name = "a"\n[kv_cache]\nlayers = "all"', "kv_cache: no 'dtype'"),
        (
            'name = "a"\n[kv_cache]\ndtype = "fp16"',
            "kv_cache: dtype 'fp16' is not possible; it is one of fp8, int8, int4",
        ),
        ('name = "a"\n[kv_cache]\ndtype = "fp8"\nlayers = "some"', "kv_cache: layers 'some' is not possible"),
        ('name = "a"\n[kv_cache]\ndtype = "fp8"\nlayers = 3', "kv_cache: 'layers' must be a text"),
        ('name = "a"\n[kv_cache]\ndtype = "fp8"\ngranularity = "token"', "kv_cache: granularity 'token'"),
        ('name = "a"\n[kv_cache]\ndtype = "fp8"\nscale = 1', "kv_cache: unknown key 'scale'"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, text))
    assert "mine.toml: " in caught.value.message
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml: cannot be read"):
        load_recipe(str(tmp_path / "absent.toml"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"binary\.toml: not a TOML file"):
        load_recipe(str(binary))

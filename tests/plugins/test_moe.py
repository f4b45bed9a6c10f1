"""The MoE kernels, through the library, against what ONNX Runtime makes of the op's definition."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from l4convert.errors import DeviceError
from l4convert.plugins.moe.layout import GROUP, K_ORDER
from tests.plugins.moe import BF16, E4M3, FP16, Call, Weights, make_case, pack, relative_error

# FP8: the definition rounds dequantized numbers to the compute type, which is an error of its own (the kernels multiply
# codes), and a hidden value that falls on the other side of the middle between two codes is off by a sixteenth.
# test_fp8_without_the_definitions_own_rounding holds to 1e-2.
BOUND = {"int4": 1e-2, "plain": 1e-2, "fp8": 3e-2}


def classes(gpu):
    """The tile classes of the products that were launched."""
    names = [launch.kernel.name for launch in gpu.launches]
    return {int(name.rsplit("_m", 1)[1]) for name in names if name.startswith("moe_gate_up")}


@pytest.mark.parametrize(
    ("weights", "tokens", "experts", "hidden", "width", "top_k", "blocks", "compute"),
    [
        ("int4", 1, 4, 64, 64, 1, (32, 32), BF16),
        ("int4", 5, 3, 128, 192, 2, (64, 64), FP16),
        ("int4", 4, 16, 192, 128, 1, (32, 128), BF16),
        ("int4", 23, 2, 128, 64, 1, (128, 64), BF16),
        ("int4", 65, 3, 64, 128, 1, (64, 64), BF16),
        ("int4", 1, 2, 1152, 64, 1, (128, 64), BF16),  # K and rows take several turns of their loops
        ("fp8", 1, 2, 64, 1088, 1, (0, 0), BF16),
        ("fp8", 7, 6, 128, 64, 1, (0, 0), BF16),
        ("fp8", 18, 2, 64, 192, 2, (0, 0), FP16),
        ("plain", 9, 16, 64, 128, 2, (0, 0), BF16),
        ("plain", 18, 2, 192, 64, 1, (0, 0), FP16),
    ],
)
def test_the_kernels_equal_the_definition(gpu, weights, tokens, experts, hidden, width, top_k, blocks, compute):
    case = make_case(weights, tokens, experts, hidden, width, top_k, blocks, compute)
    assert relative_error(Call.of(gpu, case).run(), case.expected) <= BOUND[weights]


@pytest.mark.parametrize(("weights", "sm"), [("int4", 90), ("int4", 89), ("fp8", 90), ("plain", 80)])
def test_many_tokens_go_through_full_tiles_and_what_is_left_of_them(make_gpu, weights, sm):
    gpu = make_gpu(sm=sm)
    case = make_case(weights, 150, 1, 64, 64)
    assert relative_error(Call.of(gpu, case).run(), case.expected) <= BOUND[weights]
    # On SM 8.9 the two larger INT4 classes are one.
    assert classes(gpu) == {"int4": {64, 128} if sm == 90 else {8, 64}}.get(weights, {16, 128})
    assert [launch.kernel.name for launch in gpu.launches][:2] == ["moe_choose", "moe_scan"]


@pytest.mark.parametrize("chosen", ["one", "different"])
def test_all_tokens_choose_one_expert_or_each_its_own(gpu, chosen):
    case = make_case("int4", 9, 10, 64, 64)
    logits = np.full((9, 10), -3, np.float32)
    logits[np.arange(9), 4 if chosen == "one" else np.arange(9)[::-1]] = 0.3
    case = replace(case, logits=logits)
    assert relative_error(Call.of(gpu, case).run(), case.expected) <= 1e-2


def test_first_rows_and_tiles_of_very_many_tokens(gpu):
    """The scan by itself, over more blocks of tokens than it takes at once."""
    blocks, tile, slots = 70, 128, 400
    counts = np.random.default_rng(0).integers(0, 9, (blocks, 128)).astype(np.int32)
    counts[:, 5], counts[:, 9] = 0, 64
    first, tiles = gpu.upload(counts), gpu.empty((slots, 4), np.int32)
    gpu.launch("moe_scan", (1, 1, 1), [("p", first), ("p", tiles), ("i", blocks), ("i", slots), ("i", tile)])
    total = counts.sum(axis=0)
    begin = np.concatenate([[0], np.cumsum(total)[:-1]])
    np.testing.assert_array_equal(first.numpy(), begin + np.cumsum(counts, axis=0) - counts)
    expected = [
        (expert, begin[expert] + done, min(total[expert] - done, tile))
        for expert in range(128)
        for done in range(0, total[expert], tile)
    ]
    assert [tuple(row) for row in tiles.numpy()[: len(expected), :3].tolist()] == expected
    assert not tiles.numpy()[len(expected) :, 2].any()


@pytest.mark.parametrize("tokens", [6, 66], ids=["at once", "in steps"])
def test_of_equal_scores_the_first_experts_are_chosen(gpu, tokens):
    case = make_case("int4", tokens, 6, 64, 64, top_k=2)
    logits = np.random.default_rng(1).integers(-1, 2, (tokens, 6)).astype(np.float32)
    logits[0], logits[1] = -0.0, 0.0
    logits[0, 3] = 0.0  # equals -0.0
    case = replace(case, logits=logits)
    assert relative_error(Call.of(gpu, case).run(), case.expected) <= 1e-2


@pytest.mark.parametrize("top_k", [1, 3])
def test_logits_that_are_not_numbers_harm_their_own_token_only(gpu, top_k):
    case = make_case("int4", 3, 3, 64, 64, top_k)
    expected = case.expected
    logits = case.logits.copy()
    logits[1] = [np.nan, -np.inf, np.uint32(0xFFFFFFFF).view(np.float32)]
    actual = Call.of(gpu, replace(case, logits=logits)).run()
    assert np.isnan(actual[1]).all()
    assert relative_error(actual[[0, 2]], expected[[0, 2]]) <= 1e-2


def test_an_input_that_is_no_number_is_not_made_one_by_fp8(gpu):
    case = make_case("fp8", 3, 3, 64, 64)
    x = case.x.copy()
    x[1, 5] = np.nan
    actual = Call.of(gpu, replace(case, x=x)).run()
    assert np.isnan(actual[1]).all()
    assert np.isfinite(actual[[0, 2]]).all()


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (8, 1), (20, 2)])
def test_each_chosen_expert_is_read_once_and_no_other_at_all(gpu, tokens, top_k):
    case = make_case("int4", tokens, 10, 128, 64, top_k)
    logits = case.logits.copy()
    logits[:, 7:] -= 9  # three experts that nobody chooses
    call = Call.of(gpu, replace(case, logits=logits))
    call.run()
    chosen = set(np.argsort(-logits, axis=1)[:, :top_k].ravel().tolist())
    expected = [int(expert in chosen) for expert in range(10)]
    assert 0 in expected
    for name in ("gate_up", "down"):
        loads = call.buffers[name].loads.reshape(10, -1)
        assert loads.min(axis=1).tolist() == expected
        assert loads.max(axis=1).tolist() == expected


def test_many_tokens_leave_experts_alone_that_nobody_chose(gpu):
    case = make_case("int4", 66, 5, 64, 64)
    logits = case.logits.copy()
    logits[:, [1, 4]] -= 9
    case = replace(case, logits=logits)
    call = Call.of(gpu, case)
    assert relative_error(call.run(), case.expected) <= 1e-2
    assert [bool(row.any()) for row in call.buffers["down"].loads.reshape(5, -1)] == [True, False, True, True, False]


def test_what_unchosen_experts_hold_does_not_matter(gpu):
    case = make_case("int4", 3, 4, 64, 64)
    logits = case.logits.copy()
    logits[:, 2] -= 9
    scale = case.gate_up.scale.copy()
    scale[2] = np.nan
    case = replace(case, logits=logits)
    broken = replace(case, gate_up=replace(case.gate_up, scale=scale))
    np.testing.assert_array_equal(Call.of(gpu, broken).run(), Call.of(gpu, case).run())


@pytest.mark.parametrize("compute", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("tile", ["m8", "m64"])
def test_dequantization_is_exact(gpu, compute, block, tile):
    """Rows that are one 1 among zeros give the dequantized weights themselves."""
    depth, columns = 128, 64
    random = np.random.default_rng(block)
    codes = np.tile(np.arange(-8, 8, dtype=np.int8), depth * columns // 16).reshape(1, depth, columns)
    codes = random.permuted(codes, axis=1)
    scale = (random.uniform(0.5, 2, (1, depth // block, columns)) * 2.0 ** random.integers(-12, 6)).astype(compute)
    rows = {"m8": 8, "m64": 64}[tile]
    one_hot = np.eye(depth, dtype=compute)
    slots = [(0, first, rows, 0) for first in range(0, depth, rows)]
    tiles, targets = np.array(slots, np.int32), np.arange(depth, dtype=np.int32)
    y = gpu.empty((depth, columns), compute)
    pointers = [gpu.upload(tiles), gpu.upload(one_hot), None, gpu.upload(Weights(codes, scale, block).packed)]
    pointers += [gpu.upload(scale), y, gpu.upload(targets)]
    name = f"moe_down_int4_{'bf16' if compute == BF16 else 'fp16'}_{tile}"
    numbers = [len(slots), depth, columns, block.bit_length() - 1, 0, rows]
    gpu.launch(name, (2 * len(slots), 1, 1), [("p", p) for p in pointers] + [("i", n) for n in numbers])
    # DequantizeLinear: the product, rounded once.
    expected = codes[0].astype(np.float32) * np.repeat(scale[0].astype(np.float32), block, axis=0)
    np.testing.assert_array_equal(y.numpy().view(np.int16), (expected + 0.0).astype(compute).view(np.int16))


@pytest.mark.parametrize("weights", ["int4", "fp8", "plain"])
@pytest.mark.parametrize("product", ["gate_up", "down"])
def test_stacks_and_rows_beyond_two_to_the_31(gpu, weights, product):
    """Expert 2^23 and row 2^26, with pointers so far in front of the buffers that the same numbers are read."""
    case = make_case(weights, 8, 1, 64, 64)
    given = case.gate_up if product == "gate_up" else case.down
    rows = case.x.astype(E4M3) if weights == "fp8" else case.x
    columns = given.stored.shape[2]
    result = []
    for expert, first in ((0, 0), (2**23, 2**26)):
        y = gpu.empty((8, 64), BF16)
        scale = np.zeros((1, 1, 8), BF16) if given.scale is None else given.scale
        buffers = [rows, np.ones(8, np.float32), given.packed, scale]
        inputs, row_scale, weight, weight_scale = (gpu.upload(array) for array in buffers)
        per_expert = 64 * columns * {"int4": 0.5, "fp8": 1, "plain": 2}[weights]
        targets = gpu.upload(np.arange(8, dtype=np.int32))
        far = first * 64 * 2 if product == "gate_up" else 0  # the first product keeps the order of rows
        pointers = [
            gpu.upload(np.array([[expert, first, 8, 0]], np.int32)).address,
            inputs.address - first * 64 * rows.itemsize,
            row_scale.address - first * 4,
            weight.address - expert * int(per_expert),
            weight_scale.address - expert * scale.nbytes,
            y.address - far,
            targets.address - first * 4,
        ]
        name = f"moe_{product}_{weights}_bf16_m{8 if weights == 'int4' else 16}"
        numbers = [1, 64, 64, 5, 0, 8]
        arguments = [("p", p) for p in pointers] + [("i", n) for n in numbers]
        grid = (1 if weights == "plain" else 2, 1, 1)  # 64 or 32 columns a block
        gpu.call(lambda name=name, grid=grid, arguments=arguments: gpu.library.launch(name, grid, arguments))
        result.append(y.numpy())
    assert np.isfinite(result[0].astype(np.float32)).all()
    np.testing.assert_array_equal(result[0].view(np.int16), result[1].view(np.int16))


def test_fp8_without_the_definitions_own_rounding(gpu):
    """With scales that are powers of two nothing but the codes is rounded, in the definition too."""
    random = np.random.default_rng(3)
    case = make_case("fp8", 6, 3, 128, 64)
    x = random.integers(-15, 16, (6, 128)).astype(np.float32)
    x[:, 5] = 14 * 2.0 ** random.integers(-3, 4, 6)  # absmax / 448 is a power of two once the score is 1/2
    x = np.clip(x, -np.abs(x[:, 5:6]), np.abs(x[:, 5:6])).astype(BF16)
    logits = np.full((6, 3), -1, np.float32)
    logits[np.arange(6), random.integers(0, 3, 6)] = 0  # sigmoid(0) = 1/2
    gate_up = replace(case.gate_up, scale=np.full((1, 1, 1), 2.0**-8).astype(BF16) * np.ones((3, 1, 128), BF16))
    down = replace(case.down, scale=np.full((3, 1, 128), 2.0**-8).astype(BF16))
    case = replace(case, x=x, logits=logits, gate_up=gate_up, down=down)
    assert relative_error(Call.of(gpu, case).run(), case.expected) <= 1e-2


def test_blocks_may_run_in_any_order(make_gpu):
    case = make_case("int4", 66, 2, 64, 64)
    first, second = (Call.of(make_gpu(seed=seed), case).run() for seed in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_no_tokens_launch_nothing(gpu):
    case = make_case("int4", 1, 2, 64, 64)
    gpu.moe(case.struct, 0, **Call.of(gpu, case).buffers)
    assert gpu.launches == []


def test_the_bound_tells_wrong_layouts_apart(gpu):
    """Weights that were packed in another order, or with gate and up exchanged, are far outside of the bound."""
    case = make_case("int4", 3, 2, 64, 64)
    half = case.gate_up.stored.shape[2] // 2
    exchanged = Weights(np.roll(case.gate_up.stored, half, axis=2), np.roll(case.gate_up.scale, half, axis=2), 32)
    reordered = replace(case.gate_up, stored=case.gate_up.stored[:, np.argsort(K_ORDER)])
    for wrong in (exchanged, reordered):
        assert relative_error(Call.of(gpu, replace(case, gate_up=wrong)).run(), case.expected) > 0.1


def test_the_layout_is_a_permutation_and_packs_as_it_says():
    assert sorted(K_ORDER) == list(range(GROUP))
    codes = np.random.default_rng(0).integers(-8, 8, (3, 2 * GROUP), np.int8)
    nibbles = pack(codes).view(np.uint8)[..., None] >> np.array([0, 4], np.uint8) & 15
    slots = nibbles.reshape(3, 2, GROUP).astype(ml_dtypes.uint4).astype(np.int8)
    np.testing.assert_array_equal(slots, codes.reshape(3, 2, GROUP)[..., list(K_ORDER)] & 15)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"compute": 2}, "the kernels compute in bfloat16 or float16"),
        ({"weights": 3}, "weights are 16 bits, INT4 or FP8"),
        ({"num_experts": 129}, "num_experts is 129; the kernels take 1 to 128"),
        ({"top_k": 0}, "top_k is 0 of 4 experts"),
        ({"top_k": 5}, "top_k is 5 of 4 experts"),
        ({"gate_up_block": 16}, "gate_up_block is 16; the kernels take 32, 64 and 128"),
        ({"down_block": 256}, "down_block is 256; the kernels take 32, 64 and 128"),
        ({"weights": 2}, "gate_up_block is 32, but only INT4 weights have scales for blocks"),
        ({"weights": 2, "gate_up_block": 0, "down_block": 2**31 - 1}, "down_block is 2147483647, but only INT4"),
        ({"hidden_size": 96}, "hidden_size is 96; the kernels take multiples of 64"),
        ({"intermediate_size": 0}, "intermediate_size is 0; the kernels take multiples of 64"),
        ({"down_block": 128}, "intermediate_size is 64, which blocks of 128 do not divide"),
        ({"hidden_size": 2**15, "intermediate_size": 2**15}, "an expert's gate_up has more than 2^31 weights"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(interpreted_library, changes, reason):
    struct = make_case("int4", 1, 4, 64, 64).struct
    interpreted_library.moe_check(struct)
    for name, value in changes.items():
        setattr(struct, name, value)
    with pytest.raises(DeviceError) as error:
        interpreted_library.moe_check(struct)
    assert reason in str(error.value)


def test_calls_that_cannot_be_are_refused(make_gpu):
    gpu = make_gpu(sm=80)
    fp8 = make_case("fp8", 1, 2, 64, 64)
    with pytest.raises(DeviceError, match=r"FP8 needs a GPU of SM 8\.9 or later"):
        Call.of(gpu, fp8).run()
    call = Call.of(gpu, make_case("int4", 1, 2, 64, 64))
    with pytest.raises(DeviceError, match="down_scale is missing"):
        gpu.moe(call.case.struct, 1, **{**call.buffers, "down_scale": None})
    for tokens in (-1, 2**24 + 1, 2**63 - 1):
        with pytest.raises(DeviceError, match=f"cannot take {tokens} tokens"):
            gpu.moe(call.case.struct, tokens, **call.buffers, workspace=call.buffers["y"])
        with pytest.raises(DeviceError, match=f"cannot take {tokens} tokens"):
            gpu.library.moe_workspace(call.case.struct, tokens)
    assert gpu.launches == []


def test_fp8_codes_are_those_of_the_quantizer(gpu):
    """Rows on and around the middles between codes, subnormal ones included, round as ml_dtypes does."""
    width = 512
    grid = np.arange(-128, 128, dtype=np.int8).view(E4M3).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid)])
    middles = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate([grid, middles, [448.0]])[:width]
    values = np.pad(values, (0, width - len(values))).astype(BF16)
    source = gpu.upload(values[None])
    codes, scale = gpu.empty((1, width), E4M3), gpu.empty((1,), np.float32)
    gpu.launch("moe_quantize_bf16", (1, 1, 1), [("p", source), ("p", codes), ("p", scale), ("i", width)])
    assert scale.numpy().tolist() == [1.0]
    expected = values.astype(np.float32).astype(E4M3).astype(np.float32)
    np.testing.assert_array_equal(codes.numpy()[0].astype(np.float32), expected)

"""The library's driver code, and what it says of wrong calls, on a demonstration kernel."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from l4convert.errors import DeviceError, InputError
from l4convert.plugins.library import native
from l4convert.plugins.library.support import missing_support
from tests.plugins.conftest import DEMO
from tests.plugins.interpreter import DeviceBuffer, Fault
from tests.plugins.stand_in import StandIn

BF16 = ml_dtypes.bfloat16
REPO = Path(__file__).resolve().parent.parent.parent


class Product:
    """Buffers of y = x @ (codes * scales) + bias, and the result that NumPy computes."""

    def __init__(self, gpu: StandIn, rows: int = 21, depth: int = 64, columns: int = 64) -> None:
        random = np.random.default_rng(0)
        self.rows, self.depth, self.columns = rows, depth, columns
        x = random.standard_normal((rows, depth)).astype(BF16)
        codes = random.integers(-8, 8, (depth, columns), np.int8)
        scales = random.uniform(0.01, 0.1, columns).astype(np.float32)
        weights = (codes * scales).astype(BF16).astype(np.float64)
        self.expected = x.astype(np.float64) @ weights + 0.5
        self.x, self.codes, self.scales = gpu.upload(x, "x"), gpu.upload(codes, count=True), gpu.upload(scales)
        self.y = gpu.empty((rows, columns), BF16, "y")

    def arguments(self, **replaced: tuple[str, DeviceBuffer | float | None]) -> list[tuple[str, object]]:
        given = {
            "x": ("p", self.x),
            "codes": ("p", self.codes),
            "scales": ("p", self.scales),
            "y": ("p", self.y),
            "rows": ("i", self.rows),
            "depth": ("i", self.depth),
            "bias": ("f", 0.5),
        }
        return list((given | replaced).values())

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.rows // 16), self.columns // 32, 1)


@pytest.fixture
def make_gpu(demo_library, driver):
    return lambda **options: StandIn(demo_library, driver, ops=DEMO, **options)


@pytest.fixture
def gpu(make_gpu):
    return make_gpu()


@pytest.fixture
def failing(driver):
    """Make one function of the driver fail, until the test is over."""
    yield lambda name, code: driver.stand_in_fail(name.encode(), code)
    driver.stand_in_fail(b"", 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_kernel_runs_through_library_driver_and_interpreter(make_gpu, seed):
    gpu = make_gpu(seed=seed)
    product = Product(gpu)
    gpu.launch("demo_c32", product.grid, product.arguments())
    np.testing.assert_allclose(product.y.numpy().astype(np.float64), product.expected, rtol=2**-8, atol=1e-5)


def test_every_byte_that_a_kernel_moves_is_counted(gpu):
    product = Product(gpu)
    gpu.launch("demo_c32", product.grid, product.arguments())
    row_tiles, column_tiles, _ = product.grid
    assert gpu.loaded[product.x] == product.x.nbytes * column_tiles
    assert gpu.loaded[product.codes] == product.codes.nbytes * row_tiles
    assert gpu.loaded[product.scales] == product.scales.nbytes * row_tiles
    assert gpu.stored == {product.y: product.y.nbytes}
    assert set(product.codes.loads) == {row_tiles}
    (launch,) = gpu.launches
    assert launch.loaded == gpu.loaded
    gpu.reset_counts()
    assert not gpu.loaded
    assert not gpu.launches


@pytest.mark.parametrize(("sm", "served_by", "depth"), [(80, 80, 32), (86, 80, 32), (89, 89, 32), (90, 90, 64)])
def test_a_device_gets_the_kernel_that_was_compiled_for_it(make_gpu, sm, served_by, depth):
    gpu = make_gpu(sm=sm)
    product = Product(gpu)
    gpu.launch("demo_c32", product.grid, product.arguments())
    (launch,) = gpu.launches
    assert launch.kernel.sm == served_by
    assert launch.kernel.constants["DEPTH"] == depth


@pytest.mark.parametrize("sm", [75, 103, 110, 121])
def test_a_device_that_nothing_was_compiled_for_is_told_the_command(make_gpu, sm):
    gpu = make_gpu(sm=sm)
    product = Product(gpu)
    message = rf"SM {sm} \(it has: 80, 89, 90, 100, 120\): l4convert plugins build --sm {sm}"
    with pytest.raises(DeviceError, match=message):
        gpu.launch("demo_c32", product.grid, product.arguments())
    with pytest.raises(DeviceError, match=message):
        gpu.call(lambda: gpu.library.preload("demo"))


def test_a_kernel_that_a_device_is_too_old_for_is_missing_there(make_gpu):
    for sm in (80, 86):
        with pytest.raises(DeviceError, match=f"no kernel demo_c64 for SM {sm}"):
            make_gpu(sm=sm).launch("demo_c64", (1, 1, 1), [])


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"x": ("i", 1)}, r"argument 0 of \(x:\*bf16,.*\) must not be an int32"),
        ({"rows": ("p", None)}, "argument 4 of .* must not be a pointer"),
        ({"rows": ("l", 21)}, "argument 4 of .* must not be an int64"),
        ({"rows": ("f", 21.0)}, "argument 4 of .* must not be a float32"),
        ({"depth": ("i", 40)}, "argument 5 of .* must be a multiple of 16"),
        ({"more": ("i", 1)}, "8 arguments for 7 parameters"),
    ],
)
def test_arguments_that_a_kernel_was_not_compiled_for_are_refused(gpu, replaced, message):
    product = Product(gpu)
    with pytest.raises(DeviceError, match=message):
        gpu.launch("demo_c32", product.grid, product.arguments(**replaced))
    assert not gpu.launches


def test_a_pointer_that_is_not_aligned_is_refused(gpu):
    product = Product(gpu)
    arguments = [("p", product.x.address + 8), *product.arguments()[1:]]
    with pytest.raises(DeviceError, match=r"argument 0 of .* not aligned to 16 bytes"):
        gpu.launch("demo_c32", product.grid, arguments)


def test_an_access_outside_of_its_buffer_is_found(gpu):
    product = Product(gpu)
    with pytest.raises(Fault, match=r"store of 2 bytes at byte 2,688 of y, which has 2,688"):
        gpu.launch("demo_c32", product.grid, product.arguments(rows=("i", 22), x=("p", gpu.empty((22, 64), BF16))))
    gpu.free(product.x)
    with pytest.raises(Fault, match="load of 2 bytes"):
        gpu.launch("demo_c32", product.grid, product.arguments())


def test_an_empty_grid_launches_nothing(gpu):
    product = Product(gpu)
    gpu.launch("demo_c32", (0, 1, 1), product.arguments())
    assert not gpu.launches


def test_a_grid_that_no_gpu_takes_is_the_drivers_error(gpu):
    product = Product(gpu)
    message = r"cuLaunchKernel of demo_c32 on a grid of 1 x 65536 x 1: CUDA_ERROR_INVALID_VALUE$"
    with pytest.raises(DeviceError, match=message):
        gpu.launch("demo_c32", (1, 65536, 1), product.arguments())


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuCtxGetCurrent"])
def test_what_the_driver_says_is_passed_on(gpu, failing, function):
    product = Product(gpu)
    failing(function, 700)
    with pytest.raises(DeviceError, match=rf"^{function}.*: CUDA_ERROR_ILLEGAL_ADDRESS \(an illegal memory access"):
        gpu.launch("demo_c32", product.grid, product.arguments())
    failing(function, 12345)
    with pytest.raises(DeviceError, match="CUDA error 12345"):
        gpu.launch("demo_c32", product.grid, product.arguments())
    failing("", 0)
    gpu.launch("demo_c32", product.grid, product.arguments())


def test_a_thread_without_a_context_is_told_so(gpu):
    gpu.make_current(context=False)
    with pytest.raises(DeviceError, match="no CUDA context is current"):
        gpu.library.launch("demo_c32", (0, 1, 1), [])


def test_a_kernel_is_loaded_once_in_every_context(make_gpu, driver):
    before = driver.stand_in_modules()
    gpu = make_gpu()
    product = Product(gpu)
    arguments: list[tuple[str, float]] = [
        (letter, value.address if isinstance(value, DeviceBuffer) else value) for letter, value in product.arguments()
    ]
    with ThreadPoolExecutor(8) as pool:  # an empty grid: only loads
        for _ in range(64):
            pool.submit(gpu.library.launch, "demo_c32", (0, 1, 1), arguments)
    assert driver.stand_in_modules() == before + 1
    gpu.call(lambda: gpu.library.preload("demo"))
    assert driver.stand_in_modules() == before + 2  # demo_c64
    other = make_gpu()
    with pytest.raises(DeviceError, match="the plugin library has no op another op"):
        other.call(lambda: other.library.preload("another op"))
    assert driver.stand_in_modules() == before + 2
    other.call(lambda: other.library.preload("demo"))
    assert driver.stand_in_modules() == before + 4


def test_without_a_driver_the_library_lists_its_kernels_and_says_what_is_missing(demo_library):
    code = (
        "import sys; from pathlib import Path; from l4convert.plugins.library.native import load\n"
        "library = load(Path(sys.argv[1])); print(len(library.kernels), library.version)\n"
        "from l4convert.errors import DeviceError\n"
        "try: library.preload('demo')\n"
        "except DeviceError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(demo_library.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPO)
    listed, message = done.stdout.splitlines()
    assert listed.split()[0] == str(len(demo_library.kernels))
    assert message in (
        "there is no CUDA driver on this machine (libcuda.so.1 cannot be loaded)",
        "no CUDA context is current in this thread",
    )


def test_the_table_says_what_was_asked_for(demo_library):
    (kernel,) = (kernel for kernel in demo_library.kernels if (kernel.name, kernel.sm) == ("demo_c32", 90))
    assert demo_library.sms == (80, 89, 90, 100, 120)
    assert (kernel.op, kernel.symbol, kernel.exact, kernel.types) == ("demo", "scaled_product", True, "ppppiIf")
    assert dict(kernel.parameters)["codes"] == "*i8"
    assert kernel.constants == {"ROWS": 16, "COLUMNS": 32, "DEPTH": 64}
    assert ctypes.string_at(kernel.image, kernel.size) == b"placeholder of demo_c32 for SM 90"
    assert kernel.image % 64 == 0


def test_what_is_no_library_is_refused(tmp_path, demo_library):
    with pytest.raises(InputError, match="no such file"):
        native.load(tmp_path / "absent.so")
    whole = demo_library.path.read_bytes()
    for content, reason in [
        (b"not a library", "file too short"),
        (b"not a library" * 9, "invalid ELF header"),
        (whole[: len(whole) // 2], "it is cut off"),  # the loader would die of it
    ]:
        (tmp_path / "wrong.so").write_bytes(content)
        for use in (native.load, lambda path: missing_support(path, "MoE", {}, 90)):
            with pytest.raises(InputError, match=rf"not a plugin library of l4convert \(.*{reason}"):
                use(tmp_path / "wrong.so")

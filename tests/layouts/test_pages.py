"""Packed weights on huge pages: the same numbers, in memory of their own that goes with the last tensor."""

import gc
import mmap
import sys

import pytest
import torch

from lowp.layouts import pages
from lowp.layouts.pages import on_huge_pages
from lowp.tensor import QTensor

HUGE = 1 << 21
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux gives huge pages")


def mappings() -> int:
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return sum(1 for _ in lines)


@pytest.mark.parametrize("sizes", [(HUGE,), (HUGE + 12, 100), (3 * HUGE, HUGE // 2, 0), (HUGE - 100, 7, 2 * HUGE)])
def test_large_weights_move_whole(sizes: tuple[int, ...]) -> None:
    dtypes = (torch.uint8, torch.bfloat16, torch.float32)
    given = {f"part{i}": torch.arange(size).to(dtypes[i]) for i, size in enumerate(sizes)}
    moved = on_huge_pages(given)
    assert moved["part0"].data_ptr() % HUGE == 0
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, given[name], rtol=0, atol=0)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, "saved, a tensor holds nothing but itself"
        assert not tensor.numel() or tensor.data_ptr() != given[name].data_ptr()
        assert not tensor._is_view()


def test_small_weights_stay() -> None:
    given = {"qdata": torch.zeros(HUGE - 64, dtype=torch.uint8)}
    assert on_huge_pages(given)["qdata"] is given["qdata"]
    given = {"qdata": torch.empty(HUGE, dtype=torch.uint8, device="meta")}
    assert on_huge_pages(given)["qdata"] is given["qdata"]


@pytest.mark.parametrize("refuses", ["madvise", "mmap"])
def test_a_system_that_refuses_is_no_error(refuses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without huge pages (EINVAL), a limit on memory (ENOMEM)."""

    class Refusing(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(22, "Invalid argument")

    def nothing(*args: int, **kwargs: int) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pages.mmap, "mmap", Refusing if refuses == "madvise" else nothing)
    given = {"qdata": torch.zeros(HUGE, dtype=torch.uint8)}
    assert on_huge_pages(given)["qdata"] is given["qdata"]


def test_the_memory_goes_with_the_last_tensor() -> None:
    on_huge_pages({"a": torch.zeros(HUGE)})  # what is mapped once and stays
    before = mappings()
    kept = [on_huge_pages({"a": torch.zeros(HUGE), "b": torch.zeros(9)}) for _ in range(8)]
    last = [parts["b"] for parts in kept]
    assert mappings() > before
    del kept
    assert [float(b.sum()) for b in last] == [0.0] * 8
    del last
    gc.collect()
    assert mappings() <= before + 2


def test_planes_lie_there() -> None:
    weight = QTensor.quantize(torch.randn(2048, 2048), "int8/row").to_layout("planes")
    assert weight.packed["qdata"].data_ptr() % HUGE == 0
    back = QTensor.quantize(torch.randn(16, 32), "int8/row").to_layout("planes")
    assert back.packed_nbytes < HUGE

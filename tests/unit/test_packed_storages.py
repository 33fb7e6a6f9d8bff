"""int8 and NF4: their error, their numbers by a search of all codes, and the same numbers however they are decoded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dora_dist.adapters.storage import NF4, Int8, PackedStorage, label, labelled, nf4, packed, storage_of
from dora_dist.runtime.errors import UserError

EVERY: list[PackedStorage] = [Int8(), Int8(256), NF4(), NF4(128), NF4(double_quant=True)]
CPU = torch.device("cpu")


def gaussian(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02


def kept(storage: PackedStorage, weight: Tensor) -> list[Tensor]:
    return [p.data for p in storage.hold(torch.nn.Parameter(weight, requires_grad=False)).values()]


@pytest.mark.parametrize(
    ("storage", "percent", "bits"),
    [
        (Int8(), 0.60, 8.25),
        (Int8(256), 0.70, 8.0625),
        (NF4(), 9.2, 4.25),
        (NF4(double_quant=True), 9.2, 4.140625),
    ],
    ids=["int8", "int8_256", "nf4", "nf4_double"],
)
def test_error_and_size(storage: PackedStorage, percent: float, bits: float) -> None:
    weight = gaussian(2**20)
    error = (storage.round_trip(weight) - weight).norm() / weight.norm()
    assert 100 * error == pytest.approx(percent, rel=0.02)
    [held] = kept(storage, weight.view(1024, 1024))
    assert 8 * held.nbytes / 2**20 == bits and held.dtype == torch.int8


@pytest.mark.parametrize("block_size", [64, 128])
def test_int8_is_the_nearest_multiple_of_a_127th_of_the_largest(block_size: int) -> None:
    weight = gaussian(4 * block_size).view(4, block_size)
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    choices = torch.arange(-127, 128) * scale.unsqueeze(2)
    nearest = choices.expand(4, block_size, -1).gather(2, (choices - weight.unsqueeze(2)).abs().argmin(2, keepdim=True))
    assert torch.equal(Int8(block_size).round_trip(weight.flatten()), nearest.flatten())
    large = weight.abs() > scale
    assert torch.equal(nearest.squeeze(2).sign()[large], weight.sign()[large])


def test_nf4_is_the_nearest_of_its_values() -> None:
    weight = gaussian(64 * 100).view(100, 64)
    scale = weight.abs().amax(1, keepdim=True).bfloat16().float()
    codes = ((weight / scale).unsqueeze(2) - torch.tensor(nf4.VALUES)).abs().argmin(2)
    assert torch.equal(NF4().round_trip(weight.flatten()), (torch.tensor(nf4.VALUES)[codes] * scale).flatten())


def test_codes_change_exactly_where_two_values_are_equally_near() -> None:
    values = torch.tensor(nf4.VALUES)
    limits = (values[1:] + values[:-1]) / 2
    edges = torch.linspace(-1, 1, 2049)
    around = [torch.nextafter(t, torch.tensor(side)) for t in (limits, edges) for side in (-9.0, 9.0)]
    tried = torch.cat([limits, edges, *around, torch.linspace(-1.01, 1.01, 100_001)])
    assert torch.equal(nf4.nearest(tried).long(), torch.bucketize(tried, limits))


@pytest.mark.parametrize("storage", EVERY, ids=label)
def test_odd_weights(storage: PackedStorage) -> None:
    """Zeros stay zeros, a block's largest number survives beside a block a hundred times as large, a record is cut."""
    block = storage.settings()["block_size"]
    zeros = torch.zeros(storage.record)
    assert torch.equal(storage.round_trip(zeros), zeros)
    mixed = gaussian(storage.record + 77)
    mixed[:block] *= 1e-2
    back = storage.round_trip(mixed)
    assert bool(torch.isfinite(back).all()) and len(back) == len(mixed)
    assert back[:block].abs().max() > 0
    assert back[mixed.abs().argmax()] == pytest.approx(float(mixed[mixed.abs().argmax()]), rel=6e-3)


@pytest.mark.parametrize("storage", EVERY, ids=label)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_way_of_reading_gives_the_same_numbers(storage: PackedStorage, dtype: torch.dtype) -> None:
    """Any range in fp32; blocks of rows in the products' dtype, whose ends are not those of records."""
    shape = (50, 83)
    weight = gaussian(50 * 83).view(shape)
    tensors = kept(storage, weight)
    expected = storage.round_trip(weight.flatten())
    for start, stop in ((0, 4150), (1, 65), (700, 4149), (4100, 4150)):
        assert torch.equal(storage.to_fp32(tensors, start, stop, device=CPU), expected[start:stop])
    rows = storage._row_blocks(tensors, shape, like=torch.empty(0, dtype=dtype), at_once=7 * 83)
    blocks = [(start, stop, block.clone()) for start, stop, block in rows]
    assert [stop for _, stop, _ in blocks] == [*range(7, 50, 7), 50]
    assert torch.equal(torch.cat([block for *_, block in blocks]), expected.view(shape).to(dtype))


@pytest.mark.parametrize("storage", EVERY, ids=label)
@pytest.mark.parametrize("at_once", [2**20, 7 * 83])
def test_products_are_those_of_the_decoded_weight(
    storage: PackedStorage, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for most in (packed.PRODUCT_ELEMENTS, packed.SUM_ELEMENTS):
        monkeypatch.setitem(most, "cpu", at_once)
    weight = gaussian(50 * 83).view(50, 83)
    tensors, decoded = kept(storage, weight), storage.round_trip(weight.flatten()).view(50, 83).double()
    x, grad, bias = gaussian(9 * 83, 1).view(9, 83), gaussian(9 * 50, 2).view(9, 50), gaussian(50, 3)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3)):
        xs, gs, bs = x.to(dtype), grad.to(dtype), bias.to(dtype)
        y = storage.project(xs, tensors, (50, 83), bias=bs)
        back = storage.project_back(gs, tensors, (50, 83))
        assert y.dtype == back.dtype == dtype
        for ours, theirs in ((y, xs.double() @ decoded.t() + bs.double()), (back, gs.double() @ decoded)):
            assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("storage", [Int8(), NF4()], ids=label)
def test_products_in_inference_mode_leave_others_possible(
    storage: PackedStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop of one's own may evaluate so before it trains."""
    monkeypatch.setattr(packed, "_scratch_here", packed._Scratch())
    tensors, x = kept(storage, gaussian(50 * 83).view(50, 83)), gaussian(9 * 83, 1).view(9, 83)
    with torch.inference_mode():
        evaluated = storage.project(x, tensors, (50, 83))
    assert torch.equal(storage.project(x, tensors, (50, 83)), evaluated)


def test_elsewhere_usual_layers_are_multiplied_back_whole_and_decoded_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plain product to the bit, which a sum of blocks in another order is not; as on a GPU, without one."""
    weight = gaussian(50 * 83).view(50, 83)
    tensors, grad = kept(Int8(), weight), gaussian(9 * 50, 2).view(9, 50).bfloat16()
    decoded = Int8().round_trip(weight.flatten()).view(50, 83).bfloat16()
    pieces: list[int] = []
    decode_into = Int8.decode_into

    def noted(storage: Int8, records: Any, out: Tensor) -> None:
        pieces.append(out.numel())
        decode_into(storage, records, out)

    monkeypatch.setattr(Int8, "decode_into", noted)
    for at_once in (packed.PRODUCT_ELEMENTS, packed.SUM_ELEMENTS):
        monkeypatch.delitem(at_once, "cpu")
    monkeypatch.setattr(packed, "OTHER_PRODUCT_ELEMENTS", 7 * 83)
    assert torch.equal(Int8().project_back(grad, tensors, (50, 83)), grad @ decoded)
    assert len(pieces) > 1 and max(pieces) <= 7 * 83
    assert packed.OTHER_SUM_ELEMENTS >= 8192 * 28672


@pytest.mark.parametrize("block_size", packed.BLOCK_SIZES)
def test_bitsandbytes_gives_the_plain_forms_numbers_and_is_used(block_size: int) -> None:
    """The extra is part of the tests: where it is installed and works, it decodes."""
    nf4._kernel.cache_clear()
    assert nf4._kernel("cpu", block_size) is nf4._of_bitsandbytes


def test_a_kernel_is_used_for_those_sizes_of_blocks_alone_that_it_decodes_as_the_plain_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong_for_256(codes: Tensor, scales: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
        return nf4.decoded(codes, scales, block_size, dtype) * (1.001 if block_size == 256 else 1.0)

    monkeypatch.setattr(nf4, "_of_bitsandbytes", wrong_for_256)
    nf4._kernel.cache_clear()
    assert [size for size in packed.BLOCK_SIZES if nf4._kernel("cpu", size) is nf4.decoded] == [256]
    nf4._kernel.cache_clear()


@pytest.mark.parametrize("broken", ["absent", "wrong"])
def test_without_bitsandbytes_the_plain_form_decodes(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError

    if broken == "absent":
        monkeypatch.setattr(nf4, "import_bitsandbytes", absent)
    else:
        monkeypatch.setattr(nf4, "_of_bitsandbytes", lambda *sample: nf4.decoded(*sample) * 1.001)
    nf4._kernel.cache_clear()
    assert nf4._kernel("cpu", 64) is nf4.decoded
    nf4._kernel.cache_clear()


def test_a_label_says_the_settings_that_are_not_usual() -> None:
    assert [label(storage) for storage in EVERY] == [
        "int8",
        'int8 {"block_size": 256}',
        "nf4",
        'nf4 {"block_size": 128}',
        'nf4 {"double_quant": true}',
    ]
    for storage in EVERY:
        again = labelled(label(storage), "here")
        assert (again.name, again.settings()) == (storage.name, storage.settings())
    with pytest.raises(UserError, match=r'here = "nf4 \[1\]": is not a storage'):
        labelled("nf4 [1]", "here")


def test_a_name_alone_always_means_the_same_settings() -> None:
    """Adapters of before say no more: with other defaults they would be merged into other weights, silently."""
    assert labelled("int8", "here").settings() == {"block_size": 64}
    assert labelled("nf4", "here").settings() == {"block_size": 64, "double_quant": False}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("int8", {"double_quant": True}, '"double_quant" is not a setting of the storage .int8.; it has: block_size'),
        ("plain", {"block_size": 64}, '"block_size" is not a setting of the storage .plain.; it has: none'),
        ("nf4", {"block_size": 100}, "block_size = 100: must be one of 64, 128, 256, 512"),
        ("nf4", {"block_size": True}, "block_size = true: must be a whole number"),
        ("nf4", {"double_quant": 1}, "double_quant = 1: must be true or false"),
    ],
)
def test_settings_that_a_storage_cannot_have(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        storage_of(name, settings)

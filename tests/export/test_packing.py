"""Packed files give back every bit, are never larger than dense ones, and are not trusted."""

import contextlib
import json
import struct
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays
from safetensors.torch import save as save_dense
from torch import nn

from lightning_sparse.export import load_sparse, packing, read_sparse, save_sparse

DTYPES = sorted(packing._DTYPES.values(), key=str)


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist()


def random_bits(shape, dtype, density, seed=0):
    """Any bit patterns: NaN, subnormal numbers and -0.0 among them."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 256, (int(np.prod(shape)), dtype.itemsize), np.uint8)
    if dtype == torch.bool:
        numbers &= 1
    numbers[rng.random(len(numbers)) >= density] = 0
    return torch.from_numpy(numbers.reshape(-1)).view(dtype).reshape(shape)


def same(found, expected):
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype)
        assert bits(found[name]) == bits(tensor), name


tensors = st.builds(
    random_bits,
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 99),
)


@settings(max_examples=40, deadline=None)
@given(state=st.dictionaries(st.text("abc.", min_size=1), tensors, max_size=4), compress=st.booleans())
def test_round_trip_gives_back_every_bit(tmp_path_factory, state, compress):
    path = tmp_path_factory.mktemp("packed") / "file"
    size = save_sparse(state, path, compress=compress)
    assert size == path.stat().st_size
    same(load_sparse(path), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.97, 1.0])
def test_never_larger_than_dense(tmp_path, dtype, density):
    """But for what the header says of packed tensors."""
    state = {"weight": random_bits((64, 1000), dtype, density)}
    dense = 64_000 * dtype.itemsize
    assert save_sparse(state, tmp_path / "packed") <= dense + 256
    assert save_sparse(state, tmp_path / "plain", compress=False) <= dense + 256


def test_size_is_a_bit_a_weight_and_the_values(tmp_path):
    state = {"weight": random_bits((1000, 1000), torch.float32, 0.1)}
    kept = int(np.count_nonzero(state["weight"].view(torch.int32)))
    size = save_sparse(state, tmp_path / "plain", compress=False)
    assert size == pytest.approx(1_000_000 / 8 + 4 * kept, abs=512)
    # The pattern of zeros has an entropy of 0.47 bits a weight.
    assert save_sparse(state, tmp_path / "packed") < 0.6 * 1_000_000 / 8 + 4 * kept


def test_tied_tensors_are_written_once_and_views_of_them_are_not_mistaken_for_them(tmp_path):
    net = nn.ModuleDict({"encoder": nn.Linear(100, 100), "decoder": nn.Linear(100, 100)})
    net["decoder"].weight = net["encoder"].weight
    path = tmp_path / "tied"
    assert save_sparse(net, path, compress=False) < 1.1 * 4 * 100 * 100
    same(load_sparse(path), net.state_dict())

    whole = torch.randn(4, 4)
    views = {"whole": whole, "transposed": whole.T, "part": whole[:2], "flat": whole.view(-1)}
    save_sparse(views, path)
    same(load_sparse(path), views)


class Lazy(Mapping):
    """Loads a tensor when it is asked for and counts how many are held."""

    def __init__(self, names):
        self.names, self.asked = names, []

    def __getitem__(self, name):
        self.asked.append(name)
        return random_bits((50, 50), torch.float32, 0.1, seed=hash(name) % 97)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def test_tensors_are_read_one_after_another(tmp_path):
    lazy = Lazy(["a", "b", "c"])
    save_sparse(lazy, tmp_path / "lazy")
    assert lazy.asked == ["a", "b", "c", "a", "b", "c"]
    found = read_sparse(tmp_path / "lazy")
    assert next(found)[0] == "a"
    same(dict(read_sparse(tmp_path / "lazy")), {name: lazy[name] for name in lazy})


def test_loads_into_a_model(tmp_path):
    net, other = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
    net(torch.randn(8, 5))
    save_sparse(net, tmp_path / "net")
    weight = other.weight
    load_sparse(tmp_path / "net", other)
    assert other.weight is weight
    same(other.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 2), r"Expected `weight` in .* to be \(2, 3\) torch.float32 as in the model, but got \(2, 2\)"),
        (nn.Linear(2, 2, bias=False), "`bias` is none of them"),
        (nn.LSTM(2, 2), "`weight` is none of them"),
        (nn.ModuleDict(), "`weight` is none of them"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, model, message):
    save_sparse(nn.Linear(2, 2), tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        load_sparse(tmp_path / "file", model)


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path):
    save_sparse(nn.Linear(2, 2, bias=False), tmp_path / "file")
    with pytest.raises(ValueError, match=r"to hold all tensors of the model, but got none of \['bias'\]"):
        load_sparse(tmp_path / "file", nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a:mask": torch.ones(1)}, "'a:mask'. Rename it"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "but got torch.complex128"),
    ],
)
def test_what_the_format_does_not_know_is_refused_and_leaves_no_file(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        save_sparse(state, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    save_sparse({"a": torch.ones(3)}, path)

    class Failing(Lazy):
        def __getitem__(self, name):
            if len(self.asked) == 3:
                raise OSError("gone")
            return super().__getitem__(name)

    with pytest.raises(OSError, match="gone"):
        save_sparse(Failing(["a", "b"]), path)
    same(load_sparse(path), {"a": torch.ones(3)})
    assert list(tmp_path.iterdir()) == [path]


def test_other_programs_read_it_with_a_few_lines(tmp_path):
    """The lines of the documentation."""
    weight = random_bits((30, 40), torch.float32, 0.2)
    save_sparse({"weight": weight, "bias": torch.ones(3)}, tmp_path / "file")

    arrays = load_arrays(zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "file").read_bytes()))
    mask = np.unpackbits(arrays["weight:mask"], count=30 * 40).astype(bool)
    dense = np.zeros(30 * 40, np.float32)
    dense[mask] = arrays["weight:values"].T.copy().view(np.float32).ravel()

    assert dense.tobytes() == weight.numpy().tobytes()
    assert (arrays["bias"] == 1).all()


def test_reads_what_others_have_written(tmp_path):
    state = {"b": torch.randn(3, 2).bfloat16(), "a": torch.arange(5), "empty": torch.ones(0, 2)}
    (tmp_path / "file").write_bytes(save_dense(state, {"format": "pt"}))
    same(load_sparse(tmp_path / "file"), state)


# -- files that are not what they should be ---------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [True, False])
def test_a_file_cut_anywhere_is_refused(tmp_path, compress):
    path = tmp_path / "file"
    save_sparse({"a": random_bits((40, 40), torch.float32, 0.1), "b": torch.ones(3)}, path, compress=compress)
    data = path.read_bytes()
    for end in {*range(0, len(data), 7), len(data) - 1}:
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="packed or not, but"):
            load_sparse(path)


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 700), byte=st.integers(0, 255))
def test_a_damaged_file_gives_tensors_or_a_clear_error(tmp_path_factory, at, byte):
    path = tmp_path_factory.mktemp("damaged") / "file"
    save_sparse({"a": random_bits((40, 40), torch.float32, 0.1), "b": torch.ones(3)}, path, compress=False)
    data = bytearray(path.read_bytes())
    data[at] = byte
    path.write_bytes(data)
    with contextlib.suppress(ValueError):
        assert all(isinstance(tensor, torch.Tensor) for tensor in load_sparse(path).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table["a:mask"].update(shape=[10**15], data_offsets=[0, 10**15]),
            "do not lie one after another",
        ),
        (lambda table: table["b"].update(dtype="F7"), r"types \['F7'\]"),
        (lambda table: table["b"].update(shape=[4]), "`b` has 12 bytes, which is not what its shape and type need"),
        (lambda table: table["__metadata__"].update(sparse="{}"), "the mask of `a` has no values"),
        (lambda table: table["__metadata__"].pop("sparse"), "the mask of `a` has no values"),
        (lambda table: table.update(a=[]), "TypeError"),
        (lambda table: table["__metadata__"].update(sparse='{"a": {"dtype": "F32", "shape": [2]}}'), "for 2 numbers"),
        (
            lambda table: table["__metadata__"].update(sparse='{"a": {"dtype": "F64", "shape": [1600]}}'),
            "of values for",
        ),
        (lambda table: table["__metadata__"].update(sparse='{"a": {"dtype": "F32", "shape": [-1]}}'), "is no shape"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, change, message):
    path = tmp_path / "file"
    save_sparse({"a": random_bits((40, 40), torch.float32, 0.1), "b": torch.ones(3)}, path, compress=False)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ValueError, match=message):
        load_sparse(path)


@pytest.mark.parametrize(
    "head", [struct.pack("<Q", 1 << 60), struct.pack("<Q", 99_000_000), b"\x28\xb5\x2f\xfdrubbish"]
)
def test_what_a_header_promises_is_not_believed(tmp_path, head):
    (tmp_path / "file").write_bytes(head)
    with pytest.raises(ValueError, match="packed or not, but"):
        load_sparse(tmp_path / "file")

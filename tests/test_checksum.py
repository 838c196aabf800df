"""A checksum tells any change of values, order, shape or dtype, on whatever device."""

import pytest
import torch

from skinvert._checksum import RowChecksum, _on_device, checksum

CHANGES = {
    "value": lambda t: t.index_put((torch.tensor([3]), torch.tensor([1])), t[3, 1] + 1),
    "rows": lambda t: t[[1, 0, 2, 3, 4, 5]],
    "flip": lambda t: t.flip(1),
    "shape": lambda t: t.reshape(4, 6),
    "shift": lambda t: t.roll(1, 1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16])
def test_a_change_is_seen(change, dtype):
    tensor = torch.arange(24).reshape(6, 4).to(dtype)
    other = change(tensor)
    assert checksum(tensor) == checksum(tensor.clone()) != checksum(other)
    same_sums = _on_device(tensor.reshape(-1)) == _on_device(other.contiguous().reshape(-1))
    assert same_sums == (tensor.shape != other.shape)


def test_no_numbers_and_a_bool_have_one():
    assert checksum(torch.zeros(0, 3)) != checksum(torch.zeros(0, 4))
    assert checksum(torch.tensor(True)) != checksum(torch.tensor(False))
    assert checksum(torch.arange(6).reshape(2, 3).mT) == checksum(torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_a_single_number_with_a_stride_has_that_of_one_without():
    one = torch.tensor([1.0, 2.0, 3.0, 4.0])[1::3]
    assert one.stride() == (3,) and checksum(one) == checksum(torch.tensor([2.0]))


@pytest.mark.parametrize("split", [1, 3, 12])
def test_rows_have_one_checksum_in_whatever_batches(split):
    X, X2 = torch.arange(24.0).reshape(12, 2), torch.arange(24.0).reshape(12, 2)
    X2[7, 1] += 1e-5

    def told(*tensors):
        found = RowChecksum()
        for tensor in tensors:
            found.add(tensor)
        return found.value

    assert told(*X.split(split)) == told(X) == told(*X.split([5, 7]))
    assert told(*X2.split(split)) == told(X2)
    others = [X2, X.flip(0), X[1:], X.reshape(24), X.reshape(8, 3), X.double(), torch.tensor(1.0), torch.tensor(2.0)]
    assert len({told(other) for other in [X, *others]}) == len(others) + 1

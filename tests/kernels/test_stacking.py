"""Matrices that lie side by side in memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spafit.kernels.stacking import are_together, cut, lay_together, stacked

ROWS = (4, 2, 3)


def make(requires_grad: bool = True, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(rows, 5, dtype=dtype), requires_grad) for rows in ROWS]


def copied(tensors: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([tensor.detach() for tensor in tensors])


class TestSideBySide:
    """Oracle: torch.cat, and the addresses of the memory."""

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_laying_together_changes_no_value_and_stacking_copies_nothing(
        self, dtype: torch.dtype
    ) -> None:
        parameters = make(dtype=dtype)
        before = [parameter.detach().clone() for parameter in parameters]
        assert not are_together(parameters)
        assert torch.equal(stacked(parameters), torch.cat(before))
        lay_together(parameters)
        assert are_together(parameters)
        for parameter, values in zip(parameters, before, strict=True):
            assert torch.equal(parameter, values)
            assert parameter.requires_grad
            assert parameter.is_leaf
        whole = stacked(parameters)
        assert whole.data_ptr() == parameters[0].data_ptr()
        assert whole.is_contiguous()
        assert torch.equal(whole, torch.cat(before))
        address = parameters[0].data_ptr()
        lay_together(parameters)
        assert parameters[0].data_ptr() == address

    def test_a_step_on_one_moves_the_whole(self) -> None:
        parameters = make()
        lay_together(parameters)
        with torch.no_grad():
            parameters[1].add_(1.0)
        assert stacked(parameters).data_ptr() == parameters[0].data_ptr()
        assert torch.equal(stacked(parameters), copied(parameters))

    def test_each_has_a_storage_of_its_own_size(self) -> None:
        parameters = make()
        lay_together(parameters)
        for rows, parameter in zip(ROWS, parameters, strict=True):
            assert parameter.storage_offset() == 0
            assert parameter.untyped_storage().nbytes() == rows * 5 * 4

    def test_each_keeps_the_memory_of_all(self) -> None:
        first, second, third = parameters = make()
        before = second.detach().clone()
        lay_together(parameters)
        del parameters, first, third
        for _ in range(9):  # would be written to memory that was freed
            torch.full((9, 5), torch.nan)
        assert torch.equal(second, before)

    def test_order_and_gaps_are_seen(self) -> None:
        first, second, third = parameters = make()
        lay_together(parameters)
        for mixed in ([second, first], [first, third], [third, first, second], [first, first]):
            assert not are_together(mixed)
            assert torch.equal(stacked(mixed), copied(mixed))

    def test_neighbours_of_another_type_or_width_are_seen(self) -> None:
        memory = torch.zeros(12)
        pieces = cut(memory, [4, 8])
        for second in (pieces[1].view(torch.int32), pieces[1].view(4, 2), pieces[1][::2]):
            assert pieces[0].data_ptr() + 4 * 4 == second.data_ptr()
            assert not are_together([pieces[0], second])

    def test_made_in_inference_mode_it_can_still_be_trained(self) -> None:
        parameters = make()
        with torch.inference_mode():
            lay_together(parameters)
            whole = stacked(parameters)
            assert whole.data_ptr() == parameters[0].data_ptr()
        F.linear(torch.ones(5), parameters[0]).sum().backward()
        with torch.no_grad():
            parameters[0].add_(1.0)


class TestLeftAlone:
    """Oracle: the addresses before; what is computed is torch.cat's."""

    def stay(self, parameters: list[nn.Parameter]) -> None:
        before = [parameter.data_ptr() for parameter in parameters]
        lay_together(parameters)
        assert [parameter.data_ptr() for parameter in parameters] == before
        assert torch.equal(stacked(parameters), copied(parameters))

    def test_views_of_a_flat_vector(self) -> None:
        parameters = make()
        with torch.no_grad():
            vector = nn.utils.parameters_to_vector(parameters[::-1])
        nn.utils.vector_to_parameters(vector, parameters[::-1])
        self.stay(parameters)
        vector.fill_(2.0)
        assert torch.equal(stacked(parameters), torch.full((9, 5), 2.0))

    def test_shared_memory(self) -> None:
        parameters = make()
        parameters[1].share_memory_()
        self.stay(parameters)
        assert parameters[1].is_shared()

    def test_one_tensor_under_two_names(self) -> None:
        first, second, _ = make()
        self.stay([first, second, first])
        second.data = first.data
        self.stay([first, second])

    def test_a_subclass(self) -> None:
        class Odd(torch.Tensor):
            pass

        first, second, _ = make()
        odd = nn.Parameter(torch.randn(2, 5).as_subclass(Odd))
        self.stay([first, odd, second])  # type: ignore[list-item]

    def test_what_cannot_be_one_matrix(self) -> None:
        self.stay(make()[:1])
        for parameters in (
            [],
            [nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(2, 5).double())],
            [nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(2, 4))],
            [nn.Parameter(torch.ones(2, 5, device="meta")) for _ in range(2)],
        ):
            before = [parameter.data_ptr() for parameter in parameters]
            lay_together(parameters)
            assert [parameter.data_ptr() for parameter in parameters] == before

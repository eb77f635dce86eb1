"""Matrices that lie one after the other in memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from spafit.kernels.stacking import are_together, lay_together, stacked


class TestStacking:
    """Oracle: torch.cat, and the addresses of the memory."""

    def make(self, requires_grad: bool = True) -> list[nn.Parameter]:
        sizes = (4, 2, 3)
        return [nn.Parameter(torch.randn(rows, 5), requires_grad=requires_grad) for rows in sizes]

    def test_laying_together_changes_no_value_and_stacking_copies_nothing(self) -> None:
        parameters = self.make()
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
        assert torch.equal(whole, torch.cat(before))
        address = parameters[0].data_ptr()
        lay_together(parameters)
        assert parameters[0].data_ptr() == address

    def test_a_step_on_one_moves_the_whole(self) -> None:
        parameters = self.make()
        lay_together(parameters)
        with torch.no_grad():
            parameters[1].add_(1.0)
        assert torch.equal(stacked(parameters), torch.cat([p.detach() for p in parameters]))

    def test_order_and_gaps_are_seen(self) -> None:
        first, second, third = parameters = self.make()
        lay_together(parameters)
        for mixed in ([second, first], [first, third], [third, first, second]):
            assert not are_together(mixed)
            assert torch.equal(stacked(mixed), torch.cat([p.detach() for p in mixed]))

    def test_made_in_inference_mode_it_can_still_be_trained(self) -> None:
        parameters = self.make()
        with torch.inference_mode():
            lay_together(parameters)
        F.linear(torch.ones(5), parameters[0]).sum().backward()
        with torch.no_grad():
            parameters[0].add_(1.0)

    def test_what_cannot_lie_together_is_left(self) -> None:
        for parameters in (
            [],
            self.make()[:1],
            [nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(2, 5).double())],
            [nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(2, 4))],
            [nn.Parameter(torch.ones(2, 5, device="meta"))] * 2,
        ):
            lay_together(parameters)

"""A neuron of a gated MLP, taken over: what it was, and the rank-1 factors that make it another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True, eq=False)
class Neuron:
    """Neuron `index` of an MLP of `count`, whose matrices are called `names` (gate, up, down): its two rows and its column, float32 [d].

    `usual` is the median length of the block's columns.
    """

    names: tuple[str, str, str]
    index: int
    count: int
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    usual: float

    @classmethod
    def idlest(cls, module: Any, names: tuple[str, str, str]) -> Neuron:
        """The one with the smallest product of the lengths of its two rows and its column (ties: the first).

        `names` are those of W_gate and W_up [d_ff, d] and of W_down [d, d_ff].
        """
        gate, up, down = (module.get_parameter(name).detach().float() for name in names)
        lengths = down.norm(dim=0)
        index = int((gate.norm(dim=1) * up.norm(dim=1) * lengths).argmin())
        return cls(names, index, len(lengths), gate[index].clone(), up[index].clone(), down[:, index].clone(), float(lengths.median()))

    def becoming(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Factors (B, A) by tensor name, of rank 1, that make it x ↦ down · act(gate·x) (up·x); all float32 [d].

        The column takes the usual length, for a quantizer that scales blocks of a row together would round a much shorter one away;
        the up row is scaled the other way.
        """
        scale = float(self.usual / down.norm())
        chosen = functional.one_hot(torch.tensor(self.index), self.count).float()
        return {
            self.names[0]: (chosen[:, None], (gate - self.gate)[None]),
            self.names[1]: (chosen[:, None], (up / scale - self.up)[None]),
            self.names[2]: ((scale * down - self.down)[:, None], chosen[None]),
        }

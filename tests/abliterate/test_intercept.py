"""The intercept: its row is constant where answers are predicted, and its column moves the refusal's odds by the nats asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import tiny_module

from trailmed.abliterate.calibrate import refusal_log_odds
from trailmed.abliterate.factors import attached
from trailmed.abliterate.intercept import Intercept, find_intercept
from trailmed.errors import TrailmedError

NAME = "model.layers.0.mlp.down_proj.weight"
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10], [3, 9], [12, 3, 4, 4]]
ANSWERED = [([*prompt, 11, 12, 13], 3) for prompt in PROMPTS]
OPENINGS = [[11, 12, 13], [14, 5]]


def nothing_in(module: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    d_out, d_in = module.get_parameter(NAME).shape
    return {NAME: (torch.zeros(d_out, 1), torch.zeros(1, d_in))}


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_the_odds_move_by_the_nats_asked_for(architecture: str) -> None:
    module = tiny_module(architecture)
    before = refusal_log_odds(module, PROMPTS, OPENINGS)
    intercept = find_intercept(module, NAME, ANSWERED, PROMPTS, OPENINGS)
    assert refusal_log_odds(module, PROMPTS, OPENINGS) == before  # no hook is left
    nats = 0.02  # the gradient's own nats: the odds are no straight line
    with attached(module, intercept.added_to(nothing_in(module), nats)):
        up = np.subtract(refusal_log_odds(module, PROMPTS, OPENINGS), before).mean()
    with attached(module, intercept.added_to(nothing_in(module), -nats)):
        down = np.subtract(refusal_log_odds(module, PROMPTS, OPENINGS), before).mean()
    assert (up - down) / 2 == pytest.approx(nats, rel=0.2)


def test_the_row_is_the_ridge_solution_over_what_the_layer_reads_at_the_answers() -> None:
    module = tiny_module("qwen2")
    read: list[np.ndarray] = []
    handle = module.get_submodule(NAME.removesuffix(".weight")).register_forward_pre_hook(
        lambda _layer, args: read.append(args[0][0].double().numpy()),
    )
    with torch.inference_mode():
        for sequence, _ in ANSWERED:
            module.model(torch.tensor([sequence]))
    handle.remove()
    x = np.concatenate([rows[-4:-1] for rows in read])
    moment = x.T @ x / len(x)
    row = np.linalg.solve(moment + 1e-2 * np.diag(moment).mean() * np.eye(len(moment)), x.mean(0))
    row /= (x @ row).mean()
    found = find_intercept(module, NAME, ANSWERED, PROMPTS, OPENINGS).row.double().numpy()
    np.testing.assert_allclose(found, row, rtol=1e-3, atol=1e-3 * np.abs(row).max())


def test_it_is_added_as_one_rank_more_of_its_own_tensor() -> None:
    b, a = torch.randn(6, 2), torch.randn(2, 9)
    column, row = torch.randn(6), torch.randn(9)
    moved = Intercept("w", column, row).added_to({"w": (b, a), "v": (b, a)}, -1.5)
    assert moved["v"][0] is b
    assert moved["v"][1] is a
    expected = b.double().numpy() @ a.double().numpy() - 1.5 * np.outer(column.double().numpy(), row.double().numpy())
    np.testing.assert_allclose(moved["w"][0].double().numpy() @ moved["w"][1].double().numpy(), expected, atol=1e-5)


def test_odds_that_do_not_depend_on_the_layer_are_refused() -> None:
    module = tiny_module("qwen2")
    with torch.no_grad():
        module.lm_head.weight.zero_()
    with pytest.raises(TrailmedError, match="do not depend on what"):
        find_intercept(module, NAME, ANSWERED, PROMPTS, OPENINGS)

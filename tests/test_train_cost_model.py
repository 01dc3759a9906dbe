"""The losses of the cost model, and the gas limit that it stores."""

import pytest
import torch

from networks import POLICY_STEPS, CostModel, Predictor
from support.plan_config import to_action
from train_cost_model import expert_states, gas_limit, loss_fn, policy_loss


@pytest.mark.parametrize("error,gas", [(0.0, 1.0), (0.1, 1.0), (0.15, 0.5), (1.0, 0.5)])
def test_full_gas_is_for_nets_whose_rollouts_hold(error, gas, capsys):
    """Of copy-last's error, `error` is left: a rollout is so far from the truth."""
    z = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0)).cumsum(1)

    class Dreamer(Predictor):
        def rollout(self, z0, act):
            return z[:, 1:] + error**0.5 * (z[:, :1] - z[:, 1:])

    class Held:
        swapped = staticmethod(lambda i: torch.zeros(40, 5, 3))
        __call__ = staticmethod(lambda i: (z, torch.zeros(40, 5, 3)))

    assert gas_limit(Dreamer(8, 4, 4), Held(), torch.device("cpu"), torch.float32) == gas
    assert f"is {error:.3f} of copy-last's" in capsys.readouterr().out


def test_the_policy_learns_what_the_expert_does_in_real_and_imagined_states():
    torch.manual_seed(0)
    predictor, cost = Predictor(8, 16, 6), CostModel(10, 16, state=6)
    z, act = torch.randn(5, 6, 10), to_action(2 * torch.rand(5, 5, 2) - 1)
    h, what = expert_states(predictor, z, act)
    assert h.shape == (30, 6) and what.shape == (30, POLICY_STEPS, 3)
    assert torch.equal(h[:15], predictor.to_state(z[:, :3, :8]).flatten(0, 1))
    assert torch.equal(h[15:], predictor.states(z[:, 0, :8], act)[:, :3].flatten(0, 1))
    for i in (0, 15):  # the second state of the first window
        assert torch.equal(what[i + 1], act[0, 1 : 1 + POLICY_STEPS])

    optim = torch.optim.Adam(cost.policy.parameters(), 0.01)
    before = policy_loss(cost, h, what).item()
    for _ in range(300):
        optim.zero_grad()
        policy_loss(cost, h, what).backward()
        optim.step()
    assert policy_loss(cost, h, what).item() < 0.3 * before


def test_a_few_steps_put_random_driving_and_mistakes_above_the_expert():
    """And the value head near its targets."""
    torch.manual_seed(0)
    cost = CostModel(6, 32, state=6)
    expert, random, recovery = (torch.randn(200, 6) + shift for shift in (0.0, 1.5, -1.5))
    target, h, act = torch.full((200,), 0.7), torch.randn(20, 6), torch.zeros(20, POLICY_STEPS, 3)
    of = {"cost": cost}, expert, random, recovery, target, h, act
    optim = torch.optim.Adam(cost.parameters(), 0.01)
    first, _ = loss_fn(*of)
    for _ in range(100):
        optim.zero_grad()
        loss, logs = loss_fn(*of)
        loss.backward()
        optim.step()
    assert loss < 0.2 * first and loss.item() == pytest.approx(sum(logs.values()).item())
    for kind, other in (("classifier", random), ("mistake", recovery)):
        assert cost.energy(other, kind).median() > 2 > -2 > cost.energy(expert, kind).median()
    assert cost.predicted_value(recovery).mean().item() == pytest.approx(0.7, abs=0.05)

"""The planner on a problem whose answer is known, and the noise against its stated spectrum."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_networks import random_nets

from drive_mpc import DECAY, LEAST_STD, Plan, plan, propose
from networks import OOD_THRESHOLD, POLICY_STEPS, CostModel
from support.checkpoints import load_models
from support.cli import Parser
from support.plan_config import (
    BRAKE,
    STEER,
    PlanConfig,
    ar1_noise,
    clip_plan,
    planning,
    powerlaw_noise,
    shift,
    take_gas,
    to_action,
    to_plan,
)
from support.rollout_cost import RolloutCost


def cart(z, act):
    """A point on a line, z (N, 2) its position and speed: pushed by the steering, slowed by the
    brake -> its future (N, H, 2)."""
    out = []
    for a in act.unbind(1):
        x, v = z.unbind(-1)
        v = v + 0.5 * a[:, 0] - a[:, 2] * v
        z = torch.stack([x + v, v], -1)
        out.append(z)
    return torch.stack(out, 1)


GOAL = 1.5  # where the point wants to stand


def rollout_cost(z, act):
    x, v = cart(z.expand(len(act), -1), act).unbind(-1)
    return ((x - GOAL) ** 2 + 0.1 * v**2).sum(1)


def config(planner, **changes):
    """The settings as they are by default, but for these."""
    return replace(PlanConfig(planner=planner, samples=512, max_gas=1.0), **changes)


@pytest.mark.parametrize("noise", ["ar1", "powerlaw"])
@pytest.mark.parametrize(
    "planner,iterations",
    [("shooting", None), ("icem", None), ("icem", 1), ("mppi", None), ("mppi", 2)],
)
def test_the_planner_reaches_a_known_goal(planner, iterations, noise):
    generator = torch.Generator().manual_seed(0)
    z, last, cfg = (
        torch.zeros(1, 2),
        Plan.none(15),
        config(planner, iterations=iterations, noise_kind=noise),
    )
    for _ in range(40):
        last, costs = plan(z, rollout_cost, last, cfg, generator)
        assert last.u.shape == (15, 2) and last.u.abs().max() <= 1
        z = cart(z, to_action(last.u[:1])[None])[:, 0]
    assert abs(float(z[0, 0]) - GOAL) < 0.25, z
    assert len(costs) == (int(512 / DECAY**2) if planner == "icem" and not iterations else 512)


def test_icem_by_default_is_more_than_shooting():
    """Summed over a drive, its plans cost less than those of shooting with as many rollouts."""
    costs = {}
    for planner, samples in (("shooting", 156), ("icem", 64)):  # 64 + 64 (twice the elites) + ...
        cfg = config(planner, samples=samples, elites=10)
        generator, z, last, seen = (
            torch.Generator().manual_seed(1),
            torch.zeros(1, 2),
            Plan.none(15),
            [],
        )
        told = lambda z, act: (seen.append(len(act)), rollout_cost(z, act))[1]
        costs[planner] = 0.0
        for _ in range(30):
            last, _ = plan(z, told, last, cfg, generator)
            costs[planner] += float(rollout_cost(z, to_action(last.u[None])))
            z = cart(z, to_action(last.u[:1])[None])[:, 0]
        assert sum(seen) / 30 == (64 + 51 + 40 if planner == "icem" else 156)
    assert costs["icem"] < 0.97 * costs["shooting"], costs


def test_icem_keeps_elites_and_shifts_them_into_the_next_plan():
    cfg, seen = config("icem", samples=100, elites=20, noise_kind="powerlaw"), []
    told = lambda z, act: (seen.append(act), rollout_cost(z, act))[1]
    generator = torch.Generator().manual_seed(0)
    first, costs = plan(torch.zeros(1, 2), told, Plan.none(15), cfg, generator)
    assert [len(act) for act in seen] == [100, 80, 64]  # decayed by 1.25
    many = config("icem", iterations=9, samples=100, elites=20)
    assert len(plan(torch.zeros(1, 2), rollout_cost, first, many)[1]) == 40  # twice the elites
    assert len(first.elites) == 20
    elite_costs = rollout_cost(torch.zeros(1, 2), to_action(first.elites))
    assert torch.equal(elite_costs, elite_costs.sort()[0]) and torch.equal(
        elite_costs[0], costs.min()
    )
    assert torch.equal(first.u, first.elites[0]) and not torch.equal(first.u, first.mean)
    of = lambda plans, n: {tuple(p.flatten().tolist()) for p in plans[:, :n]}
    for earlier, later in zip(seen, seen[1:]):  # 30 % of the elites of the round before
        best = earlier[rollout_cost(torch.zeros(1, 2), earlier).argsort()[:6]]
        assert of(best, 15) <= of(later, 15)
    seen.clear()
    plan(torch.zeros(1, 2), told, first, cfg, generator)
    assert torch.equal(seen[0][0], to_action(shift(first.mean)))
    assert of(to_action(first.elites[:6, 1:]), 14) <= of(seen[0], 14)  # a step later
    ends = to_action(first.elites[:6, -1:]).squeeze(1)
    assert not (seen[0][-6:, -1] == ends).all(dim=1).any()  # the last action is drawn anew


def test_icem_never_narrows_below_its_least_spread():
    """Even where the elites are all alike, it goes on looking around them."""
    cfg, seen = config("icem", iterations=12, samples=400, elites=4), []
    bowl = lambda act: (act[:, :, 0] ** 2).sum(1) + act[:, :, 1].sum(1) + 1
    flat = lambda z, act: (seen.append(act), bowl(act))[1]
    plan(torch.zeros(1, 2), flat, Plan.none(6), cfg, torch.Generator().manual_seed(0))
    for act in seen[-3:]:
        assert (act[..., 0] / STEER).std() > 0.5 * LEAST_STD


@pytest.mark.parametrize("samples,elites,horizon", [(2, 32, 15), (3, 1, 1), (8, 100, 2)])
@pytest.mark.parametrize("planner", ["shooting", "icem", "mppi"])
def test_few_samples_and_short_horizons_plan_too(planner, samples, elites, horizon):
    for noise in ("ar1", "powerlaw"):
        cfg, last = (
            config(planner, samples=samples, elites=elites, noise_kind=noise),
            Plan.none(horizon),
        )
        for _ in range(3):
            last, _ = plan(torch.zeros(1, 2), rollout_cost, last, cfg)
        assert last.u.shape == (horizon, 2) and last.u.isfinite().all()


@pytest.mark.parametrize("iterations", [1, 3])
def test_mppi_is_the_mean_of_its_elites_weighted_by_energy(iterations):
    """The default planner against plain loops, over three plans."""
    cfg = config("mppi", samples=64, iterations=iterations)
    last, u = Plan.none(5), torch.zeros(5, 2)
    root = torch.linalg.cholesky(0.8 ** (torch.arange(5)[:, None] - torch.arange(5)).abs().double())
    g, h, z = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0), torch.zeros(1, 2)
    for _ in range(3):
        last, costs = plan(z, rollout_cost, last, cfg, g)
        u, best = torch.cat([u[1:], u[-1:]]), None
        for _ in range(cfg.iterations):
            noise = torch.randn(64, 5, 2, generator=h)
            drawn = torch.stack(
                [(u + torch.tensor([0.4, 0.5]) * (root.float() @ n)).clamp(-1, 1) for n in noise]
            )
            drawn[0] = u
            if best is not None:
                drawn[-32:] = best  # elites stay candidates
            cost = rollout_cost(z, to_action(drawn))
            order = cost.argsort(stable=True)[:32]
            best, low = drawn[order], cost[order]
            weights = torch.softmax((low.min() - low) / low.std(correction=0), 0)
            u = sum(w * plan for w, plan in zip(weights, best))
        assert torch.allclose(costs, cost, rtol=1e-4) and torch.allclose(last.u, u, atol=1e-5)
        assert last.u is last.mean


def test_warm_start_pays():
    """With few samples, shifting the last plan finds lower costs than starting from nothing."""
    lows = []
    for warm in (True, False):
        generator, z, last, low = (
            torch.Generator().manual_seed(1),
            torch.zeros(1, 2),
            Plan.none(15),
            0.0,
        )
        for _ in range(25):
            last, e = plan(
                z,
                rollout_cost,
                last if warm else Plan.none(15),
                config("mppi", samples=48),
                generator,
            )
            z, low = cart(z, to_action(last.u[:1])[None])[:, 0], low + float(e.min())
        lows.append(low)
    assert lows[0] < lows[1]


@pytest.mark.parametrize("planner", ["shooting", "icem", "mppi"])
def test_when_all_rollouts_cost_the_same_the_last_plan_goes_on(planner):
    u = torch.linspace(-1, 1, 30).view(15, 2)
    last = Plan(u, 0.5 * u, u[None])
    now, costs = plan(torch.zeros(1, 2), lambda z, act: torch.ones(len(act)), last, config(planner))
    assert torch.equal(now.u[:-1], u[1:]) and costs.std() == 0
    assert torch.equal(now.mean[:-1], 0.5 * u[1:])


def white(N, H):
    return torch.randn(N, H, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8, 0.95])
def test_ar1_noise_keeps_variance_and_has_its_spectrum(rho):
    H = 15
    x = ar1_noise(white(20_000, H), rho).double()
    assert x.std(dim=0).sub(1).abs().max() < 0.03  # at each step: nothing is lost at either end
    for lag in (1, 3, 7):
        assert float((x[:, lag:] * x[:, :-lag]).mean()) == pytest.approx(rho**lag, abs=0.02)
    power = torch.fft.rfft(x[..., 0], dim=1).abs().pow(2).mean(dim=0) / H
    k = np.arange(H)
    lag = k[:, None] - k
    expected = [
        (rho ** abs(lag) * np.cos(2 * np.pi * f * lag / H)).sum() / H for f in range(H // 2 + 1)
    ]
    assert np.allclose(power.numpy(), expected, rtol=0.05)


@pytest.mark.parametrize("H", [1, 2, 15, 16, 200])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_powerlaw_noise_has_unit_variance_and_the_slope_of_its_exponent(beta, H):
    x = powerlaw_noise(white(20_000, H), beta).double()
    assert x.shape == (20_000, H, 2)
    assert x.var(dim=0).sub(1).abs().max() < 0.06 and x.mean(dim=0).abs().max() < 0.03
    power = torch.fft.rfft(x, dim=1).abs().pow(2).mean(dim=(0, 2))
    if H > 2:
        k = np.arange(1, len(power))
        slope = np.polyfit(np.log(k), np.log(power[1:].numpy()), 1)[0]
        assert slope == pytest.approx(-beta, abs=0.03)
        assert power[0] / power[1] == pytest.approx(1, abs=0.05)  # a plan may hold what it does
    if beta == 0:
        assert (x[:, 1:] * x[:, :-1]).mean().abs() < 0.02 or H == 1


@pytest.mark.parametrize("kind", ["ar1", "powerlaw"])
def test_plans_are_drawn_with_the_noise_that_the_flags_ask_for(kind):
    cfg = config("mppi", noise_kind=kind, rho=0.5, beta=1.5, noise=[0.1, 0.2])
    generator = torch.Generator().manual_seed(0)
    drawn = cfg.draw_plans(4000, torch.full((15, 2), 0.1), torch.tensor(cfg.noise), generator)
    noise = (
        ar1_noise(white(4000, 15), 0.5) if kind == "ar1" else powerlaw_noise(white(4000, 15), 1.5)
    )
    assert torch.allclose(drawn, (0.1 + noise * torch.tensor([0.1, 0.2])).clamp(-1, 1))


def test_actions_cover_full_lock_and_braking():
    u = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    assert torch.allclose(
        to_action(u), torch.tensor([[STEER, 1.0, 0.0], [-STEER, 0.0, BRAKE], [0.0, 0.0, 0.0]])
    )
    assert STEER >= 0.4 and BRAKE >= 0.3  # the joint's stop; enough to lock up at speed


def test_a_plan_is_what_its_actions_say():
    u = 2 * torch.rand(50, 4, 2, generator=torch.Generator().manual_seed(0)) - 1
    assert torch.allclose(to_plan(to_action(u)), u, atol=1e-6)
    far = to_plan(torch.tensor([[-1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    assert torch.equal(far, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))


@pytest.mark.parametrize("horizon", [2, 15, 16])
def test_proposals_are_what_the_policy_does_in_the_dream(horizon):
    """A few steps at a time; the others are near it, and none has more gas than it may."""
    nets, z = random_nets(), torch.randn(1, 8)
    predictor, cost = nets["predictor"], CostModel(8, state=6).requires_grad_(False)
    cfg = PlanConfig(samples=40, max_gas=0.3, horizon=horizon, policy_share=0.25, policy_noise=0.1)
    plans = propose(z, predictor, cost, cfg, torch.Generator().manual_seed(0))
    assert plans.shape == (10, horizon, 2) and plans[..., 1].max() <= 0.3

    h = predictor.to_state(z)
    for t in range(horizon):
        if t % POLICY_STEPS == 0:
            u = clip_plan(cost.expert_plan(h)[0], 0.3)
        now = u[t % POLICY_STEPS]
        assert torch.allclose(plans[0, t], now, atol=1e-6)
        h = predictor.transition(h, to_action(now)[None])
    first = (plans[1:, 0] - plans[0, 0]).std(dim=0)
    assert (first > 0).any() and (first < 0.1).all()
    assert propose(z, predictor, cost, replace(cfg, policy_share=0)).shape == (0, horizon, 2)


def test_a_proposal_that_is_best_is_followed():
    """Also where noise around the last plan would not find it, and with few candidates."""
    z, best = torch.zeros(1, 2), torch.ones(1, 15, 2)
    cost = lambda z, act: (act - to_action(best)).abs().sum((1, 2))
    for planner in ("shooting", "icem"):
        cfg = config(planner, noise=(0.01, 0.01), iterations=1)
        with_it, _ = plan(z, cost, Plan.none(15), cfg, proposals=best)
        without, _ = plan(z, cost, Plan.none(15), cfg)
        assert torch.equal(with_it.u, best[0]) and without.u.max() < 0.1
    few = replace(cfg, samples=2, planner="shooting")
    assert torch.equal(
        plan(z, cost, Plan.none(15), few, proposals=best.repeat(5, 1, 1))[0].u, best[0]
    )


def test_no_plan_has_more_gas_than_it_may():
    u = 3 * torch.randn(1000, 5, 2, generator=torch.Generator().manual_seed(0))
    kept = clip_plan(u, 0.4)
    assert kept[..., 1].max() == 0.4 and kept.min() == -1 and kept[..., 0].max() == 1
    inside = (u[..., 0].abs() <= 1) & (u[..., 1] <= 0.4) & (u[..., 1] >= -1)
    assert torch.equal(kept[inside], u[inside])
    z, seen = torch.zeros(1, 2), []
    told = lambda z, act: (seen.append(act), rollout_cost(z, act))[1]
    for planner in ("shooting", "icem", "mppi"):
        for noise in ("ar1", "powerlaw"):
            cfg, last = config(planner, max_gas=0.4, noise_kind=noise), Plan.none(12)
            for seed in range(3):
                last, _ = plan(z, told, last, cfg, torch.Generator().manual_seed(seed))
            assert 0.39 < max(act[..., 1].max() for act in seen) <= 0.4
            assert last.u[:, 1].max() <= 0.4
            seen.clear()


def test_the_gas_limit_is_the_cost_models_unless_it_is_given(capsys):
    for flags, payload, gas, said in (
        ((), {"max_gas": 0.5}, 0.5, "gas up to 0.5, stored with"),
        (("--max_gas", "0.7"), {"max_gas": 0.5}, 0.7, ""),
        ((), {}, 1.0, "no limit is stored"),
    ):
        p = Parser("")
        planning(p)
        cfg = p.parse_args(list(flags))
        take_gas(cfg, payload)
        take_gas(cfg, payload)
        out = capsys.readouterr().out
        assert cfg.max_gas == gas and said in out and out.count("\n") == bool(said)


@pytest.mark.parametrize(
    "flags,word",
    [
        ("--samples 1", "from 2"),
        ("--rho 1", "to 0.9999"),
        ("--beta -1", "from 0"),
        ("--max_gas 1.5", "to 1"),
        ("--noise nan 1", "from 0"),
        ("--iterations 0", "from 1"),
        ("--noise_kind pink", "powerlaw"),
    ],
)
def test_flags_of_the_planner_have_stated_ranges(flags, word, capsys):
    p = Parser("")
    planning(p)
    with pytest.raises(SystemExit) as end:
        p.parse_args(flags.split())
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and word in said


@pytest.mark.parametrize("kind", ["value", "density", "classifier"])
@pytest.mark.parametrize("H", [15, 4, 1])
@pytest.mark.parametrize("far", [0.9, 1.1])
def test_the_folded_rollout_cost_is_the_plain_one(kind, H, far):
    """Folded weights in one pass cost the same as a rollout that is scored after it."""
    nets = random_nets()
    cost, act = nets["cost"], torch.randn(32, H, 3)
    away = torch.randn(1, 8)
    ray = cost.mu[None] + torch.linspace(0, 50, 20_001)[:, None] * away
    beyond = cost.energy(ray) > far * OOD_THRESHOLD * cost.random_energy
    z = ray[beyond.nonzero()[:1, 0]]  # just beyond that share of where out of distribution begins
    assert cost.is_ood(z) == (far > 1)
    expected = cost.rollout_cost(z, nets["predictor"].rollout(z.expand(32, -1), act), kind)
    folded = RolloutCost(**nets, kind=kind)
    for _ in range(2):  # nothing is left of the first
        assert torch.allclose(folded(z, act), expected, rtol=1e-4, atol=1e-4)


def test_costs_in_bfloat16_rank_plans_alike():
    nets, _, _ = load_models(".", None, torch.device("cpu"))
    of = nets["predictor"], nets["cost"], "value"
    generator = torch.Generator().manual_seed(0)
    z = nets["cost"].mu[None] + 0.1 * torch.randn(1, nets["predictor"].dim, generator=generator)
    cfg = PlanConfig(max_gas=1.0)
    u = cfg.draw_plans(256, torch.zeros(15, 2), torch.tensor(cfg.noise), generator)
    exact, fast = (
        RolloutCost(*of, dtype=d)(z, to_action(u)) for d in (torch.float32, torch.bfloat16)
    )
    assert fast.dtype == torch.float32 and not torch.equal(exact, fast)
    best, found = (set(c.topk(32, largest=False).indices.tolist()) for c in (exact, fast))
    assert len(best & found) >= 30
    assert torch.allclose(exact, fast, rtol=0.03)

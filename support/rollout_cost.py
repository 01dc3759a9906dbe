"""The cost of many candidate plans at once, in fewer operations than the nets' own methods take."""

import math
from copy import deepcopy

import torch
import torch.nn.functional as F

from networks import DISCOUNT, VALUE_WEIGHT, normalize_action, scored_steps


class RolloutCost:
    """Costs of many candidates from one latent: (z (1, D), act (N, H, 3)) -> (N,), float32.

    It computes CostModel.rollout_cost of Predictor.rollout. For the density, `to_latent` and
    `whiten` are one product, of the `scored_steps` only. The states have S numbers, so a
    whitened latent moves in S directions only: S numbers and a constant tell its norm.

    turned: rad that the car is off its way, + to the left, if that is known; see `support.heading`.
    For the value, headings on the wrong way cost too, out of distribution. A car that already goes
    the wrong way is out of distribution.
    """

    def __init__(self, predictor, cost, kind, turn_readout=None, dtype=torch.float32):
        """turn_readout: of `support.heading`; without it headings never count.

        dtype: bfloat16 takes half of float32's time for products. All sums stay float32.
        """
        self.predictor, self.cost, self.kind = predictor, cost, kind
        self.turn_readout = turn_readout
        self.dtype = dtype if dtype == torch.bfloat16 else torch.float32
        of_state = predictor.to_latent.weight.T @ cost.whiten  # (S, D)
        self.directions, reach = torch.linalg.qr(of_state.mT.double())  # (D, S), (S, S)
        self.directions = self.directions.float()
        self.whiten = reach.mT.to(self.dtype)
        self.mistake = deepcopy(cost.mistake[1:]).to(self.dtype)  # behind `to_mistake`
        self.to_mistake = predictor.to_latent.weight.T @ cost.mistake[0].weight.T  # (S, hidden)
        self.to_mistake = self.to_mistake.to(self.dtype)
        self.w_in = predictor.into.weight.T.contiguous().to(self.dtype)
        self.b_in = predictor.into.bias.to(self.dtype)
        self.w_out = predictor.out.weight.T.contiguous().to(self.dtype)

    @torch.inference_mode()
    def __call__(self, z, act, turned=None):
        N, H, _ = act.shape
        p, cost = self.predictor, self.cost
        z = z[:, : p.dim]
        if self.kind == "classifier":
            return cost.rollout_cost(z, p.rollout(z.expand(N, -1), act), self.kind)

        # present: state, what it does not carry, and both whitened
        turned = turned if self.turn_readout else None
        wrong_way = turned is not None and abs(turned) > math.pi / 2
        ood = self.kind == "value" and (wrong_way or cost.is_ood(z))
        turned = turned if ood else None
        h, a = p.to_state(z), normalize_action(act).transpose(0, 1)
        residual = p.residual(z, h, H)[0] + p.to_latent.bias  # (H, D)
        rest = (residual - cost.mu) @ cost.whiten  # (H, D)
        bias = rest @ self.directions  # (H, S)
        constant = rest.square().sum(1) - bias.square().sum(1)  # (H,)
        mistake_bias = cost.mistake[0](residual).to(self.dtype)  # (H, hidden)
        if turned is not None:
            weights, offset = self.turn_readout
            turn_weights = p.to_latent.weight.T @ weights  # (S,)
            turn_bias = residual @ weights + offset

        # roll out: x holds states and actions
        state, x = h.repeat(N, 1), h.new_empty(N, p.into.in_features, dtype=self.dtype)
        heading = z.new_full((N,), turned or 0)
        kept, headings, scored = [], [], scored_steps(H)
        for t in range(H):
            x[:, : p.state], x[:, p.state :] = state, a[t]
            hidden = F.silu(torch.addmm(self.b_in, x, self.w_in), inplace=True)
            state += hidden @ self.w_out
            if turned is not None:
                heading = heading + state @ turn_weights + turn_bias[t]
            if t in scored:
                kept.append(state.to(self.dtype, copy=True))  # it changes in place
                headings.append(heading)

        # energies of the scored steps (T, N), all at once
        kept, some = torch.stack(kept), slice(scored.start, None, scored.step)  # (T, N, S)
        norms = torch.linalg.vector_norm(bias[some, None] + kept @ self.whiten, dim=2)
        energy = (norms.square() + constant[some, None]).clamp_min(0).mul(0.5 / p.dim)
        if ood:
            energy = cost.saturate(energy)
        elif self.kind == "value":
            logit = self.mistake(mistake_bias[some, None] + kept @ self.to_mistake)
            energy = energy + cost.mistake_energy(logit.squeeze(-1).float())
        if turned is not None:
            energy = energy + cost.wrong_way(torch.stack(headings))
        total = H * energy.mean(dim=0)

        if ood:
            last = torch.addmm(residual[-1], state, p.to_latent.weight.T)
            value = cost.terminal_value(last)
            if turned is not None:
                value = value + VALUE_WEIGHT * cost.wrong_way(heading)
            total.add_(value, alpha=DISCOUNT**H)
        return total

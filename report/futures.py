"""Part 3: which futures are found impossible.

Surprise is the distance between predicted and actual latents, in units of the rollout's expected
error. True futures stand against violated ones, as films of 1, 5 and 15 latents. A violation counts
only where it makes another future:

    teleports                       the road is in view
    frozen, reversed, double speed  the car moves
    swapped and mirrored actions    the two action sequences differ

Two controls should not alarm: the light changes, or another light lasts throughout. So surprise
looks at the planned part of a latent only: the looks see the light.
"""

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf

from buffer import history_rows
from car.telemetry import IN_VIEW, TELEMETRY
from demo_energy import MIN_JUMP, TeleportedCar
from networks import normalize_action
from report.episodes import BLOCK, TRAINED, UNTRAINED, channels_first, choose_samples, other_episode
from report.probes import AHEAD
from report.statistics import auc, bootstrap_intervals
from support.augment import jitter_
from support.latents import ridge
from support.progress import progress

SCORERS = TRAINED, UNTRAINED, "pixel error", "copy-last"
MOVING = 5.0  # units/s, from which a film shows direction and speed
UNLIKE = 0.5  # mean distance of two action sequences, in units of their usual size
STEERED = 0.03  # mean |steer| from which a mirrored sequence is another one
CLIP_QUANTILE = 0.01  # of the squared errors: smaller ones count as that quantile

FILMS = {  # the offsets that a film shows in place of the true ones, j latents after the present
    "true": lambda j: j,
    "frozen": lambda j: np.minimum(j, 0),
    "time reversed": lambda j: -np.abs(j),
    "double speed": lambda j: j + np.maximum(j, 0),
}
TIME = tuple(FILMS)[1:]
TELEPORTS = "teleport, same track", "teleport, other track"
ACTIONS = "swapped actions", "mirrored steering"  # the film is true, the rollout's actions are not
THROUGHOUT = "colour throughout (control)"  # the present is seen in that light too
COLOURS = "colour changes (control)", THROUGHOUT
VIOLATIONS = (*TELEPORTS, *TIME, *ACTIONS, *COLOURS)


def teleported(models, samples, seed):
    """{violation: frames (n, len(AHEAD), history, 64, 64, 3)} of a car that is placed elsewhere.

    The car keeps its pose and speed. It is seen as far along its own track, or the next episode's
    track, as it was here.
    """
    e, rng = models.encoder, np.random.default_rng([seed, 7])
    shape = len(samples), len(AHEAD), e.history, 64, 64, 3
    out = {name: np.zeros(shape, np.uint8) for name in TELEPORTS}
    places = list(dict.fromkeys(samples.e))
    for i, place in enumerate(progress(places, desc="teleport", unit="track", leave=False)):
        car = TeleportedCar(samples.episodes[place].track, rng)
        for name, guest in zip(TELEPORTS, (place, places[i - 1])):
            for row in np.flatnonzero(samples.e == guest):
                x = samples.episodes[guest]
                jump = car.random_offset(MIN_JUMP if guest == place else 0)
                for a, h in enumerate(AHEAD):
                    k = samples.k[row] + h
                    state = dict(zip(TELEMETRY, x.state[k].tolist()))
                    last = x.actions[max(0, k * e.repeat - 2 * e.span) : k * e.repeat]
                    frames = car.frames(state, last, e.span, jump)
                    out[name][row, a] = frames[history_rows([e.span - 1], e.history, e.repeat)[0]]
        car.env.close()
    return out


def color_jitter(obs, generator):
    """obs (n, history, 3, 64, 64) in random light, one draw a row."""
    out = []
    for part in obs.flatten(1, 2).split(BLOCK):
        x = part.clone(memory_format=torch.channels_last)
        jitter_(x, generator)
        out.append(x)
    return torch.cat(out).unflatten(1, (-1, 3))


def valid_mask(samples, other):
    """{violation: (n, len(AHEAD)) bool}: where it makes another future of this one."""
    act, every = samples.act(max(AHEAD)), np.ones((len(samples), len(AHEAD)), bool)
    distance = (normalize_action(act) - normalize_action(act[other])).norm(dim=2).numpy()
    mean = lambda x: np.stack([x[:, :h].mean(axis=1) for h in AHEAD], axis=1)
    return {
        **dict.fromkeys(TELEPORTS, np.stack([samples.within(IN_VIEW, h) for h in AHEAD], axis=1)),
        **dict.fromkeys(TIME, every & (samples.state("speed") > MOVING)[:, None]),
        "swapped actions": mean(distance) > UNLIKE,
        "mirrored steering": mean(np.abs(act[..., 0].numpy())) > STEERED,
        **dict.fromkeys(COLOURS, every),
    }


def expectations(models, samples, other, seed):
    """{nets: {condition: (z now (n, D), z_hat (n, len(AHEAD), D))}} of trained and untrained nets.

    A condition is what a rollout starts from: the true present and actions, the actions of a
    violation, or the present in another light.
    """
    act, steps, out = samples.act(max(AHEAD)), [h - 1 for h in AHEAD], {}
    actions = {
        "true": act,
        "swapped actions": act[other],
        "mirrored steering": act * torch.tensor([-1.0, 1, 1]),
        THROUGHOUT: act,
    }
    for name, (encoder, predictor) in models.pairs().items():
        light, out[name] = torch.Generator().manual_seed(seed), {}
        jittered = models.encode_samples(encoder, samples, lambda obs: color_jitter(obs, light))
        for condition, a in actions.items():
            z = jittered if condition == THROUGHOUT else samples.z(0, 0, name)[:, 0]
            z = z[:, : encoder.planned]
            out[name][condition] = z, models.rollout(predictor, z, a)[:, steps]
    return out


class Scale:
    """The unit of a scorer's surprise: its expected error at the steps AHEAD.

    A rollout predicts some directions of the latent better than others. An error is therefore
    measured in standard deviations of every direction (Mahalanobis distance, covariance shrunk
    after Ledoit and Wolf 2004). A slide is harder to predict than a straight. So the squared error
    is divided by its expected value, whose logarithm a ridge regression predicts from the present
    and the predicted latent (multiplicative heteroscedasticity, Harvey 1976).
    """

    def __init__(self, now, z_hat, z):
        """now (n, D), predicted z_hat and actual z (n, len(AHEAD), D) of true futures."""
        self.whiten, self.expected = [], []
        for a in range(z.shape[1]):
            error = (z - z_hat)[:, a]
            cov = torch.from_numpy(ledoit_wolf(error.double().numpy(), assume_centered=True)[0])
            self.whiten.append(torch.linalg.cholesky(torch.linalg.inv(cov)).float())
            squares = self.squares(error, a)
            least = max(np.quantile(squares, CLIP_QUANTILE), 1e-9)  # a parked car has errors of 0
            logs = np.log(squares.clip(least))
            fit = ridge(torch.cat([now, z_hat[:, a]], dim=1).numpy(), logs, alpha=10.0)
            self.expected.append((fit, logs.min(), logs.max()))

    def squares(self, error, a):
        """(n,): mean squares of whitened errors (n, D)."""
        return (error @ self.whiten[a]).pow(2).mean(dim=1).numpy()

    def __call__(self, z, now, z_hat, a):
        """(n,): surprise of latents z (n, D), AHEAD[a] after `now`; about 1 for usual errors.

        The expected error stays within the range seen in the fit.
        """
        fit, least, most = self.expected[a]
        logs = fit.predict(torch.cat([now, z_hat], dim=1).numpy())
        return self.squares(z - z_hat, a) / np.exp(logs.clip(least, most))


def fit_scales(models, train, cfg):
    """{scorer: Scale} of the scorers that read latents, from windows of training episodes."""
    samples = choose_samples(train, cfg.train_frames, cfg.seed, ahead=max(AHEAD))
    act, steps, out = samples.act(max(AHEAD)), [h - 1 for h in AHEAD], {}
    for name, (encoder, predictor) in models.pairs().items():
        z = samples.z(0, max(AHEAD), name)[..., : encoder.planned]
        now, future = z[:, 0], z[:, list(AHEAD)]
        out[name] = Scale(now, models.rollout(predictor, now, act)[:, steps], future)
        if name == TRAINED:
            out["copy-last"] = Scale(now, now[:, None].expand_as(future), future)
    return out


def surprises(models, samples, other, scales, seed):
    """{scorer: {"true" or violation: (n, len(AHEAD))}}: how far each future is from the expected.

    A future is the film up to a step, seen at those steps of AHEAD that it has. Its largest
    surprise counts.
    """
    expected = expectations(models, samples, other, seed)
    elsewhere = teleported(models, samples, seed)
    zeros = lambda: np.zeros((len(samples), len(AHEAD)))
    out = {scorer: {v: zeros() for v in ("true", *VIOLATIONS)} for scorer in SCORERS}
    films = [v for v in out[TRAINED] if v not in ACTIONS]
    todo = [(a, h, film) for a, h in enumerate(AHEAD) for film in films]
    for a, h, film in progress(todo, desc="surprise", unit="film", leave=False):
        # the last frames of the film, and the frames of the present
        obs = samples.frames(FILMS.get(film, FILMS["true"])(h + models.frame_offsets()))
        now = samples.frames(models.frame_offsets())
        if film in TELEPORTS:
            obs = channels_first(elsewhere[film][:, a])
        if film in COLOURS:
            obs = color_jitter(obs, torch.Generator().manual_seed(seed))
        if film == THROUGHOUT:
            now = color_jitter(now, torch.Generator().manual_seed(seed))

        # violated actions are scored on the true film
        scored = ("true", *ACTIONS) if film == "true" else (film,)
        for v in scored:
            change = (obs[:, -1].float() - now[:, -1].float()).abs()
            out["pixel error"][v][:, a] = change.mean(dim=(1, 2, 3))
        for name, (encoder, _) in models.pairs().items():
            z = models.encode(encoder, obs)[:, : encoder.planned]
            for v in scored:
                z0, z_hat = expected[name].get(v, expected[name]["true"])
                out[name][v][:, a] = scales[name](z, z0, z_hat[:, a], a)
                if name == TRAINED:
                    out["copy-last"][v][:, a] = scales["copy-last"](z, z0, z0, a)
    return {
        scorer: {v: np.maximum.accumulate(x, axis=1) for v, x in rows.items()}
        for scorer, rows in out.items()
    }


def evaluate_violations(models, train, samples, cfg):
    """Part 3: {violation: {scorer: {h: {"auroc": estimate}}}}."""
    other, out = other_episode(samples, cfg.seed), {}
    surprise = surprises(models, samples, other, fit_scales(models, train, cfg), cfg.seed)
    masks = valid_mask(samples, other)
    for violation, mask in progress(masks.items(), desc="futures", leave=False):
        out[violation] = {scorer: {} for scorer in SCORERS}
        for a, h in enumerate(AHEAD):
            rows = np.flatnonzero(mask[:, a])
            for scorer in SCORERS:
                pair = [surprise[scorer][v][rows, a] for v in (violation, "true")]
                (auroc,) = bootstrap_intervals(auc, samples.track[rows], pair, cfg)
                out[violation][scorer][h] = {"auroc": auroc}
    return out

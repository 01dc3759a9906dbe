"""Part 3: which futures are found impossible."""

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import Ridge

from car.telemetry import TELEMETRY
from demo_energy import MIN_JUMP, TeleportedCar
from networks import normalize_action
from report.episodes import JUDGES, OWN, blocks, choose_samples, other_episode, planes
from report.probes import AHEAD, IN_VIEW, fit_standardised
from report.statistics import auc, cells
from support.augment import jitter_
from support.progress import progress

MOVING = 5.0  # units/s, from which a film shows which way and how fast it runs
UNLIKE = 0.5  # of two action sequences, mean distance in units of their usual size
STEERED = 0.03  # mean |steer| from which a mirrored one is another
FALSE_ALARMS = 0.01
CLIP_QUANTILE = 0.01  # of the squares of errors: smaller ones count as large as that quantile


# ------------------------------------------------------------------ 3. impossible futures

FILMS = {  # what a film shows, j latents after the present, as latents after the present
    "true": lambda j: j,
    "frozen": lambda j: np.minimum(j, 0),
    "time reversed": lambda j: -np.abs(j),
    "double speed": lambda j: j + np.maximum(j, 0),
}
TELEPORTS = "teleport, same track", "teleport, other track"
TOLD = "swapped actions", "mirrored steering"  # the film is true, the actions told are not
THROUGHOUT = "colour throughout (control)"  # the present is seen in that light too
COLOURS = "colour changes (control)", THROUGHOUT
VIOLATIONS = (*TELEPORTS, *list(FILMS)[1:], *TOLD, *COLOURS)


def teleported(subject, spots, args):
    """{violation: frames (n, len(AHEAD), history, 64, 64, 3)}: the car is put elsewhere once, its
    pose and speed kept, and seen there as far along as it was here, on its own track or on the
    next episode's."""
    e, rng = subject.encoder, np.random.default_rng([args.seed, 7])
    need = (e.history - 1) * e.repeat + 1
    out = {t: np.zeros((len(spots), len(AHEAD), e.history, 64, 64, 3), np.uint8) for t in TELEPORTS}
    places = list(dict.fromkeys(spots.e))
    for i, place in enumerate(progress(places, desc="teleport", unit="track", leave=False)):
        twin = TeleportedCar(spots.episodes[place].track, rng)
        for name, guest in zip(TELEPORTS, (place, places[i - 1])):
            for row in np.flatnonzero(spots.e == guest):
                x, jump = spots.episodes[guest], twin.jump(MIN_JUMP if guest == place else 0)
                for a, h in enumerate(AHEAD):
                    k = spots.k[row] + h
                    state = dict(zip(TELEMETRY, x.state[k].tolist()))
                    last = x.actions[max(0, k * e.repeat - 2 * need) : k * e.repeat]
                    frames = twin.frames(state, last, need, jump)
                    out[name][row, a] = frames[::-1][:: e.repeat][: e.history][::-1]
        twin.env.close()
    return out


def color_jitter(obs, generator):
    """obs (n, history, 3, 64, 64) in another light, one draw a row."""
    x = obs.flatten(1, 2).clone(memory_format=torch.channels_last)
    jitter_(x, generator)
    return x.unflatten(1, (-1, 3))


def shows(spots, other):
    """{violation: (n, len(AHEAD)) bool}: where it makes another future of this one."""
    act, every = spots.act(max(AHEAD)), np.ones((len(spots), len(AHEAD)), bool)
    moving = every & (spots.state("speed") > MOVING)[:, None]
    apart = (normalize_action(act) - normalize_action(act[other])).norm(dim=2).numpy()
    mean = lambda x: np.stack([x[:, :h].mean(axis=1) for h in AHEAD], axis=1)
    in_view = np.stack([spots.within(IN_VIEW, h) for h in AHEAD], axis=1)
    return {
        **dict.fromkeys(TELEPORTS, in_view),
        **dict.fromkeys(list(FILMS)[1:], moving),
        "swapped actions": mean(apart) > UNLIKE,
        "mirrored steering": mean(np.abs(act[..., 0].numpy())) > STEERED,
        **dict.fromkeys(COLOURS, every),
    }


def expectations(subject, spots, other, seed):
    """{judge: {premise: (z now (n, D), z_hat (n, len(AHEAD), D))}} of both pairs of nets; premises
    are the true ones, the actions of the TOLD violations, or a present in another light."""
    act, steps, out = spots.act(max(AHEAD)), [h - 1 for h in AHEAD], {}
    told = {
        "true": act,
        "swapped actions": act[other],
        "mirrored steering": act * torch.tensor([-1.0, 1, 1]),
        THROUGHOUT: act,
    }
    for judge, (encoder, predictor) in subject.pairs().items():
        light = torch.Generator().manual_seed(seed)
        now = spots.z(0, 0, judge)[:, 0]
        lit = subject.encode_now(encoder, spots, change=lambda obs: color_jitter(obs, light))
        z = {k: lit if k == THROUGHOUT else now for k in told}
        out[judge] = {
            k: (z[k], subject.imagine(predictor, z[k], a)[:, steps]) for k, a in told.items()
        }
    return out


class Scale:
    """The unit of a judge's surprise: its usual errors at the steps AHEAD, on training episodes.

    A dream knows some directions of the latent better than others, and all of them less the
    further ahead it looks: an error is measured in standard deviations, in every direction
    (Mahalanobis, covariance shrunk after Ledoit and Wolf 2004). It also knows less of a slide than
    of a straight: a line through present and dream tells the logarithm of what such a square
    usually is, by which it is divided (multiplicative heteroscedasticity, Harvey 1976).
    """

    def __init__(self, now, z_hat, came):
        """now (n, D), z_hat, came (n, len(AHEAD), D) of true futures."""
        self.whiten, self.usual = [], []
        for a in range(came.shape[1]):
            error = (came - z_hat)[:, a]
            cov = torch.from_numpy(ledoit_wolf(error.double().numpy(), assume_centered=True)[0])
            self.whiten.append(torch.linalg.cholesky(torch.linalg.inv(cov)).float())
            squares = self.squares(error, a)
            logs = np.log(
                squares.clip(max(np.quantile(squares, CLIP_QUANTILE), 1e-9))
            )  # of a still car 0
            told = fit_standardised(Ridge(alpha=10.0), self.moment(now, z_hat[:, a]), logs)
            self.usual.append((told, logs.min(), logs.max()))

    @staticmethod
    def moment(now, z_hat):
        """What is known of a moment before it comes, (n, 2 D)."""
        return torch.cat([now, z_hat], dim=1).numpy()

    def squares(self, error, a):
        """(n,): squared errors (n, D) in units of the usual, without regard to the moment."""
        return (error @ self.whiten[a]).pow(2).mean(dim=1).numpy()

    def __call__(self, z, now, z_hat, a):
        """(n,): about 1 where latents z (n, D) are as far from z_hat, dreamt of `now`, as is usual
        for such a moment, AHEAD[a] ahead."""
        told, least, most = self.usual[a]
        usual = told(self.moment(now, z_hat)).clip(least, most)  # of those seen
        return self.squares(z - z_hat, a) / np.exp(usual)


def scales(subject, train, args):
    """{judge: Scale} of the judges that look at latents, from windows of training episodes."""
    spots = choose_samples(train, args.train_frames, args.seed, ahead=max(AHEAD))
    act, steps, out = spots.act(max(AHEAD)), [h - 1 for h in AHEAD], {}
    for judge, (_, predictor) in subject.pairs().items():
        z = spots.z(0, max(AHEAD), judge)
        now, came = z[:, 0], z[:, list(AHEAD)]
        z_hat = subject.imagine(predictor, now, act)[:, steps]
        out[judge] = Scale(now, z_hat, came)
        if judge == OWN:
            out["copy-last"] = Scale(now, now[:, None].expand_as(came), came)
    return out


def surprises(subject, spots, other, scale, args):
    """{judge: {"true" or violation: (n, len(AHEAD))}}: how far each future is from the expected.

    A future is the film up to a step, seen at those of AHEAD that it has: its worst look counts.
    """
    expected = expectations(subject, spots, other, args.seed)
    elsewhere = teleported(subject, spots, args)
    kinds = ("true", *VIOLATIONS)
    out = {j: {v: np.zeros((len(spots), len(AHEAD))) for v in kinds} for j in JUDGES}
    filmed = [(a, h, v) for a, h in enumerate(AHEAD) for v in kinds if v not in TOLD]
    for a, h, v in progress(filmed, desc="surprise", unit="film", leave=False):
        light, same = (torch.Generator().manual_seed(args.seed) for _ in range(2))
        for rows in blocks(len(spots)):
            film = FILMS.get(v, FILMS["true"])(h + subject.newest())
            obs = planes(elsewhere[v][rows, a]) if v in TELEPORTS else spots[rows].frames(film)
            was = spots[rows].frames(subject.newest())
            obs = color_jitter(obs, light) if v in COLOURS else obs
            was = color_jitter(was, same) if v == THROUGHOUT else was
            change = obs[:, -1].float() - was[:, -1].float()
            out["pixel error"][v][rows, a] = change.abs().mean(dim=(1, 2, 3))
            premises = ("true", *TOLD) if v == "true" else (v if v == THROUGHOUT else "true",)
            for judge, (encoder, _) in subject.pairs().items():
                z = subject.encode(encoder, obs)
                for premise in premises:
                    now, z_hat = (x[rows] for x in expected[judge][premise])
                    row = premise if premise in TOLD else v
                    out[judge][row][rows, a] = scale[judge](z, now, z_hat[:, a], a)
                    if judge == OWN:  # its copy-last, which knows no actions
                        out["copy-last"][row][rows, a] = scale["copy-last"](z, now, now, a)
    out["pixel error"] |= dict.fromkeys(TOLD, out["pixel error"]["true"])
    return {
        judge: {v: np.maximum.accumulate(s, axis=1) for v, s in rows.items()}
        for judge, rows in out.items()
    }


def detection_metrics(true, violated):
    """(AUROC, share of violations found at 1 % false alarms, share of pairs told apart)."""
    alarm = np.quantile(true, 1 - FALSE_ALARMS, method="higher") if len(true) else np.nan
    pairs = (violated > true).mean() + (violated == true).mean() / 2 if len(true) else np.nan
    found = (violated > alarm).mean() if len(true) else np.nan
    return np.array([auc(violated, true), found, pairs])


def futures(subject, train, spots, args):
    """Part 3: {violation: {judge: {h: {auroc, tpr_at_1pct, pairs: cells}}}}."""
    other = other_episode(spots, args.seed)
    surprise = surprises(subject, spots, other, scales(subject, train, args), args)
    where, out = shows(spots, other), {}
    for violation in progress(VIOLATIONS, desc="futures", leave=False):
        out[violation] = {j: {} for j in JUDGES}
        for a, h in enumerate(AHEAD):
            rows = np.flatnonzero(where[violation][:, a])
            for judge in JUDGES:
                pair = [surprise[judge][v][rows, a] for v in ("true", violation)]
                found = (
                    cells(detection_metrics, spots.track[rows], pair, args)
                    if len(rows)
                    else [{"value": None, "low": None, "high": None, "n": 0, "tracks": 0}] * 3
                )
                out[violation][judge][h] = dict(zip(("auroc", "tpr_at_1pct", "pairs"), found))
    return out

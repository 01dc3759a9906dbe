"""Gives looks to trained nets that have none, without a change to what they plan with.

The encoder gets components of the scene's pixels. The predictor gets the head for them, trained on
the episodes of ROOT with all else frozen. The cost model stays. So plans and drives are the same to
the bit, and a decoder can draw kerbs and lawn. Writes the three checkpoints to ROOT/models;
`train_decoder.py --root ROOT --once --newest` comes next. Ten minutes on two cores for 240,000
frames.

    python -m tools.add_looks --models OLD --root ROOT
"""

import torch

from buffer import load_sources, sample_frames
from car import ZOOM_STEPS
from networks import Predictor, TinyEncoder
from support.checkpoints import fingerprint, load_models, save
from support.cli import Number, add_flags, fail, parser, run_main
from support.device import autocast, set_up
from support.files import writable
from support.latents import WindowSampler, load_latents
from support.pca import fit_pca
from support.progress import progress
from support.run import cosine, optimise
from train_encoder import PCA_FRAMES

BATCH, LR = 512, 2e-3  # windows in a step, peak of the cosine


def arguments():
    p = parser(__doc__, models=True)
    flags = p.add_argument_group("looks")
    size, steps = Number(int, 1, 16384), Number(int, 1, 10**6)
    add_flags(
        flags,
        ("--scene_pca", size, 128, "components of the scene's pixels"),
        ("--steps", steps, 1500, "of the predictor's head"),
    )
    flags.add_argument("--shares", type=float, nargs="+", default=None, help="of the folders")
    args = p.parse_args()
    args.fresh = True  # of the cache of latents: no run is resumed
    return args


def kept(payload, *keys):
    """What a checkpoint says of its training, without its nets and the keys of others."""
    return {k: v for k, v in payload.items() if k not in ("nets", "schema", *keys)}


def with_scene(encoder, sources, scene_pca, seed):
    """The encoder with components of the scene, fitted to training frames."""
    sizes = dict(dim=encoder.dim + scene_pca, scene_pca=scene_pca)
    new = TinyEncoder(**encoder.args | sizes).eval()
    chunks = [c for train, _ in sources.values() for c in train]
    frames, _ = sample_frames(chunks, 1, 1, PCA_FRAMES, seed, skip=ZOOM_STEPS)
    fit_pca(new, frames[:, 0])
    new.load_state_dict(new.state_dict() | encoder.state_dict())  # and the old HUD's components
    return new


def train_head(predictor, sampler, steps, device, dtype):
    """Trains what predicts the looks; all else is frozen."""
    predictor.eval()  # states without dropout, as in plans
    for name, x in predictor.named_parameters():
        x.requires_grad_(name.startswith(("look.", "fade_logit")))
    head = torch.nn.ParameterList([x for x in predictor.parameters() if x.requires_grad])
    optim = torch.optim.AdamW(head.parameters(), LR)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    bar = progress(range(steps), desc="looks", unit="step")
    for step in bar:
        z, act = (x.to(device) for x in sampler(step))
        with autocast(device, dtype):
            planned, looks = z[:, :, : predictor.dim], z[:, :, predictor.dim :]
            h = predictor.states(planned[:, 0], act)
            loss = (predictor.future_looks(h, looks[:, 0]).float() - looks[:, 1:]).pow(2).mean()
        optimise(loss, [head], optim, scaler, cosine(step, steps, LR), f"looks, step {step}")
        bar.set_postfix(loss=f"{float(loss):.3f}")
    return float(loss)


def main():
    args = arguments()
    device, dtype = set_up(args)
    nets, old, folder = load_models(args.root, args.models, device)
    models, encoder = writable(args.root / "models"), nets["encoder"]
    if encoder.scene_pca or folder.resolve() == models.resolve():
        fail(f"{folder}: expected nets without looks, in another folder than {models}")
    sources = load_sources(args.root)
    encoder = with_scene(encoder, sources, args.scene_pca, args.seed)
    epoch = f"ep{old['encoder']['epoch']}"
    save(models / f"encoder_mixed_{epoch}.pth", {"encoder": encoder}, **kept(old["encoder"]))

    # the predictor's head
    latents, _, key = load_latents(args, "predictor", sources, device, dtype, False)
    sizes = nets["predictor"].args | {"looks": args.scene_pca}
    predictor = Predictor(**sizes).to(device)
    predictor.load_state_dict(predictor.state_dict() | nets["predictor"].state_dict())
    horizon = old["predictor"]["horizon"]
    sampler = WindowSampler(latents, sources, 0, BATCH, horizon, args.shares, args.seed)
    loss = train_head(predictor, sampler, args.steps, device, dtype)
    keys, epoch = {"encoder_key": key}, f"ep{old['predictor']['epoch']}"
    said = kept(old["predictor"], *keys)
    save(models / f"predictor_{epoch}.pth", {"predictor": predictor}, **said, **keys)
    keys["predictor_key"] = fingerprint(predictor)
    said = kept(old["cost"], *keys)
    save(models / "cost_model_final.pth", {"cost": nets["cost"]}, **said, **keys)
    print(f"{models}: encoder, predictor and cost model with looks; error of the looks {loss:.3f}")
    return 0


if __name__ == "__main__":
    run_main(main)

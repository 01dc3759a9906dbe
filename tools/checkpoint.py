"""What a checkpoint holds; its weights for other programs, or in half the space.

python -m tools.checkpoint FILE...
python -m tools.checkpoint FILE --safetensors OUT
python -m tools.checkpoint FILE --half OUT
"""

import json
from pathlib import Path

from support.checkpoints import not_finite, read, write_payload
from support.cli import Parser, fail, optional, run_main, typed
from support.files import output_file, replace_atomically


def describe(path):
    """Prints a checkpoint's nets with arguments and sizes, its command line, and the rest."""
    payload = read(path)
    nets, args = payload.pop("nets"), payload.pop("args", {})
    print(path)
    for name, entry in nets.items():
        size = sum(t.numel() for t in entry["weights"].values())
        print(f"{name:12} {entry['class']} {size / 1e6:.2f}M {entry['args']}")

    # the command, as it is typed in a shell
    if args:
        stage = next(iter(nets)).replace("cost", "cost_model")  # of which the first net is
        arithmetic = args.pop("arithmetic", "unknown")
        given = {k: v for k, v in args.items() if v not in ("None", "False")}
        flags = [f"--{k}" + f" {typed(v)}" * (v != "True") for k, v in given.items()]
        print(f"{'command':12} python train_{stage}.py {' '.join(flags)}")
        print(f"{'arithmetic':12} {arithmetic}")
    for key, value in payload.items():
        if key in ("optim", "scaler", "rng", "rng_cuda"):
            value = "the numbers that a resumed run goes on with"
        print(f"{key:12} {value}")


def export_safetensors(path, out):
    """Writes the weights of a checkpoint as one safetensors file.

    Tensors are named `net.parameter`; the metadata hold class and arguments of each net as JSON.
    """
    weights, about = {}, {}
    for name, entry in read(path)["nets"].items():
        about[name] = json.dumps({k: entry[k] for k in ("class", "args")})
        weights |= {f"{name}.{k}": tensor.contiguous() for k, tensor in entry["weights"].items()}
    body = optional("safetensors.torch", "safetensors").save(weights, about)
    replace_atomically(out, lambda f: f.write(body))
    print(f"{out}: {len(weights)} tensors of {', '.join(about)}")


def halve(path, out):
    """Writes a checkpoint with its weights in half precision. Loaded, they are float32 again.

    Refuses encoders and predictors: other nets know them by their exact weights.
    """
    payload = read(path)
    for name, entry in payload["nets"].items():
        if name in ("encoder", "predictor"):
            fail(f"{path}: nets that were trained on this {name} would not know it any more")
        halved = {k: x.half() if x.is_floating_point() else x for k, x in entry["weights"].items()}
        if large := not_finite(halved):
            fail(f"{path}: {name}'s {large} is too large for half precision")
        entry["weights"] = halved
    write_payload(out, payload)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def main():
    p = Parser(description="what a checkpoint holds")
    p.add_argument("files", nargs="+", type=Path, help="checkpoints to describe")
    either, out = p.add_mutually_exclusive_group(), dict(type=output_file, metavar="OUT")
    either.add_argument("--safetensors", **out, help="write the weights of the one file to OUT")
    either.add_argument(
        "--half", **out, help="write it to OUT in half precision; no encoder, no predictor"
    )
    args = p.parse_args()
    flag, write = ("half", halve) if args.half else ("safetensors", export_safetensors)
    out = getattr(args, flag)
    if out and len(args.files) > 1:
        p.error(f"--{flag} takes one file at a time")
    if out and out.exists() and out.samefile(args.files[0]):
        p.error(f"--{flag} {out}: is the checkpoint itself; choose another name")
    for path in args.files:
        write(path, out) if out else describe(path)
    return 0


if __name__ == "__main__":
    run_main(main)

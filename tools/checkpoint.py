"""What a checkpoint holds; its weights for other programs.

python -m tools.checkpoint FILE...
python -m tools.checkpoint FILE --safetensors OUT
"""

import json
from pathlib import Path

import torch

from support.checkpoints import read
from support.cli import Parser, optional, run, typed
from support.files import output_file, replace_atomically


def describe(path):
    """Lines about a checkpoint: its name, its nets with arguments and sizes, the command that made
    it, then what else it holds."""
    payload = read(path)
    print(path)
    nets, args = payload.pop("nets"), payload.pop("args", {})
    args = args if isinstance(args, dict) else {}  # a foreign file may hold anything
    for name, entry in nets.items():
        size = sum(t.numel() for t in entry["weights"].values())
        print(f"{name:12} {entry['class']} {size / 1e6:.2f}M {entry['args']}")
    if script := next((SCRIPTS[name] for name in SCRIPTS if args and name in nets), None):
        flags = [
            f"--{key}" + f" {typed(value)}" * (value != "True")
            for key, value in args.items()
            if key != "arithmetic" and value not in ("None", "False")
        ]
        print(f"{'command':12} python {script} {' '.join(flags)}")
        print(f"{'arithmetic':12} {args.get('arithmetic', 'unknown')}")
    for key, value in payload.items():
        if key in ("optim", "scaler", "rng", "rng_cuda"):
            value = f"{sum(t.numel() for t in tensors(value)):,} numbers"
        print(f"{key:12} {value}")


SCRIPTS = {
    "encoder": "train_encoder.py",
    "decoder": "train_decoder.py",
    "cost": "train_cost_model.py",
    "predictor": "train_predictor.py",
}  # an encoder's file


def tensors(value):
    """All tensors in a structure of dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value
    return [t for v in inside for t in tensors(v)] if isinstance(value, (dict, list)) else []


def export_safetensors(path, out):
    """The weights of a checkpoint as one safetensors file (github.com/huggingface/safetensors):
    tensors `net.parameter`; class and arguments of each net as JSON in the file's metadata.
    """
    nets = read(path)["nets"]
    weights = {
        f"{name}.{key}": tensor.contiguous()
        for name, entry in nets.items()
        for key, tensor in entry["weights"].items()
    }
    about = {
        name: json.dumps({k: entry[k] for k in ("class", "args")}) for name, entry in nets.items()
    }
    body = optional("safetensors.torch", "safetensors").save(weights, about)
    replace_atomically(out, lambda f: f.write(body))
    print(f"{out}: {len(weights)} tensors of {', '.join(nets)}")


def main():
    p = Parser(description="what a checkpoint holds")
    p.add_argument("files", nargs="+", type=Path, help="checkpoints to describe")
    p.add_argument(
        "--safetensors",
        type=output_file,
        metavar="OUT",
        help="write the weights of the one file to OUT instead",
    )
    args = p.parse_args()
    if args.safetensors and len(args.files) > 1:
        p.error("--safetensors takes one file at a time")
    if args.safetensors and args.safetensors.exists() and args.safetensors.samefile(args.files[0]):
        p.error(f"--safetensors {args.safetensors}: is the checkpoint itself; choose another name")
    for path in args.files:
        if args.safetensors:
            export_safetensors(path, args.safetensors)
        else:
            describe(path)
    return 0


if __name__ == "__main__":
    run(main)

"""`dl2pa prototypes`: place, certify and write prototypes; the authors' flag names work too."""

from __future__ import annotations

import argparse

from dl2pa.commands.output import note, say


def run(args: argparse.Namespace) -> int:
    from dl2pa.geometry import build_prototypes, save_prototypes

    for flag in ("batch_size", "num_epoch"):
        if getattr(args, flag) is not None:
            note(f"--{flag} is accepted and ignored: our constructions need neither batches nor epochs")
    prototypes = build_prototypes(args.num_classes, args.dim, args.construction, args.seed)
    if args.out is not None:
        save_prototypes(prototypes, args.out)
    result = {**prototypes.certificate.as_dict(), "file": str(args.out) if args.out is not None else None}
    say(result, args.json, "prototypes:")
    return 0

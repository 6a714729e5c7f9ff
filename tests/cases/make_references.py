"""Long exact-sampling references: `python -m tests.cases.make_references [name ...]`.

Writes references.json beside this file, one entry per case (given names are recomputed, the others kept; no name:
all). One thread; about an hour for everything on one core, a good part of it for the digits MLP.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from tests.cases.problems import CASES
from tests.cases.reference import hmc_reference, kinetic_reference

REFERENCES = Path(__file__).with_name("references.json")

_TOY: dict[str, Any] = {
    "num_chains": 512,
    "num_draws": 800,
    "num_warmup": 200,
    "step_factors": (1.0, 0.5, 0.25, 0.125),
}
_LINEAR: dict[str, Any] = {"num_chains": 128, "num_draws": 150, "num_warmup": 100}
_DIGITS: dict[str, Any] = {"num_chains": 8, "num_draws": 150, "num_warmup": 60, "dtype": torch.float32}

_NETWORK: dict[str, Any] = {
    "num_chains": 8,
    "num_draws": 70,
    "num_warmup": 40,
    "dtype": torch.float32,
    "loop": True,
}
# stiffer, and no arms to speak of: fewer of the short steps
_STIFF: dict[str, Any] = {**_NETWORK, "num_draws": 60, "step_factors": (1.0, 1.0, 0.5)}

# stiffer still: in the coordinates in which the Hessian at w* is round
_WHITENED: dict[str, Any] = {
    "num_chains": 16,
    "num_draws": 150,
    "num_warmup": 50,
    "dtype": torch.float32,
    "step_factors": (1.0, 1.0, 0.5),
    "whiten": True,
}

# Metropolis-adjusted chains mix too slowly here: 8 of 130 iterations of HMC are at 56.2 +- 1.1
_KINETIC: dict[str, Any] = {"kinetic": True, "step": 0.005, "friction": 4.0}

#: What is run, with which settings, cheapest and most used first.
RUNS: dict[str, dict[str, Any]] = {
    "crossing-11": _TOY,
    "crossing-12": _TOY,
    "crossing-111": _TOY,
    "rrr-8-4-8-r2": _LINEAR,
    "rrr-5-3-5-r1": _LINEAR,
    "linear-6-6-6-r2": _LINEAR,
    "linear-6-6-6-6-r2": _LINEAR,
    "digits-mlp-gamma100": _DIGITS,
    "linear-6-6-6-6-6-r2": _LINEAR,
    "rrr-8-4-8-r2-n300": _LINEAR,
    "rrr-8-4-8-r2-n10000": _LINEAR,
    "linear-6-6-6-6-r2-n300": _LINEAR,
    "linear-6-6-6-6-r2-n10000": {"num_chains": 128, "num_draws": 80, "num_warmup": 60},
    "transformer": _NETWORK,
    "lstm": {**_STIFF, "num_draws": 300, "num_warmup": 60},  # --seed 1; 60 draws of seed 0 gave 50.75 +- 0.41
    "convnet-gamma100": _WHITENED,
    "convnet-default": _KINETIC,
    "linear-6-6-6-6-r2-default": _LINEAR,
    "transformer-default": _NETWORK,
    # --seed 1; seed 2 gave 13.76 +- 0.11, and 150 draws of seed 0 14.00 +- 0.12
    "digits-mlp-default": {**_DIGITS, "num_draws": 230},
    "digits-mlp-gamma10": {**_DIGITS, "num_draws": 80, "num_warmup": 50},
}


def load_references() -> dict[str, dict[str, Any]]:
    """The stored references, by the names of `CASES`."""
    return json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}


def compute(name: str, seed: int = 0) -> dict[str, Any]:
    """Run the reference of one case and return its entry."""
    case = CASES[name]()
    started = time.perf_counter()
    settings = dict(RUNS[name])
    reference = kinetic_reference if settings.pop("kinetic", False) else hmc_reference
    result = reference(case, seed=seed, **settings)
    lam = case.asymptotic
    exact = case.truth if case.truth_kind == "exact" else None
    return {
        "name": name,
        "n": result.n,
        "nbeta": result.nbeta,
        "gamma": result.gamma,
        "mean": round(result.mean, 5),
        "se": round(result.se, 5),
        "rhat": round(result.rhat, 4),
        "acceptance": round(result.acceptance, 3),
        "draws": result.num_chains * result.num_draws,
        "chains": result.num_chains,
        "warmup": result.num_warmup,
        "ess": round(result.ess),
        "step_size": round(result.step_size, 5),
        "mean_leapfrog": round(result.mean_leapfrog, 1),
        "seed": seed,
        "exact": exact,
        "asymptotic": lam[0] if lam else None,
        "multiplicity": lam[1] if lam else None,
        "loss_at_anchor": case.loss_at_anchor(),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Recompute the named references (default: all)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"among {', '.join(RUNS)}")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(RUNS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    for name in arguments.names or RUNS:
        entry = compute(name, arguments.seed)
        stored = load_references() | {name: entry}
        ordered = {key: stored[key] for key in RUNS if key in stored}
        REFERENCES.write_text(json.dumps(ordered, indent=2) + "\n")
        print(
            f"{name}: {entry['mean']:.4f} +- {entry['se']:.4f} "
            f"(exact {entry['exact']}, asymptotic {entry['asymptotic']}), "
            f"R-hat {entry['rhat']}, acceptance {entry['acceptance']}, ESS {entry['ess']}, {entry['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

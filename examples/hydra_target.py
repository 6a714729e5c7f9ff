"""Hydra: everything is built from its ``_target_`` in the YAML file.

    python examples/hydra_target.py
    python examples/hydra_target.py trainer.max_epochs=3 callbacks.slt.num_chains=4

A typo in an argument of a callback is refused when it is built, before training, with the argument's name.
"""

from __future__ import annotations

import hydra
import lightning as L
from digits import loaders
from omegaconf import DictConfig


@hydra.main(config_path=".", config_name="hydra_target", version_base=None)
def main(config: DictConfig) -> None:
    """Build, train, say what came out."""
    L.seed_everything(config.seed, verbose=False)
    callbacks = [hydra.utils.instantiate(callback) for callback in config.callbacks.values()]
    trainer = hydra.utils.instantiate(config.trainer, callbacks=callbacks)
    trainer.fit(hydra.utils.instantiate(config.module), *loaders(config.batch_size))
    for estimate in callbacks[0].estimates:
        print(f"step {estimate.step}: LLC {estimate.mean:.2f} ± {estimate.se:.2f}, valid: {estimate.valid}")


if __name__ == "__main__":
    main()

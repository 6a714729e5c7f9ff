"""The damped influence function with the exact generalised Gauss-Newton matrix: small models only."""

from __future__ import annotations

import _path  # noqa: F401
import torch
from influence_harness import PREPARATION, InfluenceCase, Scores, run
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

DAMPINGS = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2, 4e-2, 1e-1)


def score(case: InfluenceCase, variant: str) -> Scores:
    weights = {name: w.detach() for name, w in case.module.named_parameters()}

    def logits(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        z = functional_call(case.module, parameters, (x,))
        return z, z

    def derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
        """``[n, classes, d]`` and the probabilities ``[n, classes]``."""
        by_name, z = vmap(jacrev(logits, has_aux=True), (None, 0))(weights, x)
        return torch.cat([part.flatten(2) for part in by_name.values()], dim=2), z.softmax(-1)

    def gradients(jacobian: Tensor, p: Tensor, y: Tensor) -> Tensor:
        error = p - torch.nn.functional.one_hot(y, p.shape[1])
        return torch.einsum("nc,ncd->nd", error, jacobian).double()

    jacobian, p = derivatives(case.x)
    train = gradients(jacobian, p, case.y)
    query = gradients(*derivatives(case.query_x), case.query_y)
    centred = jacobian - torch.einsum("nc,ncd->nd", p, jacobian)[:, None]
    root = (centred * p.sqrt()[:, :, None]).flatten(0, 1)
    values, vectors = torch.linalg.eigh((root.T @ root / len(case.x)).double())
    train, query, values = train @ vectors, query @ vectors, values.clamp_min(0)
    yield PREPARATION, None
    for damping in DAMPINGS:
        yield f"{damping:g}", (query / (values + damping)) @ train.T


if __name__ == "__main__":
    run(torch.__version__, score)

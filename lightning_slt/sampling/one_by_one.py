"""Losses of samples that are computed one by one: why, and what helps.

It takes ten times as long and more, and nothing but the clock shows it, while a line in the step is often all there is
to change.
"""

from __future__ import annotations

TAKEN_OUT = ("calling .item()", "cannot be converted to Scalar", "only one element tensors can be converted")
"""How torch's errors speak of a number that is taken out of a tensor of several, or under vmap."""
DECIDED = ("data-dependent control flow", "Boolean value of Tensor")
"""The same of an ``if`` on one."""
LOSSES = "loss_fn(module, batch) -> [batch] losses of single samples"


def slow_sentence(reason: str) -> str:
    """What a user should know of it.

    Args:
        reason: why no faster way was taken, as far as it is known: what each of them failed with.

    Example:
        >>> print(slow_sentence("the step gives no loss for some samples"))
        the losses of single samples (influence, susceptibility) are computed one by one, which takes many times as \
long: the step gives no loss for some samples. Give loss_fn(module, batch) -> [batch] losses of single samples.
    """
    if any(words in reason for words in TAKEN_OUT):
        cause = "the step takes a number out of a tensor (.item() or float())"
        remedy = f"Use .detach() in place of .item(), which keeps it a tensor, or give {LOSSES}"
    elif any(words in reason for words in DECIDED):
        cause = "the step decides by the values of a tensor (an if)"
        remedy = f"Use torch.where in its place, or give {LOSSES}"
    else:
        cause, remedy = reason.rstrip("."), f"Give {LOSSES}"
    return (
        "the losses of single samples (influence, susceptibility) are computed one by one, which takes many times as "
        f"long: {cause}. {remedy}."
    )


__all__ = ["slow_sentence"]

"""Drawing tokens from the likely ones only (Holtzman et al., 2020). Shapes: B rows, V tokens."""

from torch import Tensor


def nucleus(logits: Tensor, share: float) -> Tensor:
    """Logits [B, V] with all tokens at -inf but the most probable ones, as few as hold at least
    `share` (in 0-1) of the probability; at least one.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability  # of all more probable tokens
    kept = before < share
    kept[:, 0] = True
    return logits.masked_fill(~kept.gather(1, order.argsort(dim=-1)), float("-inf"))

"""Choosing codes so that a layer's output, not its weight, is near the float one.

Shapes: O output channels, D input width, M samples. `scale`, `zero` are per entry [O, D] (equal
within a group), gram [D, D] is X^T X of the layer's inputs.
"""

import torch
from torch import Tensor

from compress.nn.quant import fake_quantize

DAMPING = 0.01
BLOCK = 128
# ERQ's ridge, relative to the mean of the gram matrix's diagonal (our scale of its lambda).
RIDGE = 0.01


def gptq(
    weight: Tensor, scale: Tensor, zero: Tensor, limits: tuple[int, int], gram: Tensor
) -> Tensor:
    """GPTQ (arXiv 2210.17323): round column by column, largest inputs first, and pass each error on
    to the columns not yet rounded. weight [O, D] -> [O, D] on its grid."""
    order = gram.diagonal().argsort(descending=True)
    hessian = gram[order][:, order].double()
    hessian += DAMPING * hessian.diagonal().mean().clamp(min=1e-8) * torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()  # [D, D]
    left, scale, zero = weight[:, order].clone(), scale[:, order], zero[:, order]
    done = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        errors = torch.empty(len(left), stop - start)
        for i in range(start, stop):
            column = slice(i, i + 1)
            rounded = fake_quantize(left[:, column], scale[:, column], zero[:, column], limits)
            done[:, column] = rounded
            error = (left[:, column] - rounded) / upper[i, i]  # [O, 1]
            left[:, i:stop] -= error * upper[i, i:stop]
            errors[:, i - start] = error[:, 0]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return done[:, order.argsort()]


def ridge(weight: Tensor, x: Tensor, rounded_x: Tensor) -> tuple[Tensor, Tensor]:
    """ERQ's first step (Aqer, arXiv 2407.06794): the change of weight and bias that best undoes the
    rounding of the inputs, in closed form. x, rounded_x [M, D], weight [O, D] -> ([O, D], [O])."""
    ones = torch.ones(len(x), 1)
    a = torch.cat([rounded_x, ones], dim=1).double()  # [M, D + 1]
    residual = (x - rounded_x).double() @ weight.double().T  # [M, O]
    gram = a.T @ a
    gram += RIDGE * gram.diagonal()[:-1].mean() * torch.eye(len(gram))
    change = torch.linalg.solve(gram, a.T @ residual).T.float()  # [O, D + 1]
    return change[:, :-1], change[:, -1]

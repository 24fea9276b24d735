"""Each loss against a slow loop over plain floats, and its gradient against finite differences."""

import math
from operator import mul

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compress import losses
from compress.losses import TeacherFeatures

NUM = 4


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def matrix(a: Tensor, b: Tensor, scale: float, bias: float = 0.0) -> list[list[float]]:
    return [[scale * float(x @ y) + bias for y in b] for x in a]


def transposed(m: list[list[float]]) -> list[list[float]]:
    return [list(row) for row in zip(*m, strict=True)]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def cross_entropy(targets: list[list[float]], logits: list[list[float]]) -> float:
    rows = zip(targets, logits, strict=True)
    return sum(-t * math.log(q) for T, L in rows for t, q in zip(T, softmax(L))) / len(logits)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def sets() -> dict[str, Tensor]:
    named = ("u", "v", "tu", "tv", "wu", "wv")
    return {name: unit(NUM, 3 if name.startswith("w") else 6) for name in named}


def test_sigmoid_loss_equals_a_slow_loop(sets: dict[str, Tensor]) -> None:
    logits = matrix(sets["u"], sets["v"], 5.0, -2.0)
    slow = -sum(
        math.log(sigmoid(x if i == j else -x))
        for i, row in enumerate(logits)
        for j, x in enumerate(row)
    )
    assert float(losses.sigmoid_loss(sets["u"], sets["v"], 5.0, -2.0)) == pytest.approx(slow / NUM)


def test_multi_teacher_affinity_is_the_mean_of_cross_entropies(sets: dict[str, Tensor]) -> None:
    teachers = [
        TeacherFeatures(sets["tu"], sets["tv"], 7.0),
        TeacherFeatures(sets["wu"], sets["wv"], 3.0),
    ]
    logits = matrix(sets["u"], sets["v"], 5.0)
    slow = 0.0
    for u, v, scale in ((sets["tu"], sets["tv"], 7.0), (sets["wu"], sets["wv"], 3.0)):
        affinity = matrix(u, v, scale)
        slow += cross_entropy([softmax(r) for r in affinity], logits) / 4
        back = transposed(affinity)
        slow += cross_entropy([softmax(r) for r in back], transposed(logits)) / 4
    value = losses.multi_teacher_affinity(sets["u"], sets["v"], teachers, 5.0)
    assert float(value) == pytest.approx(slow)
    whole = losses.split_affinity(sets["u"], sets["v"], teachers, 5.0, 1.0)
    assert float(whole) == pytest.approx(slow)


def test_one_teacher_among_many_is_affinity_mimicking(sets: dict[str, Tensor]) -> None:
    s = sets
    one = losses.affinity_mimicking(s["u"], s["v"], s["tu"], s["tv"], 5.0, 7.0)
    many = [TeacherFeatures(s["tu"], s["tv"], 7.0)] * 3
    torch.testing.assert_close(losses.multi_teacher_affinity(s["u"], s["v"], many, 5.0), one)


def test_split_affinity_weighs_negatives_apart(sets: dict[str, Tensor]) -> None:
    s, logits = sets, matrix(sets["u"], sets["v"], 5.0)
    affinity = matrix(s["tu"], s["tv"], 7.0)
    slow = 0.0
    for target, student in ((affinity, logits), (transposed(affinity), transposed(logits))):
        for i in range(NUM):
            t, q = softmax(target[i]), softmax(student[i])
            weights = [1.0 if i == j else -0.5 for j in range(NUM)]
            slow -= sum(w * a * math.log(b) for w, a, b in zip(weights, t, q)) / (2 * NUM)
    teachers = [TeacherFeatures(s["tu"], s["tv"], 7.0)]
    value = losses.split_affinity(s["u"], s["v"], teachers, 5.0, -0.5)
    assert float(value) == pytest.approx(slow)


def test_relational_divergence_is_zero_at_the_teacher(sets: dict[str, Tensor]) -> None:
    teachers = [TeacherFeatures(sets["tu"], sets["tv"], 7.0)]
    same = losses.relational_divergence(sets["tu"], sets["tv"], teachers, 7.0)
    assert abs(float(same)) < 1e-12
    u = sets["u"].clone().requires_grad_()
    kl = losses.relational_divergence(u, sets["v"], teachers, 5.0)
    ce = losses.multi_teacher_affinity(u, sets["v"], teachers, 5.0)
    torch.testing.assert_close(torch.autograd.grad(kl, u), torch.autograd.grad(ce, u))
    assert float(kl) < float(ce)


def test_sigmoid_affinity_equals_a_slow_loop(sets: dict[str, Tensor]) -> None:
    student, slow = matrix(sets["u"], sets["v"], 5.0, -1.0), 0.0
    target = matrix(sets["tu"], sets["tv"], 7.0, -2.0)
    for i in range(NUM):
        for j in range(NUM):
            p, q = sigmoid(target[i][j]), sigmoid(student[i][j])
            slow -= (p * math.log(q) + (1 - p) * math.log(1 - q)) / NUM**2
    teachers = [TeacherFeatures(sets["tu"], sets["tv"], 7.0, -2.0)]
    value = losses.sigmoid_affinity(sets["u"], sets["v"], teachers, 5.0, -1.0)
    assert float(value) == pytest.approx(slow)


def test_interactive_equals_a_slow_loop(sets: dict[str, Tensor]) -> None:
    own = [[float(i == j) for j in range(NUM)] for i in range(NUM)]
    slow = cross_entropy(own, matrix(sets["u"], sets["tv"], 4.0))
    slow += cross_entropy(own, matrix(sets["v"], sets["tu"], 4.0))
    value = losses.interactive(sets["u"], sets["v"], sets["tu"], sets["tv"], 4.0)
    assert float(value) == pytest.approx(slow / 2)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_soft_targets_equal_a_slow_loop(sets: dict[str, Tensor], share: float) -> None:
    logits, other = matrix(sets["u"], sets["v"], 4.0), matrix(sets["tu"], sets["tv"], 4.0)
    slow = 0.0
    for target, student in ((other, logits), (transposed(other), transposed(logits))):
        mixed = [
            [share * p + (1 - share) * float(i == j) for j, p in enumerate(softmax(row))]
            for i, row in enumerate(target)
        ]
        slow += cross_entropy(mixed, student) / 2
    value = losses.soft_targets(sets["u"], sets["v"], sets["tu"], sets["tv"], 4.0, share)
    assert float(value) == pytest.approx(slow)


@pytest.mark.parametrize("rho", [0.0, 0.2])
def test_softened_labels_equal_a_slow_loop(sets: dict[str, Tensor], rho: float) -> None:
    logits, slow = matrix(sets["u"], sets["v"], 4.0), 0.0
    for m in (logits, transposed(logits)):
        targets = []
        for i, row in enumerate(m):
            others = softmax([x for j, x in enumerate(row) if j != i])
            targets.append(
                [rho * p for p in others[:i]] + [1 - rho] + [rho * p for p in others[i:]]
            )
        slow += cross_entropy(targets, m) / 2
    value = losses.softened_info_nce(sets["u"], sets["v"], 4.0, rho)
    assert float(value) == pytest.approx(slow)


def test_hard_negatives_equal_a_slow_loop(sets: dict[str, Tensor]) -> None:
    logits, slow = matrix(sets["u"], sets["v"], 4.0), 0.0
    teacher = matrix(sets["tu"], sets["tv"], 7.0)
    for t, s in ((teacher, logits), (transposed(teacher), transposed(logits))):
        terms, weights = [], []
        for i in range(NUM):
            order = sorted((j for j in range(NUM) if j != i), key=lambda j: -t[i][j])[:2]
            p = softmax([t[i][j] for j in (i, *order)])
            q = softmax([s[i][j] for j in (i, *order)])
            terms.append(sum(a * math.log(a / b) for a, b in zip(p, q)) - math.log(q[0]))
            weights.append((1 - q[0]) ** 1.5)
        mean = sum(weights) / NUM
        slow += sum(w / mean * x for w, x in zip(weights, terms)) / (2 * NUM)
    value = losses.hard_negative_distillation(
        sets["u"], sets["v"], sets["tu"], sets["tv"], 4.0, 7.0, 2, 1.5
    )
    assert float(value) == pytest.approx(slow)


def test_closed_form_gradients_are_autograds(sets: dict[str, Tensor]) -> None:
    u, v = sets["u"].clone().requires_grad_(), sets["v"].clone().requires_grad_()
    expected = torch.autograd.grad(losses.clip_info_nce(u, v, 9.0), (u, v))
    for got, want in zip(losses.info_nce_gradients(u, v, 9.0), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def mean_square(a: list[list[float]], b: list[list[float]]) -> float:
    rows = [(x - y) ** 2 for first, second in zip(a, b, strict=True) for x, y in zip(first, second)]
    return sum(rows) / len(rows)


def slow_gradients(u: list[list[float]], v: list[list[float]], scale: float) -> list[list[float]]:
    """The derivative of InfoNCE by u, entry by entry: central differences."""
    found, step = [[0.0] * len(row) for row in u], 1e-5
    for i, row in enumerate(u):
        for k in range(len(row)):
            values = []
            for sign in (1, -1):
                moved = [list(r) for r in u]
                moved[i][k] += sign * step
                logits = [[scale * sum(map(mul, x, y)) for y in v] for x in moved]
                own = [[float(a == b) for b in range(NUM)] for a in range(NUM)]
                both = cross_entropy(own, logits) + cross_entropy(own, transposed(logits))
                values.append(both / 2)
            found[i][k] = (values[0] - values[1]) / (2 * step)
    return found


def test_gradient_distance_equals_a_slow_loop(sets: dict[str, Tensor]) -> None:
    u, v, tu, tv = (sets[name].tolist() for name in ("u", "v", "tu", "tv"))
    slow = mean_square(slow_gradients(u, v, 4.0), slow_gradients(tu, tv, 7.0))
    slow += mean_square(slow_gradients(v, u, 4.0), slow_gradients(tv, tu, 7.0))
    value = losses.gradient_distance(sets["u"], sets["v"], sets["tu"], sets["tv"], 4.0, 7.0)
    assert float(value) == pytest.approx(slow, rel=1e-6)


def test_augmented_feature_equals_a_slow_loop(sets: dict[str, Tensor]) -> None:
    fusers, slow = [torch.randn(5, 9).double() for _ in "ab"], []
    for x, t, fuse in zip((sets["u"], sets["v"]), (sets["wu"], sets["wv"]), fusers, strict=True):
        rows = []
        for a, b in zip(x.tolist(), t.tolist(), strict=True):
            mixed = [sum(map(mul, weights, [*a, *b])) for weights in fuse.tolist()]
            length = math.sqrt(sum(value**2 for value in mixed))
            rows.append([value / length for value in mixed])
        slow.append(rows)
    logits = [[3.0 * sum(map(mul, a, b)) for b in slow[1]] for a in slow[0]]
    own = [[float(i == j) for j in range(NUM)] for i in range(NUM)]
    expected = (cross_entropy(own, logits) + cross_entropy(own, transposed(logits))) / 2
    value = losses.augmented_feature(
        sets["u"], sets["v"], sets["wu"], sets["wv"], fusers[0], fusers[1], 3.0
    )
    assert float(value) == pytest.approx(expected)


def test_distances_equal_slow_loops(sets: dict[str, Tensor]) -> None:
    u, v, tu = (sets[name].tolist() for name in ("u", "v", "tu"))
    value = losses.feature_distance(sets["u"], sets["tu"])
    assert float(value) == pytest.approx(mean_square(u, tu))
    far = 3 * sets["u"]  # so that both branches of smooth L1 are met
    gaps = [abs(x - y) for a, b in zip(far.tolist(), tu) for x, y in zip(a, b, strict=True)]
    assert min(gaps) < 1 < max(gaps)
    slow = sum(gap**2 / 2 if gap < 1 else gap - 0.5 for gap in gaps) / len(gaps)
    assert float(losses.smooth_feature_distance(far, sets["tu"])) == pytest.approx(slow)
    pairs = [(a, r) for x in (u, v) for a, r in zip(x, tu, strict=True)]
    slow = sum((x - y) ** 2 for a, r in pairs for x, y in zip(a, r)) / (2 * NUM)
    value = losses.random_alignment(sets["u"], sets["v"], sets["tu"])
    assert float(value) == pytest.approx(slow)


def test_relational_divergence_equals_a_slow_loop(sets: dict[str, Tensor]) -> None:
    logits, slow = matrix(sets["u"], sets["v"], 5.0), 0.0
    for tu, tv, scale in ((sets["tu"], sets["tv"], 7.0), (sets["wu"], sets["wv"], 3.0)):
        affinity = matrix(tu, tv, scale)
        for target, student in ((affinity, logits), (transposed(affinity), transposed(logits))):
            for t, s in zip(map(softmax, target), map(softmax, student), strict=True):
                slow += sum(p * math.log(p / q) for p, q in zip(t, s)) / (4 * NUM)
    teachers = [
        TeacherFeatures(sets["tu"], sets["tv"], 7.0),
        TeacherFeatures(sets["wu"], sets["wv"], 3.0),
    ]
    value = losses.relational_divergence(sets["u"], sets["v"], teachers, 5.0)
    assert float(value) == pytest.approx(slow)


def test_matching_loss_is_info_nce_of_the_scores() -> None:
    image, text, real = unit(3, 5, 4), unit(3, 6, 4), torch.ones(3, 6, dtype=torch.bool)
    scores = [[4.0 * x for x in row] for row in losses.matching_scores(image, text, real).tolist()]
    own = [[float(i == j) for j in range(3)] for i in range(3)]
    slow = (cross_entropy(own, scores) + cross_entropy(own, transposed(scores))) / 2
    assert float(losses.matching_loss(image, text, real, 4.0)) == pytest.approx(slow)


def test_matching_equals_a_slow_loop() -> None:
    image, text = unit(3, 5, 4), unit(3, 6, 4)
    lengths = [6, 2, 4]
    real = torch.tensor([[n < length for n in range(6)] for length in lengths])
    scores = losses.matching_scores(image, text, real)
    for i in range(3):
        for j in range(3):
            kept = [n for n in range(6) if real[j, n]]
            s = [[float(image[i, a] @ text[j, b]) for b in kept] for a in range(5)]
            of_image = sum(max(row) for row in s) / 5
            of_text = sum(max(column) for column in transposed(s)) / len(kept)
            assert float(scores[i, j]) == pytest.approx((of_image + of_text) / 2)


def test_masked_language_looks_at_masked_tokens_only() -> None:
    logits, tokens = torch.randn(2, 3, 7), torch.tensor([[1, 2, 3], [4, 5, 6]])
    masked = torch.tensor([[False, True, False], [True, False, False]])
    slow = -(logits[0, 1].log_softmax(0)[2] + logits[1, 0].log_softmax(0)[4]) / 2
    torch.testing.assert_close(losses.masked_language(logits, tokens, masked), slow)
    of_others_too = losses.masked_language(logits, tokens, masked, torch.tensor(5.0))
    torch.testing.assert_close(of_others_too, slow * 2 / 5)


GRADIENTS = {
    "sigmoid": lambda u, s: losses.sigmoid_loss(u, s["v"], 3.0, -1.0),
    "multi teacher": lambda u, s: losses.multi_teacher_affinity(u, s["v"], s["teachers"], 3.0),
    "split": lambda u, s: losses.split_affinity(u, s["v"], s["teachers"], 3.0, -0.3),
    "divergence": lambda u, s: losses.relational_divergence(u, s["v"], s["teachers"], 3.0),
    "sigmoid affinity": lambda u, s: losses.sigmoid_affinity(u, s["v"], s["teachers"], 3.0, 0.1),
    "interactive": lambda u, s: losses.interactive(u, s["v"], s["tu"], s["tv"], 3.0),
    "gradient": lambda u, s: losses.gradient_distance(u, s["v"], s["tu"], s["tv"], 3.0, 5.0),
    "augmented": lambda u, s: losses.augmented_feature(
        u, s["v"], s["tu"], s["tv"], s["f"], s["g"], 3.0
    ),
    "smooth": lambda u, s: losses.smooth_feature_distance(u, s["tu"]),
    "random": lambda u, s: losses.random_alignment(u, s["v"], s["tu"]),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_equal_finite_differences(name: str, sets: dict[str, Tensor]) -> None:
    teachers = [TeacherFeatures(sets["tu"], sets["tv"], 5.0, -1.0)]
    fusers = {"f": torch.randn(5, 12).double(), "g": torch.randn(5, 12).double()}
    extended = {**sets, **fusers, "teachers": teachers}
    u = sets["u"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: GRADIENTS[name](x, extended), (u,))


def test_no_gradient_reaches_a_teacher(sets: dict[str, Tensor]) -> None:
    tu = sets["tu"].clone().requires_grad_()
    extended = {
        **sets,
        "tu": tu,
        "teachers": [TeacherFeatures(tu, sets["tv"], 5.0)],
        "f": torch.randn(5, 12).double(),
        "g": torch.randn(5, 12).double(),
    }
    for name in ("multi teacher", "split", "divergence", "interactive", "gradient", "augmented"):
        u = sets["u"].clone().requires_grad_()
        GRADIENTS[name](u, extended).backward()
        assert tu.grad is None and u.grad is not None, name

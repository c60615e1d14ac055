import math
from functools import partial

import pytest
import torch

from hf_dskd.losses import logits as module
from hf_dskd.losses.divergences import forward_kl, reverse_kl
from hf_dskd.losses.logits import mapped_kd, packed_partners, rows_at_places, shared_prefix_kd, uld
from hf_dskd.losses.temperature import Temperatures, with_temperature
from hf_dskd.methods import DIVERGENCES


FLOAT64 = torch.float64


def softmax(logits):
    """One distribution from a list of floats or tensors."""
    weights = [torch.as_tensor(x).exp() for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q) if a > 0)


def value_and_gradient(function, logits):
    logits = logits.detach().clone().requires_grad_()
    value = function(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


class TestSharedPrefix:
    @pytest.mark.parametrize("sizes", [(7, 9), (9, 7), (8, 8)])
    def test_equals_a_loop_over_the_prefix(self, sizes):
        torch.manual_seed(0)
        student, teacher = (torch.randn(4, size, dtype=FLOAT64) for size in sizes)
        shared = min(sizes)

        def plain(logits):
            return torch.stack([kl(softmax(t[:shared]), softmax(s[:shared])) for s, t in zip(logits, teacher)])

        torch.testing.assert_close(
            value_and_gradient(lambda x: shared_prefix_kd(x, teacher, forward_kl), student),
            value_and_gradient(plain, student),
        )

    def test_padding_of_the_vocabulary_changes_nothing(self):
        torch.manual_seed(0)
        student, teacher = torch.randn(4, 7), torch.randn(4, 7)
        padded = torch.cat([teacher, torch.full((4, 5), 50.0)], -1)
        expected = reverse_kl(student, teacher)
        torch.testing.assert_close(shared_prefix_kd(student, padded, reverse_kl), expected)
        assert (expected > 0).all()

    def test_the_teacher_is_a_constant(self):
        student, teacher = torch.randn(4, 7, requires_grad=True), torch.randn(4, 9, requires_grad=True)
        shared_prefix_kd(student, teacher, forward_kl).sum().backward()
        assert teacher.grad is None and student.grad.abs().max() > 0


class TestPairs:
    def test_equal_a_loop(self):
        torch.manual_seed(0)
        # Two answers an example, of different lengths on both sides, some of them empty.
        counts = torch.randint(0, 4, (5, 2, 2))
        counts[2, :, 0] = 0
        sides: list = [[], []]
        expected, offset = [], 0
        for example in counts.tolist():
            rows = [[(answer, i) for answer in range(2) for i in range(example[answer][side])] for side in range(2)]
            expected += [offset + rows[1].index(row) if row in rows[1] else -1 for row in rows[0]]
            offset += len(rows[1])
            for side, found in zip(sides, rows):
                places = [answer * 2**20 + i for answer, i in found]
                side.append(places + [-1] * (6 - len(places)))
        assert -1 in expected and max(expected) > 3
        places = [torch.tensor(side) for side in sides]
        masks = [side >= 0 for side in places]
        assert rows_at_places(*places, *masks).tolist() == expected
        # What a template puts before an answer has a row, and no place.
        places, masks = (
            [torch.cat([values, new], 1) for values, new in zip(parts, more)]
            for parts, more in (
                ([places[0].new_full((5, 1), -1), places[1].new_full((5, 1), -1)], places),
                ([masks[0].new_ones(5, 1), masks[1].new_ones(5, 1)], masks),
            )
        )
        own, theirs = (mask.sum(1).tolist() for mask in masks)
        found = rows_at_places(*places, *masks).split(own)
        assert all(part[0] == -1 for part in found)
        shift = [number + 1 for number, count in enumerate(theirs) for _ in range(count - 1)]
        assert [row for part in found for row in part[1:].tolist()] == [
            row + shift[row] if row >= 0 else -1 for row in expected
        ]

    def test_of_nothing(self):
        nothing, places = torch.full((2, 3), -1), torch.arange(4).repeat(2, 1)
        masks = nothing >= 0, places >= 0
        assert rows_at_places(nothing, places, *masks).tolist() == []
        assert rows_at_places(places, nothing, *masks[::-1]).tolist() == [-1] * 8


class TestULD:
    @staticmethod
    def plain(student, teacher):
        rows = []
        for s, t in zip(student, teacher):
            q, p = sorted(softmax(s), reverse=True), sorted(softmax(t), reverse=True)
            length = max(len(q), len(p))
            q, p = q + [torch.tensor(0.0)] * (length - len(q)), p + [torch.tensor(0.0)] * (length - len(p))
            rows.append(sum((a - b).abs() for a, b in zip(q, p)))
        return torch.stack(rows)

    @pytest.mark.parametrize("sizes", [(6, 9), (9, 6), (7, 7)])
    def test_equals_a_loop(self, sizes):
        torch.manual_seed(0)
        student, teacher = (2 * torch.randn(5, size, dtype=FLOAT64) for size in sizes)
        torch.testing.assert_close(
            value_and_gradient(lambda x: uld(x, teacher), student),
            value_and_gradient(lambda x: self.plain(x, teacher), student),
        )

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_rows_do_not_depend_on_the_batch(self, dtype):
        torch.manual_seed(0)
        # Of 300 logits in steps of 1/4 many are equal.
        student, teacher = ((4 * torch.randn(9, size)).round().div(4).to(dtype) for size in (300, 200))
        value, gradient = value_and_gradient(lambda x: uld(x, teacher), student)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        for row in range(9):
            other = teacher[row : row + 1]
            alone = value_and_gradient(partial(lambda t, x: uld(x, t), other), student[row : row + 1])
            assert torch.equal(alone[0][0], value[row]) and torch.equal(alone[1][0], gradient[row])

    def test_of_nothing(self):
        value, gradient = value_and_gradient(lambda x: uld(x, torch.zeros(0, 5)), torch.zeros(0, 4))
        assert value.shape == (0,) and gradient.shape == (0, 4)

    def test_the_teacher_is_a_constant(self):
        student, teacher = torch.randn(4, 7, requires_grad=True), torch.randn(4, 9, requires_grad=True)
        uld(student, teacher).sum().backward()
        assert teacher.grad is None and student.grad.abs().max() > 0


class TestMapped:
    VOCABULARY_MAP = torch.tensor([2, 0, 2, -1, 5, 1, 2, 0])  # V_t = 8; of V_s = 6, tokens 3 and 4 get nothing
    PARTNER = torch.tensor([1, -1, 0, 3])
    TARGETS = torch.tensor([4, 5, 2, 0])

    @staticmethod
    def logits(dtype=FLOAT64):
        torch.manual_seed(0)
        return torch.randn(4, 6, dtype=FLOAT64).to(dtype), torch.randn(5, 8, dtype=FLOAT64).to(dtype)

    def distribution(self, teacher, row):
        """The target of a row without any floor, by loops."""
        mass = [0.0] * 6
        if self.PARTNER[row] < 0:
            mass[self.TARGETS[row]] = 1.0
            return torch.tensor(mass, dtype=FLOAT64)
        for token, probability in enumerate(softmax(teacher[self.PARTNER[row]])):
            if self.VOCABULARY_MAP[token] >= 0:
                mass[self.VOCABULARY_MAP[token]] += float(probability)
        return torch.tensor(mass, dtype=FLOAT64) / sum(mass)

    def call(self, teacher, divergence):
        rows = teacher[self.PARTNER.clamp(min=0)], self.PARTNER >= 0
        return lambda student: mapped_kd(student, *rows, self.VOCABULARY_MAP, self.TARGETS, divergence)

    def test_forward_kl_equals_a_loop(self):
        student, teacher = self.logits()

        def plain(logits):
            return torch.stack([kl(self.distribution(teacher, row), softmax(logits[row])) for row in range(4)])

        # The floor adds 6e-12 to each distribution.
        torch.testing.assert_close(
            value_and_gradient(self.call(teacher, forward_kl), student),
            value_and_gradient(plain, student),
            rtol=0,
            atol=1e-9,
        )

    def test_reverse_kl_equals_a_loop(self):
        student, teacher = self.logits()

        def plain(logits):
            rows = []
            for row in range(4):
                p = [max(float(x), module.TARGET_FLOOR) for x in self.distribution(teacher, row)]
                rows.append(kl(softmax(logits[row]), torch.tensor(p, dtype=FLOAT64)))
            return torch.stack(rows)

        torch.testing.assert_close(
            value_and_gradient(self.call(teacher, reverse_kl), student),
            value_and_gradient(plain, student),
            rtol=0,
            atol=1e-9,
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_student_is_not_its_own_teacher(self, dtype):
        """The released code writes its target over the student's logits in float32, and so reports 0."""
        student, teacher = self.logits(dtype)
        before = student.clone()
        value, gradient = value_and_gradient(self.call(teacher, forward_kl), student)
        assert (value > 0.01).all() and (gradient.abs().amax(1) > 0.01).all()
        assert torch.equal(student, before)

    @pytest.mark.parametrize("tau", [1.0, 2.0, 4.0])
    def test_the_floor_is_below_rounding_in_a_large_vocabulary(self, tau):
        """At 4, a floor put under the target before the temperature would hold 98% of it."""
        torch.manual_seed(0)
        student, teacher = torch.randn(2, 150_000), 3 * torch.randn(1, 50)
        paired, targets = torch.tensor([True, False]), torch.tensor([0, 7])
        divergence = with_temperature(forward_kl, Temperatures(1.0, tau))
        value = mapped_kd(student, teacher.expand(2, -1), paired, torch.arange(50), targets, divergence, tau)
        log_q = student.double().log_softmax(-1)
        p = (teacher[0].double() / tau).softmax(-1)
        expected = torch.stack([(p * (p.log() - log_q[0, :50])).sum(), -log_q[1, 7]])
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)

    @pytest.mark.parametrize("name", DIVERGENCES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_divergence_is_finite(self, name, dtype):
        # Sure students and a sure teacher, right and wrong.
        student = 80.0 * torch.nn.functional.one_hot(torch.tensor([0, 3, 2, 4]), 6).to(dtype)
        teacher = 80.0 * torch.nn.functional.one_hot(torch.tensor([0, 1, 4, 6, 3]), 8).to(dtype)
        value, gradient = value_and_gradient(self.call(teacher, DIVERGENCES[name].load()), student)
        assert value.isfinite().all() and gradient.isfinite().all() and (value > -1e-5).all()
        if name == "reverse_kl":
            assert value.max() < -math.log(module.TARGET_FLOOR) + 0.01

    def test_rows_of_nothing(self):
        nothing = torch.zeros(0, dtype=torch.int64)
        value, gradient = value_and_gradient(
            lambda x: mapped_kd(x, torch.zeros(0, 8), nothing > 0, self.VOCABULARY_MAP, nothing, forward_kl),
            torch.zeros(0, 6),
        )
        assert value.shape == (0,) and gradient.shape == (0, 6)

    def test_packed_partners_do_not_depend_on_padding(self):
        student_mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
        teacher_mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
        partner = torch.tensor([[2, -1, -1], [-1, -1, -1], [-1, 1, 0]])
        expected = [2, -1, -1, 5, 4]  # the teacher's third example begins at row 4
        assert packed_partners(partner, student_mask, teacher_mask).tolist() == expected
        wider = [torch.nn.functional.pad(x, (0, 2), value=v) for x, v in ((student_mask, 0), (teacher_mask, 0))]
        padded = torch.nn.functional.pad(partner, (0, 2), value=-1)
        assert packed_partners(padded, *wider).tolist() == expected

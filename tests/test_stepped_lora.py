"""Adapters stepped in the backward pass against batched_lora and adapter_adamw one after the other."""

import contextlib
from dataclasses import dataclass

import pytest
import torch

from pgolf_kernels import AdamStep, LoraPass, SteppedLora, adapter_adamw, batched_lora, stepped_lora
from pgolf_kernels._triton_op import interpreting
from tests import triton_aot


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]  # rows of each document
    steps: tuple[int, ...]  # of the first pass; the second has one more where there is one
    features: int = 24
    outs: tuple[int, ...] = (40,)
    ranks: tuple[int, ...] = (8,)
    beta1: float = 0.0
    adds: tuple[int, ...] = ()  # projections of the adapter alone, with a factor for each output, added to a residual
    reads_again: bool = False  # x is read again behind the call, through what the call returns

    @property
    def rows(self) -> int:
        return sum(self.lengths) + 5  # five of no document


CASES = [
    Case((70, 0, 9), (3, 1, 1)),
    Case((30, 150, 64), (1, 0, 7), 33, (40, 19, 70), (5, 16, 3), beta1=0.8),
    Case((30, 129, 64), (1, 2, 0), 40, (130,), (20,), adds=(0,), reads_again=True),
    Case((30, 0, 131, 0), (1, 2, 0, 1), 33, (40, 19, 70, 33), (5, 16, 3, 20), adds=(3,), reads_again=True),
    Case((30, 0, 131), (1, 2, 0), 40, (40, 24), (8, 16), reads_again=True),
    Case((1, 2, 3), (1, 1, 1), 16, (8, 8), (2, 2), beta1=0.5, adds=(0, 1)),
    # Three and four projections in one launch: none, some and all of them with a factor, with several tiles each way.
    Case((65, 0, 20, 3), (2, 1, 0, 1), 140, (70, 33, 129, 8), (70, 16, 121, 5), beta1=0.6, adds=(0, 2)),
    Case((20, 0, 66), (0, 1, 3), 40, (24, 1, 16), (1, 16, 8), adds=(1,)),
    Case((3, 64), (1, 2), 16, (8, 72, 65), (3, 2, 16), beta1=0.7, adds=(0, 1, 2), reads_again=True),
    Case((64, 1), (1, 1), 16, (16, 8, 70, 8), (16, 8, 8, 16)),
    Case((20, 3), (1, 2), 16, (8, 8, 16, 8, 24, 8), (2, 16, 8, 3, 5, 8), adds=(4,)),  # in two launches
]
ADAM = {"lr": 1e-2, "beta2": 0.99, "eps": 1.0, "weight_decay": 0.1}  # a small eps would make signs of gradients
BOUNDS = torch.tensor([0, 70, 70, 79]).int()
LOOSE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class _Problem:
    """Two slots of adapters, inputs for a pass through the first, and the same done in two parts in fp64."""

    def __init__(self, case, dtype, device="cpu"):
        generator = torch.Generator().manual_seed(case.features)

        def draw(scale, *size):
            return (torch.randn(size, generator=generator) * scale).to(device)

        own = torch.float64 if dtype == torch.float64 else torch.float32
        documents, features = len(case.lengths), case.features
        shapes = list(zip(case.outs, case.ranks, strict=True))
        self.case, self.dtype = case, dtype
        self.a = [torch.zeros(2, documents, rank, features, dtype=own, device=device) for _, rank in shapes]
        self.b = [torch.zeros(2, documents, out, rank, dtype=own, device=device) for out, rank in shapes]
        self.stepped = SteppedLora(self.a, self.b, dtype=dtype, mean=case.beta1 > 0)
        self.first = [draw(features**-0.5, *a.shape).to(own) for a in self.a]
        for a, values in zip(self.a, self.first, strict=True):
            a.copy_(values)
        self.stepped.hand_over(torch.arange(documents, device=device))
        self.bounds = torch.tensor([0, *case.lengths], device=device).cumsum(0).int()
        self.steps = [torch.tensor(case.steps, device=device) + i * (torch.tensor(case.steps, device=device) > 0)
                      for i in range(2)]  # fmt: skip
        weights = [
            None if i in case.adds else draw(features**-0.5, out, features).to(dtype) for i, out in enumerate(case.outs)
        ]
        self.inputs = [
            (
                draw(1.0, case.rows, features).to(dtype),
                weights,
                [draw(1.0, case.rows, out).to(dtype) if i in case.adds else None for i, out in enumerate(case.outs)],
                [draw(1.0, out) if i in case.adds else None for i, out in enumerate(case.outs)],
                [draw(1.0, case.rows, out).to(dtype) for out in case.outs],
                draw(1.0, case.rows, features).to(dtype) if case.reads_again else None,
            )
        ] * 2

    def ours(self):
        results = []
        for (x, weights, residuals, scales, grads, later), steps in zip(self.inputs, self.steps, strict=True):
            x, *residuals = (None if t is None else t.clone().requires_grad_() for t in (x, *residuals))
            leaves = [x, *(t for t in residuals if t is not None)]
            through = LoraPass(self.bounds, AdamStep(steps, beta1=self.case.beta1, **ADAM))
            ys, again = stepped_lora(x, weights, self.stepped[0], through, residuals=residuals, out_scales=scales)
            loss = sum((y * grad).sum() for y, grad in zip(ys, grads, strict=True))
            loss = loss if later is None else loss + (again * later).sum()
            results += [*ys, *through.backward(loss, leaves)]
        moments = [*self.stepped[0].a, *self.stepped[0].b]
        means = [moment.mean for moment in moments if moment.mean is not None]
        return [t.detach() for t in (*results, *self.a, *self.b, *(moment.square for moment in moments), *means)]

    def in_parts(self):
        """Gradients by batched_lora, then adapter_adamw, all in fp64, which a GPU's optimiser does not take."""
        a, b = ([t.to("cpu", torch.float64, copy=True) for t in ts] for ts in (self.a, self.b))
        squares = [torch.zeros_like(t[:1]) for t in (*a, *b)]
        means = [torch.zeros_like(t[:1]) for t in (*a, *b)] if self.case.beta1 > 0 else None
        results = []
        for inputs, steps in zip(self.inputs, self.steps, strict=True):
            x, weights, residuals, scales, grads, later = _on_the_cpu(inputs)
            x, *residuals = (None if t is None else t.double().requires_grad_() for t in (x, *residuals))
            leaves = [t.detach()[0].requires_grad_() for t in (*a, *b)]
            ys = []
            for i, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
                own_b = leaves[len(a) + i]
                own_b = own_b if scale is None else own_b * scale.double().unsqueeze(-1)
                ys.append(batched_lora(x, None if weight is None else weight.double(), leaves[i], own_b,
                                       residual=residuals[i], cu_seqlens=self.bounds.cpu()))  # fmt: skip
            loss = sum((y * grad.double()).sum() for y, grad in zip(ys, grads, strict=True))
            loss = loss if later is None else loss + (x * later.double()).sum()
            inputs = [x, *(t for t in residuals if t is not None)]
            found = torch.autograd.grad(loss, [*inputs, *leaves])
            results += [*ys, *found[: len(inputs)]]
            adapter_adamw(
                [t[:1] for t in (*a, *b)], [t.unsqueeze(0) for t in found[len(inputs) :]], squares, steps.cpu(),
                exp_avgs=means, beta1=self.case.beta1, **ADAM,
            )  # fmt: skip
        return [t.detach() for t in (*results, *a, *b, *(t[0] for t in (*squares, *(means or []))))]


def _on_the_cpu(tensors):
    """Tensors, None and lists of them, moved."""
    if isinstance(tensors, list | tuple):
        return [_on_the_cpu(each) for each in tensors]
    return None if tensors is None else tensors.cpu()


def _assert_equals_the_parts(case, dtype, device="cpu", surroundings=contextlib.nullcontext):
    with surroundings():
        problem = _Problem(case, dtype, device)
    wanted = problem.in_parts()
    with surroundings():
        found = problem.ours()
    for number, (mine, truth) in enumerate(zip(found, wanted, strict=True)):
        error, size = (mine.double().cpu() - truth).norm(), truth.norm()
        assert error <= LOOSE[dtype] * size, f"result {number} of {case}: {error:.2e} of {size:.2e}"
    for first, a, b in zip(problem.first, problem.a, problem.b, strict=True):
        for i, (length, count) in enumerate(zip(case.lengths, case.steps, strict=True)):
            assert b[0, i].any() == (length > 0 and count > 0)  # a document that takes no step keeps its zero
            assert torch.equal(a[0, i], first[0, i]) == (count == 0)
        assert torch.equal(a[1], first[1]) and not b[1].any()
    if problem.stepped[0].low is not None:
        _assert_copies_are_current(problem)


def _assert_copies_are_current(problem):
    """What the products read is what the step has left."""
    stacked, own = problem.stepped[0].low
    row = 0
    for a, b, low_b, scale in zip(problem.a, problem.b, own, problem.inputs[0][3], strict=True):
        assert torch.equal(stacked[:, row : row + a.shape[2], : a.shape[3]], a[0].to(stacked.dtype))
        wanted = b[0] if scale is None else b[0] * scale.unsqueeze(-1)
        assert torch.equal(low_b[..., : b.shape[3]], wanted.to(low_b.dtype))
        row += low_b.shape[2]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_gradients_and_a_step_one_after_the_other(case, dtype):
    _assert_equals_the_parts(case, dtype)


def test_a_document_handed_over_starts_anew():
    problem = _Problem(CASES[1], torch.float32)
    problem.ours()
    problem.stepped.hand_over(torch.tensor([2]))
    for moments in (*problem.stepped[0].a, *problem.stepped[0].b):
        assert not moments.square[2].any() and not moments.mean[2].any() and moments.square[0].any()
    assert not any(b[:, 2].any() for b in problem.b) and all(b[0, 0].any() for b in problem.b)


def test_a_pass_without_a_step_leaves_everything():
    problem = _Problem(CASES[0], torch.float32)
    x, weights, *_ = problem.inputs[0]
    through = LoraPass(problem.bounds)
    for _ in range(2):
        (y,), _ = stepped_lora(x, weights, problem.stepped[0], through)
    assert not y.requires_grad and not problem.b[0].any()


def test_input_without_gradient_still_steps():
    problem = _Problem(CASES[0], torch.float32)
    x, weights, *_ = problem.inputs[0]
    through = LoraPass(problem.bounds, AdamStep(problem.steps[0], **ADAM))
    (y,), _ = stepped_lora(x, weights, problem.stepped[0], through)
    assert through.backward(y.sum()) == ()
    assert problem.b[0].any()


def test_a_loss_that_comes_past_the_adapters_takes_no_step():
    problem = _Problem(CASES[0], torch.float32)
    x, weights, *_ = problem.inputs[0]
    x, a = x.clone().requires_grad_(), problem.a[0].clone()
    through = LoraPass(problem.bounds, AdamStep(problem.steps[0], **ADAM))
    _, again = stepped_lora(x, weights, problem.stepped[0], through)
    (gradient,) = through.backward((3 * again).sum(), [x])
    assert torch.equal(gradient, torch.full_like(x, 3)) and torch.equal(problem.a[0], a)


def test_a_projection_that_nobody_reads_has_gradient_zero():
    used, unused = (_Problem(CASES[1], torch.float32) for _ in range(2))
    for problem, count in ((used, 3), (unused, 2)):
        x, weights, *_ = problem.inputs[0]
        through = LoraPass(problem.bounds, AdamStep(problem.steps[0], beta1=0.8, **ADAM))
        ys, _ = stepped_lora(x, weights, problem.stepped[0], through)
        through.backward(sum(y.sum() for y in ys[:count]) + 0 * ys[0].sum())
    for mine, theirs in zip((*used.a[:2], *used.b[:2]), (*unused.a[:2], *unused.b[:2]), strict=True):
        assert torch.equal(mine, theirs)
    assert used.b[2].any() and not unused.b[2].any()


def test_results_can_be_written_on_and_x_without_gradient_comes_back_as_it_is():
    problem = _Problem(CASES[0], torch.float32)
    x, weights, *_ = problem.inputs[0]
    through = LoraPass(problem.bounds, AdamStep(problem.steps[0], **ADAM))
    (y,), again = stepped_lora(x, weights, problem.stepped[0], through)
    y.add_(1)
    through.backward(y.sum())
    assert again is x and problem.b[0].any()


def test_what_a_loss_does_not_reach_has_no_gradient():
    problem = _Problem(CASES[0], torch.float32)
    x, weights, *_ = problem.inputs[0]
    unused = torch.ones(3, requires_grad=True)
    through = LoraPass(problem.bounds, AdamStep(problem.steps[0], **ADAM))
    (y,), _ = stepped_lora(x, weights, problem.stepped[0], through)
    (gradient,) = through.backward(y.sum(), [unused])
    assert torch.equal(gradient, torch.zeros(3))
    with pytest.raises(RuntimeError, match="got a pass without step"):
        LoraPass(problem.bounds).backward(y.sum())


def test_one_pass_has_one_number_of_rows():
    problem = _Problem(CASES[0], torch.float32)
    x, weights, *_ = problem.inputs[0]
    through = LoraPass(problem.bounds)
    stepped_lora(x, weights, problem.stepped[0], through)
    with pytest.raises(ValueError, match="x: got 80 rows, wanted 84 as in the pass's other calls"):
        stepped_lora(x[:80], weights, problem.stepped[1], through)


def test_the_same_adapters_twice_in_a_pass_raise():
    problem = _Problem(CASES[0], torch.float32)
    x, weights, *_ = problem.inputs[0]
    through = LoraPass(problem.bounds, AdamStep(problem.steps[0], **ADAM))
    stepped_lora(x, weights, problem.stepped[0], through)
    stepped_lora(x, weights, problem.stepped[1], through)
    with pytest.raises(RuntimeError, match="the same adapters twice in one pass"):
        stepped_lora(x, weights, problem.stepped[0], through)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 24, 1)}, ValueError, r"x: got shape \(3, 24, 1\), wanted \[N, 24\]"),
        ({"weights": [torch.randn(39, 24)]}, ValueError, r"weights\[0\]: got shape \(39, 24\), wanted \(40, 24\)"),
        ({"weights": [None, None]}, ValueError, "got lengths 2, 1, 1, wanted 1"),
        ({"weights": [torch.randn(40, 24, requires_grad=True)]}, ValueError, "wanted a frozen one"),
        ({"residuals": [torch.randn(3, 40)]}, ValueError, r"residuals\[0\]: got shape \(3, 40\)"),
        ({"out_scales": [torch.randn(39)]}, ValueError, r"out_scales\[0\]: got shape \(39,\), wanted \(40,\)"),
        ({"through": LoraPass(torch.zeros(3).int())}, ValueError, r"cu_seqlens: got torch.int32 of shape \(3,\)"),
        ({"through": LoraPass(torch.zeros(4))}, ValueError, "cu_seqlens: got torch.float32"),
        (
            {"through": LoraPass(BOUNDS, AdamStep(torch.ones(2, dtype=torch.int64), **ADAM))},
            ValueError,
            r"steps: got shape \(2,\)",
        ),
        (
            {"through": LoraPass(BOUNDS, AdamStep(torch.ones(3, dtype=torch.int64), beta1=0.9, **ADAM))},
            ValueError,
            "beta1: got 0.9",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    problem = _Problem(CASES[0], torch.float32)
    x, weights, *_ = problem.inputs[0]
    arguments = {"x": x, "weights": weights, "adapters": problem.stepped[0], "through": LoraPass(problem.bounds)}
    with pytest.raises(error, match=message):
        stepped_lora(**(arguments | change))


def test_calls_over_other_rows_belong_to_the_same_pass():
    problem = _Problem(CASES[0], torch.float32)
    case, few = problem.case, torch.tensor([0, 2, 2, 5]).int()
    x, weights, *_ = problem.inputs[0]
    through = LoraPass(problem.bounds, AdamStep(problem.steps[0], **(ADAM | {"beta1": case.beta1})))
    other = through.over(few)
    (y,), _ = stepped_lora(x, weights, problem.stepped[0], through)
    (z,), _ = stepped_lora(x[:5].detach(), weights, problem.stepped[1], other)
    with pytest.raises(RuntimeError, match="got the same adapters twice in one pass"):
        stepped_lora(x[:5], weights, problem.stepped[0], other)
    through.backward(y.sum() + z.sum())
    stepped = [[bool(problem.b[0][slot, i].any()) for i in range(3)] for slot in range(2)]
    assert stepped == [[True, False, True], [True, False, True]]


_A, _B = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 6, 4)


@pytest.mark.parametrize(
    ("lora_as", "lora_bs", "error", "message"),
    [
        ([], [], ValueError, "lora_as, lora_bs: got lengths 0, 0"),
        ([_A], [_B, _B], ValueError, "lora_as, lora_bs: got lengths 1, 2"),
        ([_A], [torch.zeros(1, 2, 6, 3)], ValueError, r"adapters 0: got A \(1, 2, 4, 8\) and B \(1, 2, 6, 3\)"),
        (
            [_A, torch.zeros(1, 3, 4, 8)],
            [_B, torch.zeros(1, 3, 6, 4)],
            ValueError,
            r"adapters 1: .*wanted \[1, 2, r, 8",
        ),
        ([_A, torch.zeros(2, 2, 4, 8)], [_B, torch.zeros(2, 2, 6, 4)], ValueError, "adapters 1: got A"),
        ([_A, torch.zeros(1, 2, 4, 9)], [_B, _B], ValueError, "adapters 1: got A"),
        ([_A.bfloat16()], [_B.bfloat16()], TypeError, "adapters 0: got torch.bfloat16"),
        ([_A], [_B.double()], TypeError, "adapters 0: got torch.float64"),
        ([_A], [_B.to("meta")], ValueError, "adapters 0: got device meta, wanted cpu"),
    ],
)
def test_wrong_adapters_are_named(lora_as, lora_bs, error, message):
    with pytest.raises(error, match=message):
        SteppedLora(lora_as, lora_bs, dtype=torch.float32, mean=False)


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_stepped_lora")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        Case((96, 0, 2048, 300), (1, 1, 2, 0), 512, (512, 256, 256, 512), (96,) * 4, adds=(3,), reads_again=True),
        Case((96, 0, 2048, 300), (1, 1, 2, 0), 512, (512, 256, 256), (96, 64, 32), beta1=0.9, adds=(1,)),
        Case((96,) * 64, (1,) * 63 + (0,), 512, (512, 256, 256, 512), (96,) * 4, beta1=0.9, adds=(3,)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_kernels_on_a_gpu(case, dtype):
    _assert_equals_the_parts(case, dtype, "cuda")


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        ([1, 2], {"beta2": 2.0}, "beta2: got 2.0"),
        ([1, 2], {"eps": -1e-8}, "eps: got -1e-08, wanted a finite number of at least 0"),
        ([1.0, 2.0], {}, "steps: got shape .* of torch.float32"),
        ([[1, 2]], {}, "steps: got shape"),
    ],
)
def test_numbers_that_are_no_steps(steps, options, message):
    with pytest.raises(ValueError, match=message):
        AdamStep(torch.tensor(steps), 1e-3, **options)


if __name__ == "__main__":
    from pgolf_kernels import _batched_lora_triton

    for small in CASES:
        for precision in (torch.float32, torch.float16):
            _assert_equals_the_parts(small, precision, surroundings=interpreting)
    _batched_lora_triton.SHORT_ROWS = 0  # as where documents are long
    for small in CASES[1:3]:
        _assert_equals_the_parts(small, torch.float32, surroundings=interpreting)

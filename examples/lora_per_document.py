"""A low-rank adapter for each document over one frozen layer, all trained side by side.

Each document has a map of its own, W plus a matrix of rank 2. One call reads all adapters, one call steps them.
"""

import torch

from pgolf_kernels import adapter_adamw, batched_lora

DOCUMENTS, ROWS, WIDTH, RANK = 6, 64, 32, 2


def main(steps: int = 150) -> tuple[float, float]:
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, WIDTH) / WIDTH**0.5  # frozen
    x = torch.randn(DOCUMENTS, ROWS, WIDTH)
    hidden = torch.randn(DOCUMENTS, RANK, WIDTH) / WIDTH**0.5, torch.randn(DOCUMENTS, WIDTH, RANK)
    wanted = batched_lora(x, weight, *hidden)

    # [slots, documents, ...]: one slot, for the one layer. B starts at zero, so that the first output is W x.
    a = (torch.randn(1, DOCUMENTS, RANK, WIDTH) / WIDTH**0.5).requires_grad_()
    b = torch.zeros(1, DOCUMENTS, WIDTH, RANK).requires_grad_()
    squares = [torch.zeros_like(a), torch.zeros_like(b)]
    means = [torch.zeros_like(a), torch.zeros_like(b)]

    losses = []
    for step in range(1, steps + 1):
        # The sum over documents: no document's gradient depends on another one.
        loss = (batched_lora(x, weight, a[0], b[0]) - wanted).square().mean(dim=(1, 2)).sum()
        losses.append(loss.item() / DOCUMENTS)
        gradients = torch.autograd.grad(loss, [a, b])
        counts = torch.full((DOCUMENTS,), step)  # each document's own step; 0 would leave its adapter alone
        with torch.no_grad():
            adapter_adamw([a, b], gradients, squares, counts, exp_avgs=means, lr=0.05, beta1=0.9)
    print(f"mean squared error {losses[0]:.3f} without adapters, {losses[-1]:.5f} after {steps} steps")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()

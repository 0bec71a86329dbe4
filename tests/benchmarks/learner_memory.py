"""Memory of the learner's Q and V against that of the plain loss: logits of all tokens, then cross-entropy.

Each is measured in a process of its own (on Linux), as the peak of its resident memory over what it held before:
memory that was once used is not given back to the system. States, output embedding and their gradients are counted on
both sides.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer

from tests.benchmarks.backend import circumstances, run_module

Side = Literal["ours", "plain"]
SHOWN = {"extra_peak_mib": "", "ratio_to_plain_loss": "", "num_nodes": "", "vocab_size": ""}


def bench(
    nodes: Annotated[int, typer.Option(min=1, help="States with a value.")] = 4096,
    vocabulary: Annotated[int, typer.Option(min=8, help="Rows of the output embedding.")] = 49_152,
    width: Annotated[int, typer.Option(min=1, help="Width of the states.")] = 576,
    timeout: Annotated[float, typer.Option(help="Longest wait for one measurement, in seconds.")] = 600.0,
) -> dict[str, object]:
    """Compare the memory of action values with that of the plain loss, forward and backward.

    In the result, `ratio_to_plain_loss` is our extra peak over that of the plain loss.
    """
    extra = {
        side: cast(int, run_module("learner_memory", side, nodes, vocabulary, width, timeout_s=timeout))
        for side in get_args(Side)
    }
    return {
        "ratio_to_plain_loss": extra["ours"] / extra["plain"],
        "extra_peak_mib": {side: round(size / 2**20, 1) for side, size in extra.items()},
        **circumstances(num_nodes=nodes, vocab_size=vocabulary, hidden_size=width, dtype="float32"),
    }


def measure_here(side: Side, num_nodes: int, vocab_size: int, hidden_size: int) -> int:
    """Bytes by which a forward and backward pass raises this process's peak of resident memory."""
    import torch
    from torch.nn.functional import cross_entropy

    from learner.state_tree.vocabulary import chunked_values

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_nodes, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).div_(hidden_size**0.5).requires_grad_()
    actions = torch.randint(vocab_size, (num_nodes,), generator=generator)
    rows = torch.arange(num_nodes)
    (hidden[:8] @ weight[:64].T).sum().backward()  # kernels are loaded before we look
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _peak_bytes()
    if side == "ours":
        v_floor, q_backspace, q, _ = chunked_values(hidden, weight, rows, actions, backspace_id=3)
        loss = (torch.logaddexp(v_floor, q_backspace) - q).mean()
    else:
        loss = cross_entropy(hidden @ weight.T, actions)
    loss.backward()
    return _peak_bytes() - before


def _peak_bytes() -> int:
    """Of this process alone: what `getrusage` tells contains the parent's memory at the time of the fork."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    print(measure_here(sys.argv[1], *map(int, sys.argv[2:])))  # type: ignore[arg-type]

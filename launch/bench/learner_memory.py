"""Memory of the learner's Q and V against that of the plain loss: logits of all tokens, then cross-entropy.

Each is measured in a process of its own (on Linux), as the peak of its resident memory over what it held before:
memory that was once used is not given back to the system. States, output embedding and their gradients are counted on
both sides.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args

from launch.bench.hardware import hardware

SideName = Literal["ours", "plain"]

TIMEOUT_S = 600.0


def bench_learner_memory(
    *, num_nodes: int = 4096, vocab_size: int = 49_152, hidden_size: int = 576, timeout_s: float = TIMEOUT_S
) -> dict[str, object]:
    """Measure the forward and backward pass from hidden states to Q and V.

    Args:
        num_nodes: states with a value. vocab_size, hidden_size: of the output embedding.
        timeout_s: longest wait for one measurement.

    Returns:
        JSON object; `ratio_to_plain_loss` is our extra peak over that of the plain loss.

    Raises:
        RuntimeError: a measuring process failed. TimeoutError: it did not answer in time.
    """
    extra = {side: _measure(side, (num_nodes, vocab_size, hidden_size), timeout_s) for side in get_args(SideName)}
    return {
        "ratio_to_plain_loss": extra["ours"] / extra["plain"],
        "extra_peak_mib": {side: round(size / 2**20, 1) for side, size in extra.items()},
        "num_nodes": num_nodes,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "dtype": "float32",
        "hardware": hardware(),
        "command": " ".join(sys.argv),
    }


def _measure(side: SideName, sizes: tuple[int, int, int], timeout_s: float) -> int:
    """Bytes of the extra peak, from a fresh process."""
    command = [sys.executable, "-m", "launch.bench.learner_memory", side, *map(str, sizes)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"the process that measures {side!r} did not answer within {timeout_s:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"the process that measures {side!r} failed: {done.stderr.strip() or done.returncode}")
    found = json.loads(done.stdout)
    assert isinstance(found, int)
    return found


def measure_here(side: SideName, num_nodes: int, vocab_size: int, hidden_size: int) -> int:
    """Bytes by which a forward and backward pass raises this process's peak of resident memory."""
    import torch
    from torch.nn.functional import cross_entropy

    from learner.state_tree.action_values import chunked_values

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_nodes, hidden_size, generator=generator).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator).div_(hidden_size**0.5).requires_grad_()
    actions = torch.randint(vocab_size, (num_nodes,), generator=generator)
    rows = torch.arange(num_nodes)
    (hidden[:8] @ weight[:64].T).sum().backward()  # kernels are loaded before we look
    hidden.grad = weight.grad = None
    before = _start_peak_bytes()
    if side == "ours":
        v_floor, q_backspace, q, _ = chunked_values(hidden, weight, rows, actions, backspace_id=3)
        loss = (torch.logaddexp(v_floor, q_backspace) - q).mean()
    else:
        loss = cross_entropy(hidden @ weight.T, actions)
    loss.backward()
    return _peak_bytes() - before


def _start_peak_bytes() -> int:
    """Forget the peak of resident memory so far; gives what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    """Of this process alone: what `getrusage` tells contains the parent's memory at the time of the fork."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(measure_here(sys.argv[1], *map(int, sys.argv[2:])))  # type: ignore[arg-type]

"""How does a task run a part of itself in a fresh process that may not hold more than so many bytes?

The child builds the same model as the cell's worker, calls ``part`` of the task's module and answers with one line of JSON. Its parent
watches the kernel's high-water mark of the child and ends it past the cap: a guard for the machine, as it looks only every
20 ms. The verdict is the mark that the child itself reads at its end, so that no short peak escapes. Never a limit on the address space,
which counts what is reserved and not what is used. On CUDA the allocator is given its share of the device; that line has never run.

The child ends when its parent does, and is a member of its process group.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any

from bdh_bench import registry
from bdh_bench.errors import LawError, PositionLimitError
from bdh_bench.measure.memory import peak_of, peak_resident_bytes
from bdh_bench.spec import RunSpec, parse_model
from bdh_bench.types import Apart, Cell, Scalar, TaskContext

_LOOK_S = 0.02
_LONGEST_ANSWER = 2**20


@dataclass(frozen=True)
class Ended:
    """How a watched process ended: its status, what it wrote, the highest mark that was seen, and whether the cap ended it."""

    code: int
    output: bytes
    peak_bytes: int
    capped: bool


def apart_for(cell: Cell, spec: RunSpec, contexts: tuple[int, ...]) -> Callable[[Mapping[str, Scalar], int], Apart]:
    """What a task of this cell is given as ``apart``."""

    def apart(request: Mapping[str, Scalar], cap_bytes: int) -> Apart:
        line = {
            "cell": asdict(cell),
            "spec": spec.as_json(),
            "contexts": contexts,
            "request": dict(request),
            "cap_bytes": cap_bytes,
        }
        command = [sys.executable, "-m", "bdh_bench.runner.apart"]
        return _judged(run_capped(command, json.dumps(line), cap_bytes), cap_bytes)

    return apart


def _judged(ended: Ended, cap_bytes: int) -> Apart:
    """What the child said, unless its memory says otherwise."""
    answer = _answer(ended.output)
    peak = max(ended.peak_bytes, int(answer.get("peak_bytes") or 0))
    if ended.capped or peak > cap_bytes:
        return Apart("oom_host", f"held {peak:,} bytes · the budget is {cap_bytes:,}", {}, peak)
    if not answer:
        return Apart("crash", f"the process ended with exit status {ended.code} and no result", {}, peak)
    return Apart(str(answer["status"]), str(answer["reason"]), dict(answer["values"]), peak)


def _answer(output: bytes) -> dict[str, Any]:
    """The last line, where it is an answer; libraries may have printed before it."""
    for line in output.splitlines()[-1:]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and {"status", "reason", "values"} <= value.keys():
            return value
    return {}


def run_capped(command: list[str], line: str, cap_bytes: int) -> Ended:
    """Run a command with one line on its stdin, and end it once its high-water mark is past the cap."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        output, peak, capped = _watch(process.pid, process.stdout, cap_bytes)
        if capped:
            process.kill()
        code = process.wait()
    except BrokenPipeError:
        output, peak, capped, code = b"", 0, False, process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()
    return Ended(code, output, peak, capped)


def _watch(pid: int, pipe: IO[bytes], cap_bytes: int) -> tuple[bytes, int, bool]:
    """What it writes until it closes its end, the highest mark seen, and whether that was past the cap."""
    output, peak = b"", 0
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            ready = selector.select(_LOOK_S)
            peak = max(peak, peak_of(pid) or 0)
            if peak > cap_bytes or len(output) > _LONGEST_ANSWER:
                return output, peak, peak > cap_bytes
            if ready:
                data = os.read(pipe.fileno(), 65_536)
                if not data:
                    return output, peak, False
                output += data


# -- the child ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Read the request, run the part, answer with one line."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status, reason, values = _outcome(request)
    answer = {"status": status, "reason": reason, "values": values, "peak_bytes": peak_resident_bytes()}
    print("\n" + json.dumps(answer), file=sys.__stdout__, flush=True)
    return 0


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _outcome(request: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    import torch

    try:
        return "ok", "", _part(request)
    except PositionLimitError as error:
        return "unsupported", str(error), {}
    except LawError as error:
        return "gate_failed", str(error), {}
    except torch.OutOfMemoryError as error:
        return "oom_cuda", str(error).strip(), {}
    except MemoryError as error:
        return "oom_host", f"allocator: {error}", {}
    except Exception as error:  # whatever a model raises is an answer; its traceback is in the log of the cell
        traceback.print_exc()
        short = "allocate memory" in str(error)
        return ("oom_host" if short else "error"), f"{type(error).__name__}: {error}", {}


def _part(request: Mapping[str, Any]) -> Mapping[str, Any]:
    import torch

    from bdh_bench.loading import load_model
    from bdh_bench.runner.matching import matched_model

    cell, spec = Cell(**request["cell"]), RunSpec.from_mapping(request["spec"])
    if spec.threads:
        torch.set_num_threads(spec.threads)
    if spec.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, request["cap_bytes"] / total))
    model_spec, task_spec = parse_model(cell.model), parse_model(cell.task)
    task = registry.load("tasks", task_spec.family)
    built = matched_model(spec, model_spec)
    model = load_model(built, device=spec.device, seed=cell.seed, train_context=spec.train_context)
    context = TaskContext(
        seed=cell.seed,
        context=cell.context,
        contexts=tuple(request["contexts"]),
        train_context=spec.train_context,
        documents=(),
        weights="loaded" if model_spec.option("weights") else "random",
        smoke=spec.smoke,
        progress=lambda phase, fraction, facts: None,
        state_protocol=spec.state_protocol,
    )
    result: Mapping[str, Any] = task.part(
        model, task.Config(**registry.task_values(task_spec)), context, request["request"]
    )
    return result


if __name__ == "__main__":
    sys.exit(main())

"""lm-eval's own command line with our models in it: ``python -m bdh_bench.lm_eval --model bdh_bench --model_args spec=bdh@quick …``.

Everything is theirs but four things: our tasks are known beside theirs, whose thousands of files are read only where one of them is
named; ``--model`` is ``bdh_bench`` and ``--device`` is ``cpu`` where they are left out; and the path of ``--use_cache`` gets the model's
fingerprint, because their cache names no model.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

from bdh_bench.errors import BenchError
from bdh_bench.lm_eval.catalogue import manager, require


def main() -> int:
    """Parse as lm-eval does, adjust, and let it run; the exit codes of bdh-bench for our own errors."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # their bootstrap would start a pool of processes
    try:
        require()
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging

        from bdh_bench.lm_eval import adapter  # registers the model

        setup_logging()
        command = HarnessCLI()
        arguments = command.parse_args()
        if getattr(arguments, "command", None) == "run":
            _adjust(arguments, adapter)
        command.execute(arguments)
    except BenchError as error:
        return _fail(str(error), error.exit_code)
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        return _fail(f"{error} · expected names of 'lm-eval ls tasks', or of --include_path", 2)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return code


def _adjust(arguments: Any, adapter: Any) -> None:
    given = dict(arguments.model_args or {})
    arguments.model = arguments.model or "bdh_bench"
    arguments.device = arguments.device or given.get("device") or "cpu"
    _know_tasks(arguments)
    if arguments.use_cache and arguments.model == "bdh_bench":
        lm = adapter.BenchLM.create_from_arg_obj(given, {"device": arguments.device})
        arguments.use_cache = lm.cache_path(arguments.use_cache)


def _know_tasks(arguments: Any) -> None:
    """Put our folder first; where all named tasks are ours or the user's, theirs are not indexed (that takes them seconds)."""
    import lm_eval.tasks

    own = manager(arguments.include_path or "")
    if arguments.tasks and all(name in own.all_tasks for name in arguments.tasks):
        lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    arguments.include_path = [str(path) for path in own.include_path]


if __name__ == "__main__":
    sys.exit(main())

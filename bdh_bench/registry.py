"""Which models and tasks exist, told without importing any of them.

The file name is the name: ``models/NAME.py`` is the model NAME, ``tasks/NAME.py`` the task NAME; a leading underscore
hides a file, and a file in ``models/`` that binds no name ``Model`` is theory about models and is not listed. Packages
outside add theirs by the entry-point groups ``bdh_bench.models`` and ``bdh_bench.tasks``; a plug-in cannot take the name of a
built-in, and a name that two plug-ins bring belongs to neither.

What a listing needs is read from the source text (first docstring line, literal constants, the fields of ``Config``), so
that ``list``, ``--help`` and the checks before a run start without torch. A model file defines

    Config           frozen dataclass; its fields are the options, their defaults the defaults
    scaled(target)   candidates for a parameter target, as Configs (see sizing.py)
    Model(config)    nn.Module + Streaming
    DEFAULTS         literal dictionary: learning_rate, position_limit, kind (transformer, recurrent, control, or yardstick for a
                     model without learning), architecture (a few words: norms, gating, positions, what is not in other models)
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from bdh_bench.errors import BenchError, PluginError, SpecError, UnknownNameError
from bdh_bench.options import meanings
from bdh_bench.sources import source_path
from bdh_bench.spec import WEIGHT_OPTIONS, ModelSpec, is_family, parse_bytes

_PACKAGE = Path(__file__).parent
BUILT_IN = "built in"

#: What a file must bind at its top to be a model or a task.
_NEEDS = {"models": ("Config", "Model"), "tasks": ("Config", "run")}


@dataclass(frozen=True)
class Entry:
    """One registered model or task, as its source text describes it.

    origin    "built in", or the distribution that brings it; problem is a reason why it cannot be used, or ""
    options   option name → default, from the fields of ``Config``; meanings: option name → what its docstring says of it
    text      the docstring of the file
    """

    kind: str
    name: str
    origin: str
    module: str
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    meanings: Mapping[str, str] = field(default_factory=dict)
    text: str = ""


def list_models() -> list[Entry]:
    """Every registered model, sorted by name; nothing is imported."""
    return [*_entries("models")]


def list_tasks() -> list[Entry]:
    """Every registered task, sorted by name; nothing is imported."""
    return [*_entries("tasks")]


def find(kind: str, name: str) -> Entry:
    """The entry of kind "models" or "tasks" called ``name``. Raises UnknownNameError, or PluginError if it cannot be used."""
    named = [entry for entry in _entries(kind) if entry.name == name]
    if not named:
        raise UnknownNameError(kind[:-1], name, {entry.name for entry in _entries(kind)})
    entry = named[0]  # the built-in, where there is one
    if entry.problem:
        origins = " and ".join(e.origin for e in named)
        raise PluginError(f"{kind[:-1]} {name!r} from {origins} cannot be used: {entry.problem}", _remedy(named))
    return entry


def _remedy(named: list[Entry]) -> str:
    if any(entry.origin == BUILT_IN for entry in named):
        return "correct that file"
    return f"uninstall one of them: pip uninstall {named[0].origin}" if len(named) > 1 else "correct that package"


def load(kind: str, name: str) -> ModuleType:
    """Import the file of this model or task. A broken file of this package raises its own error, a plug-in's a PluginError."""
    entry = find(kind, name)
    with blame(entry, "be imported"):
        return importlib.import_module(entry.module)


@contextmanager
def blame(entry: Entry, action: str) -> Iterator[None]:
    """Whatever a plug-in raises in here is reported as its own error, not as a defect of this package."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if entry.origin == BUILT_IN or isinstance(error, BenchError):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(
            f"{entry.kind[:-1]} {entry.name!r} from {entry.origin} cannot {action}: {said}",
            f"correct {'that file' if entry.origin.endswith('.py') else 'or uninstall that package'}; "
            "BDH_BENCH_DEBUG=1 shows the traceback",
        ) from error


def load_file(path: Path) -> ModuleType:
    """Import a model's file that is not installed anywhere. Raises PluginError, or SpecError where there is no such file."""
    if not path.is_file():
        raise SpecError(f"no file {path} · expected a model's source file", "or the name of a registered model")
    entry = _describe("models", path.stem, str(path), path.stem, path)
    if entry.problem:
        raise PluginError(f"model {path.stem!r} from {path} cannot be used: {entry.problem}", "correct that file")
    name = f"_bdh_bench_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and laws look a class's module up by its name
    with blame(entry, "be imported"):
        spec.loader.exec_module(module)
    return module


def check(spec: ModelSpec) -> Entry:
    """The entry for a model name, after checking word and option names without importing the model."""
    entry = find("models", spec.family)
    words = entry.defaults.get("words", ())
    if words and spec.name not in words:
        raise UnknownNameError(f"{spec.family} model", spec.name, words)
    for key, _ in spec.options:
        if key not in entry.options and key not in WEIGHT_OPTIONS:
            raise UnknownNameError(f"option of {spec.family}", key, [*entry.options, *WEIGHT_OPTIONS])
    return entry


def task_values(spec: ModelSpec) -> dict[str, Any]:
    """What a task's name says of its ``Config``: the word behind its name, and its options by the type of their defaults.

    Raises UnknownNameError for an option that does not exist, SpecError for a value that is none.
    """
    entry = find("tasks", spec.family)
    field_of_word = entry.defaults.get("word", "")
    if spec.size or bool(spec.name) != bool(field_of_word):
        wanted = f"{spec.family}:{field_of_word.upper()}[:key=value]" if field_of_word else "NAME[:key=value]"
        raise SpecError(f"got task {str(spec)!r} · expected {wanted}")
    values: dict[str, Any] = {field_of_word: spec.name} if field_of_word else {}
    options = {name: default for name, default in entry.options.items() if name != field_of_word}
    for key, text in spec.options:
        if key not in options:
            raise UnknownNameError(f"option of task {spec.family}", key, options)
        if isinstance(options[key], str):
            values[key] = text
        elif text.isascii() and text.isdigit() and int(text) >= 1:
            values[key] = int(text)
        else:
            raise SpecError(f"got {key}={text} for task {spec.family} · expected a whole number of at least 1")
    return values


def give_bytes(tasks: Sequence[ModelSpec], key: str, value: str) -> tuple[ModelSpec, ...]:
    """The tasks, with an option given to each that takes bytes by that name and has none. Raises SpecError where none of them does."""
    known = [entry.name for entry in list_tasks() if _are_bytes(entry.options.get(key))]
    if not any(task.family in known for task in tasks):
        names = ", ".join(known)
        raise SpecError(
            f"got --{key} {value} and no task that takes it · expected one of {names}", f"add --task {names}"
        )
    return tuple(
        replace(task, options=tuple(sorted((*task.options, (key, value)))))
        if task.family in known and task.option(key) is None
        else task
        for task in tasks
    )


def _are_bytes(default: Any) -> bool:
    """Whether a default is a size, such as 2GiB."""
    try:
        return isinstance(default, str) and parse_bytes(default) > 0
    except SpecError:
        return False


@cache
def _entries(kind: str) -> tuple[Entry, ...]:
    """Sorted by name; a built-in before the plug-ins that ask for its name."""
    built_in = [
        _describe(kind, path.stem, BUILT_IN, f"bdh_bench.{kind}.{path.stem}", path)
        for path in (_PACKAGE / kind).glob("[!_]*.py")
        if kind != "models" or _may_hold_a_model(path)
    ]
    plugins = [_describe_plugin(kind, point) for point in entry_points(group=f"bdh_bench.{kind}")]
    return tuple(sorted([*built_in, *_settled(plugins, {e.name for e in built_in})], key=_order))


def _order(entry: Entry) -> tuple[str, bool, str]:
    return entry.name, entry.origin != BUILT_IN, entry.origin


def _settled(plugins: list[Entry], taken: set[str]) -> Iterator[Entry]:
    """Plug-ins with the quarrels about names decided: never silently."""
    count = Counter(entry.name for entry in plugins)
    for entry in plugins:
        if entry.name in taken:
            yield replace(entry, problem=f"the name {entry.name!r} is {BUILT_IN}; a plug-in needs another name")
        elif count[entry.name] > 1:
            origins = " and ".join(sorted(e.origin for e in plugins if e.name == entry.name))
            yield replace(entry, problem=f"the name {entry.name!r} is brought by {origins}; it must be one's alone")
        else:
            yield entry


def _may_hold_a_model(path: Path) -> bool:
    """Whether the file binds the name ``Model``; one that cannot be parsed may, and is listed with its problem."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return True
    return any("Model" in _bound(node) for node in tree.body)


def _bound(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file binds."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return {node.name}
    if isinstance(node, ast.ImportFrom | ast.Import):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


def _describe_plugin(kind: str, point: EntryPoint) -> Entry:
    origin = (point.dist and point.dist.name) or "unknown distribution"
    broken = Entry(kind, point.name, origin, point.value, "")
    if not is_family(point.name):
        return replace(broken, problem="its name cannot be written on the command line; use letters, digits, _ and -")
    try:
        module = point.module
        path = source_path(module)
        packages = [source_path(above) for above in _packages(module)]
    except Exception as error:  # a path hook or a malformed entry point may raise anything
        return replace(broken, problem=f"{type(error).__name__}: {error}")
    if path is None:
        return replace(broken, problem=f"no source file of the module {module!r} is installed")
    entry = _describe(kind, point.name, origin, module, path)
    raising = (_cannot_import(above) for above in (*packages, path) if above is not None)
    return replace(entry, problem=next(filter(None, (entry.problem, *raising)), ""))


def _packages(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _cannot_import(path: Path) -> str:
    """Why importing this file must fail, as far as its text tells: it raises, or what it imports is not installed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    for node in tree.body:
        if isinstance(node, ast.Raise):
            what = ast.unparse(node.exc) if node.exc else "an exception"
            return f"{path.name} raises {what} when imported (line {node.lineno})"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            if not _installed(name.partition(".")[0]):
                return f"{path.name} imports {name!r}, which is not installed (line {node.lineno})"
    return ""


def _installed(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _describe(kind: str, name: str, origin: str, module: str, path: Path) -> Entry:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:  # ValueError: text that is no UTF-8, or has null bytes
        return Entry(kind, name, origin, module, "", problem=f"{type(error).__name__}: {error}")
    text = ast.get_docstring(tree) or ""
    problem = _lacks(kind, tree)
    defaults: dict[str, Any] = {}
    options: dict[str, Any] = {}
    meant: dict[str, str] = {}
    for node in tree.body:
        if "DEFAULTS" in _bound(node):
            value = _literal(getattr(node, "value", None))
            if isinstance(value, dict):
                defaults = value
            else:
                problem = problem or f"DEFAULTS is no literal dictionary (line {node.lineno})"
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            options = dict(_fields(node))
            meant = meanings(ast.get_docstring(node) or "", options)
    if defaults.get("reads") and not {"block", "blocks"} <= set(options):
        problem = problem or "it reads text, so its Config needs the fields block and blocks (see long_ppl)"
    summary = text.split("\n", 1)[0]
    return Entry(kind, name, origin, module, summary, defaults, options, problem, meant, text)


def _lacks(kind: str, tree: ast.Module) -> str:
    """What the file does not define, as a sentence, or ""."""
    bound = set().union(*(_bound(node) for node in tree.body))
    lacking = [name for name in _NEEDS[kind] if name not in bound]
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    if "Config" not in lacking and "Config" not in classes:
        return "Config is not a class of this file; its fields are read from the source"
    return f"it defines no {' and no '.join(lacking)}" if lacking else ""


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id, _literal(item.value)


def _literal(node: ast.expr | None) -> Any:
    """The value that the text stands for, or None where it must be computed."""
    try:
        return ast.literal_eval(node) if node is not None else None
    except (ValueError, TypeError):
        return None

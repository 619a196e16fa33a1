"""Programs: what a runtime op executes, named by content so that any process can find or rebuild it.

1. The key of a program is ``m`` and hex digits, a hash over text, backend, target, block label and moec's version: a
   plain identifier, which travels as a string argument through every compiler and cache below.
2. A key says the same thing in every process. A program lives in a table in memory and as text in the cache
   directory; a process that meets an unknown key (a compiled graph from a warm cache) reads the file and checks that
   its content has that hash.
3. Programs that differ only in their label share one kernel. Kernels are loaded when first run, once.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy

from moec import __version__
from moec.backends.base import Backend, Kernel, program_op
from moec.backends.registry import get_backend
from moec.cache import cache_dir, store
from moec.ir.attributes import ListAttr
from moec.ir.core import Graph, Op, Value
from moec.ir.errors import MoecError
from moec.ir.opdef import op_def
from moec.ir.types import SymType, TensorType, Type, as_dim
from moec.op_costs import op_costs

KEY_DIGITS = 40
_HEADER = "// moec program "
_GENERAL = ("moe.route", "moe.experts", "moe.parallel_experts", "moe.begin")
_ROUTED = "routed"
_FIELDS = ("version", "backend", "target", "label", "checks")


class ProgramError(MoecError):
    """A program that is unknown to this process, or whose file does not hold what its name says."""

    code = "program"


@dataclass(frozen=True, eq=False)
class Program:
    """One lowered op of one block.

    Attributes:
        key: Content hash, ``m`` + hex digits.
        graph: Graph of one op; its arguments are the op's flat operands, its outputs the op's results.
        backend: Name of the backend that executes it.
        target: Target text (``cpu``).
        label: Name of the block in the user's model, for messages and counters.
        checks: Mode of the run-time checks, or "" for the process's mode.
        text: The graph's text.
        routed: Its ids are those of a ``moe.route`` that chooses by attributes: none can be out of range.
    """

    key: str
    graph: Graph
    backend: str
    target: str
    label: str
    checks: str
    text: str
    op: Op = field(repr=False)
    routed: bool = False

    @property
    def content(self) -> tuple[str, str, str]:
        """What decides the kernel: equal for equal blocks."""
        return self.backend, self.target, self.text

    @property
    def asynchronous(self) -> bool:
        """Its kernel never waits for the device."""
        return get_backend(self.backend).asynchronous

    def kernel(self) -> Kernel:
        """The loaded kernel, shared by all programs of the same content."""
        return _KERNELS.get(self.content) or _load_kernel(self)


_LOCK = threading.RLock()
_PROGRAMS: dict[str, Program] = {}
_KERNELS: dict[tuple[str, str, str], Kernel] = {}


def program_graph(op: Op) -> Graph:
    """The program of one op of any graph: names and the token count made canonical, so that equal blocks are equal.

    Arguments are named after the op's operands, values by number. The number of tokens, if it is a symbol, becomes
    ``T``; if it is a number or an expression, it becomes ``T`` in the operands and results that have a row a token.
    """
    copy = Graph("program")
    args: list[Value] = []
    for group, size in zip(op_def(op.name).operands, op.groups, strict=False):
        start = len(args)
        for i in range(size):
            name = group.name if size == 1 else f"{group.name}{i}"
            args.append(copy.add_arg(op.operands[start + i].type, name))
    new = Op(
        op.name,
        args,
        [r.type for r in op.results],
        attrs=op.attrs,
        regions=[r.clone() for r in op.regions],
        groups=op.groups,
        loc=op.loc,
        names=op_def(op.name).results,
    )
    copy.append(new)
    copy.append(Op("return", new.results, groups=(len(new.results),)))
    for definition, region in zip(op_def(op.name).regions, new.regions, strict=False):
        region.name = definition.name
        _number_values(region)
    _generalise_tokens(copy, new)
    return copy


def _number_values(graph: Graph) -> None:
    values = [*graph.args, *(r for op in graph.ops for r in op.results)]
    for i, value in enumerate(values):
        value.name = f"v{i}"
    for op in graph.ops:
        for region in op.regions:
            _number_values(region)


def _generalise_tokens(graph: Graph, op: Op) -> None:
    first = op.operands[0].type if op.operands else None
    if not isinstance(first, TensorType) or not first.shape:
        return
    tokens, general = first.shape[0], as_dim("T")
    if tokens.is_Symbol and tokens != general:
        if not any(general in _free_symbols(t) for t in _types(graph)):
            _replace_symbol(graph, tokens, general)
    elif not tokens.is_Symbol and op.name in _GENERAL and not (op.name == "moe.route" and op.regions):
        rowwise = op.operands[:1] if op.name == "moe.route" else op.operands[:3]
        if op.name in ("moe.parallel_experts", "moe.begin"):
            rowwise += tuple(v for v in op.group("beside") if _has_rows(v.type, tokens))
        for value in (*rowwise, *op.results):
            if isinstance(value.type, TensorType):
                value.type = value.type.with_(shape=(general, *value.type.shape[1:]))


def _has_rows(type: Type, tokens: sympy.Expr) -> bool:
    return isinstance(type, TensorType) and type.rank == 2 and type.shape[0] == tokens


def _values(graph: Graph) -> list[Value]:
    found: list[Value] = list(graph.args)
    for op in graph.walk():
        found += op.results
        for region in op.regions:
            found += region.args
    return found


def _types(graph: Graph) -> list[Type]:
    return [v.type for v in _values(graph)]


def _free_symbols(type: Type) -> set[sympy.Basic]:
    if isinstance(type, TensorType):
        return set().union(*(d.free_symbols for d in type.shape)) if type.shape else set()
    return set(type.expr.free_symbols) if isinstance(type, SymType) else set()


def _replace_symbol(graph: Graph, old: sympy.Expr, new: sympy.Expr) -> None:
    def sub(tree: Any) -> Any:
        if isinstance(tree, sympy.Basic):
            return tree.subs(old, new)
        if isinstance(tree, ListAttr):
            return ListAttr(tuple(sub(v) for v in tree.items))
        if isinstance(tree, tuple):
            return tuple(sub(v) for v in tree)
        return {k: sub(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    for value in _values(graph):
        if isinstance(value.type, TensorType):
            value.type = value.type.with_(shape=sub(value.type.shape))
        elif isinstance(value.type, SymType):
            value.type = SymType(value.type.kind, sub(value.type.expr))
    for op in graph.walk():
        op.attrs = sub(op.attrs)


def _program(key: str, graph: Graph, fields: dict[str, str], text: str) -> Program:
    backend, target, label, checks = (fields[name] for name in _FIELDS[1:])
    checks, _, known = checks.partition("+")
    return Program(key, graph, backend, target, label, checks, text, program_op(graph), known == _ROUTED)


def _body(fields: dict[str, str], text: str) -> str:
    head = "".join(f"{_HEADER}{name}: {fields[name]}\n" for name in _FIELDS)
    return head + text.rstrip("\n") + "\n"


def _key(body: str) -> str:
    return "m" + hashlib.sha256(body.encode()).hexdigest()[:KEY_DIGITS]


def register(
    graph: Graph,
    backend: str | Backend,
    target: str = "cpu",
    label: str = "",
    checks: str = "",
    routed: bool = False,
) -> Program:
    """Enter a program into the table and, where there is a cache directory, into its file.

    Args:
        graph: A graph of one op besides ``return``; it is copied and made canonical (:func:`program_graph`).
        backend: Name of the backend that claimed the op, or the backend.
        target: Target text.
        label: Name of the block, one line.
        checks: ``warn``, ``strict`` or ``off`` for this program, "" for the process's mode.
        routed: Ids need no check; see ``Program``.
    """
    from moec.ir.printer import print_graph  # the printer loads every op definition; only needed to compile

    name = backend if isinstance(backend, str) else backend.name
    canonical = program_graph(program_op(graph))
    text = print_graph(canonical).rstrip("\n") + "\n"
    label = " ".join(label.split())
    checks += f"+{_ROUTED}" if routed else ""
    fields = {"version": __version__, "backend": name, "target": target, "label": label, "checks": checks}
    body = _body(fields, text)
    key = _key(body)
    with _LOCK:
        if key not in _PROGRAMS:
            _PROGRAMS[key] = _program(key, canonical, fields, text)
        program = _PROGRAMS[key]
    _persist(key, body)
    return program


def program_file(key: str) -> Path | None:
    """Where the program of that key is kept, or None without a cache directory."""
    root = cache_dir()
    return None if root is None else root / "programs" / f"{key}.moe"


def _persist(key: str, body: str) -> None:
    path = program_file(key)
    if path is not None and not path.exists():
        store(f"programs/{key}.moe", body)


def lookup(key: str) -> Program:
    """The program called ``key``, from memory or from its file.

    Raises:
        ProgramError: Nobody knows it, or the file does not hold what the key says.
    """
    program = _PROGRAMS.get(key)
    return program if program is not None else _read(key)


def _read(key: str) -> Program:
    again = "compile the model again in this process (torch.compiler.reset() forgets what was compiled)"
    if not (key.startswith("m") and key[1:].isalnum()):
        raise ProgramError(f"{key!r} is no program key", hint=again)
    path = program_file(key)
    if path is None or not path.is_file():
        where = "there is no cache directory" if path is None else "the cache directory has no file of it"
        raise ProgramError(f"program {key} is unknown to this process and {where}", hint=again)
    body = path.read_bytes().decode(errors="replace")
    if _key(body) != key:
        message = f"the file of program {key} was changed: its content has another hash"
        raise ProgramError(message, hint="delete it; " + again)
    fields: dict[str, str] = {}
    lines = body.splitlines(keepends=True)
    for name, line in zip(_FIELDS, lines, strict=False):
        fields[name] = line.removeprefix(f"{_HEADER}{name}: ").rstrip("\n")
    if fields["version"] != __version__:
        raise ProgramError(f"program {key} was made by moec {fields['version']}, this is {__version__}", hint=again)
    from moec.ir.parser import parse_graph  # only a process that did not compile needs the parser

    text = "".join(lines[len(_FIELDS) :])
    graph = parse_graph(text)
    with _LOCK:
        return _PROGRAMS.setdefault(key, _program(key, graph, fields, text))


def _load_kernel(program: Program) -> Kernel:
    with _LOCK:
        kernel = _KERNELS.get(program.content)
        if kernel is None:
            backend = get_backend(program.backend)
            kernel = backend.load(backend.lower(program.graph, program.target))
            costs = op_costs(program.target)
            kernel.adviser = None if costs is None else costs.advise(program.op)
            _KERNELS[program.content] = kernel
        return kernel


def clear() -> None:
    """Forget all programs and kernels in memory. Their files stay."""
    with _LOCK:
        _PROGRAMS.clear()
        _KERNELS.clear()

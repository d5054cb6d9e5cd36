"""Find, in the source, which fields of the typed configs are read: by the type of the expression, not by name alone.

Types come from annotations only: parameters, attributes set from them in ``__init__``, dataclass fields, and paths
such as ``cfg.engine.precision``. A read that this misses shows up as a key that nothing reads; annotate it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

Field = tuple[str, str]
"""(name of the class that declares a field, name of the field)."""

Types = dict[str, type]
"""Schemas by the text of the expression that holds one: "cfg", "self._cfg"."""


def schemas_within(cls: type) -> set[type]:
    """Return a schema and the schemas of its fields, at any depth."""
    found = {cls}
    for hint in get_type_hints(cls).values():
        if isinstance(hint, type) and is_dataclass(hint):
            found |= schemas_within(hint)
    return found


def owner(cls: type, name: str) -> Field:
    """Return the class that declares a field, which may be a base of ``cls``."""
    for base in reversed(cls.__mro__):
        if name in inspect.get_annotations(base):
            return base.__name__, name
    raise AssertionError(f"{cls.__name__} has no field {name}")


def fields_of(cls: type) -> set[Field]:
    return {owner(cls, field.name) for field in fields(cls)}  # type: ignore[arg-type]


class Reads(ast.NodeVisitor):
    """Collect the fields that a module reads.

    Args:
        schemas: the known schemas by class name.
    """

    def __init__(self, schemas: Mapping[str, type]) -> None:
        self._schemas = schemas
        self._types: Types = {}
        self.found: set[Field] = set()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._types = self._types, dict(self._types)
        if node.name in self._schemas:
            self._types["self"] = self._schemas[node.name]
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign):
                self._declare(f"self.{ast.unparse(statement.target)}", statement.annotation)
        # __init__ first: it says which attributes hold a config.
        methods = sorted(node.body, key=lambda statement: getattr(statement, "name", "") != "__init__")
        for statement in methods:
            self.visit(statement)
        self._types = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "__post_init__":
            return  # a schema's check of its own values uses none of them
        outer, self._types = self._types, dict(self._types)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            if argument.annotation is not None:
                self._types.pop(argument.arg, None)  # hides a name of an outer function
                self._declare(argument.arg, argument.annotation)
        self.generic_visit(node)
        attributes = {name: cls for name, cls in self._types.items() if name.startswith("self.")}
        self._types = outer | attributes if node.name == "__init__" else outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                cls = self._type_of(value)
                if cls is not None:
                    self._types[ast.unparse(name)] = cls

    def visit_If(self, node: ast.If) -> None:
        outer, self._types = self._types, dict(self._types)
        # Within ``if isinstance(cfg, PlanConfig):`` cfg is a PlanConfig.
        if isinstance(node.test, ast.Call) and ast.unparse(node.test.func) == "isinstance":
            self._declare(ast.unparse(node.test.args[0]), node.test.args[1])
        self.visit(node.test)
        for statement in node.body:
            self.visit(statement)
        self._types = outer
        for statement in node.orelse:
            self.visit(statement)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        cls = self._type_of(node.value)
        if cls is not None and isinstance(node.ctx, ast.Load) and node.attr in get_type_hints(cls):
            self.found.add(owner(cls, node.attr))

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        # dataclasses.fields(x) stands before a getattr of each field.
        if ast.unparse(node.func) == "fields":
            cls = self._type_of(node.args[0])
            if cls is not None:
                self.found |= fields_of(cls)

    def _declare(self, name: str, annotation: ast.expr) -> None:
        cls = self._schemas.get(ast.unparse(annotation).removesuffix(" | None"))
        if cls is not None:
            self._types[name] = cls

    def _type_of(self, node: ast.expr) -> type | None:
        """Return the schema that an expression is an instance of, or None."""
        known = self._types.get(ast.unparse(node))
        if known is not None or not isinstance(node, ast.Attribute):
            return known
        outer = self._type_of(node.value)
        if outer is None:
            return None
        hint: Any = get_type_hints(outer).get(node.attr)
        computed = getattr(outer, node.attr, None)
        if isinstance(computed, property):
            hint = get_type_hints(computed.fget).get("return")
        for option in (hint, *get_args(hint)):
            if isinstance(option, type) and option.__name__ in self._schemas:
                return option
        return None


def fields_read(modules: Iterable[ast.Module], schemas: Iterable[type]) -> Iterator[Field]:
    """Yield the fields of these schemas that the modules read."""
    by_name = {cls.__name__: cls for cls in schemas}
    for module in modules:
        reads = Reads(by_name)
        reads.visit(module)
        yield from reads.found

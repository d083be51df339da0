"""Source of several modules without what a program that starts at some of them cannot reach.

Four passes over the syntax trees. Annotations go, except those that a program reads (`typing.get_type_hints`). Checks
of arguments go where the caller is known to pass the right ones: an `if` that only raises ValueError or TypeError, and
calls of functions named `check...` that have nothing left to raise, to return or to call.
Conditions known to be false are folded, and the branches behind them dropped. Then definitions are kept that something
kept refers to, beginning at the roots and at the statements that act when a module is imported. What a name, attribute
or string may refer to counts as referred to, so that a definition goes only where nothing could find it.

An assignment acts only by its name here: `OP = register(...)` goes where nobody reads OP.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

_Condition = Callable[[ast.expr], bool]


def prune(
    sources: Mapping[str, str],
    roots: Collection[str],
    *,
    false: _Condition = lambda _: False,
    by_name: str = "",
    unchecked: Collection[str] = (),
) -> dict[str, str]:
    """Module -> source, of the modules of `sources` that the modules `roots` reach.

    Roots stay whole, and packages stay. false: which expressions are known to be false. by_name: ending of modules that
    others import by a string with the rest of the name, as in kernels("x") for package._x_triton. unchecked: modules
    whose checks of arguments go. Raises ValueError for a name there that `sources` does not have.
    """
    if unknown := set(unchecked) - set(sources):
        raise ValueError(f"unchecked: got {sorted(unknown)}, wanted names of `sources`")
    trees = {name: ast.parse(source) for name, source in sources.items()}
    _drop_checks({name: trees[name] for name in unchecked})
    for tree in trees.values():
        if not _reads_annotations(tree):
            _Plain().visit(tree)
        _fold(tree, false)
    reach = _Reach(trees, by_name)
    for root in roots:
        reach.whole(root)
    reach.run()
    return {name: reach.source(name) for name in trees if name in reach.imported}


# ---- annotations -----------------------------------------------------------------------------------------------------


def _reads_annotations(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr == "get_type_hints" for node in ast.walk(tree))


class _Plain(ast.NodeTransformer):
    """Drops annotations; a field's becomes 0, which a dataclass takes as well as any other."""

    in_class = False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        before, self.in_class = self.in_class, True
        self.generic_visit(node)
        self.in_class = before
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before, self.in_class = self.in_class, False
        if not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):  # a kernel's are instructions
            node.returns = None
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                argument.annotation = None
            for rest in (arguments.vararg, arguments.kwarg):
                if rest is not None:
                    rest.annotation = None
            self.generic_visit(node)
        self.in_class = before
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if self.in_class:
            node.annotation = ast.copy_location(ast.Constant(0), node.annotation)
            return node
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign([node.target], node.value), node)


# ---- checks ----------------------------------------------------------------------------------------------------------


def _drop_checks(trees: Mapping[str, ast.Module]) -> None:
    """Drops checks, then calls of functions that had no more to do, until no more of these are found."""
    found: set[str] | None = None
    while True:
        idle: set[str] = set()
        busy: set[str] = set()
        for tree in trees.values():
            _Unchecked(found or ()).visit(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and node.name.lstrip("_").startswith("check"):
                    (busy if _acts(node) else idle).add(node.name)
                elif isinstance(node, ast.ImportFrom) and node.module not in trees:
                    busy |= {alias.asname or alias.name for alias in node.names}
        if idle - busy == found:
            return
        found = idle - busy


def _acts(node: ast.FunctionDef) -> bool:
    return any(
        isinstance(inner, ast.Raise | ast.Assert)
        or (isinstance(inner, ast.Return) and inner.value is not None)
        or (isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Call))
        for inner in ast.walk(node)
    )


class _Unchecked(ast.NodeTransformer):
    """Drops checks of arguments and calls of the functions `idle`."""

    def __init__(self, idle: Collection[str]) -> None:
        self._idle = idle

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        match node.value:
            case ast.Call(func=ast.Name(name)) if name in self._idle:
                return ast.copy_location(ast.Pass(), node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        self.generic_visit(node)
        match node:
            case ast.If(body=[ast.Raise(exc=ast.Call(func=ast.Name("ValueError" | "TypeError")))], orelse=[]):
                binds = any(isinstance(part, ast.NamedExpr) for part in ast.walk(node.test))
                return node if binds else ast.copy_location(ast.Pass(), node)
        return node


# ---- conditions ------------------------------------------------------------------------------------------------------


def _fold(tree: ast.Module, false: _Condition) -> None:
    """Folds until no more functions of the module are found to be `return False`."""
    found: set[str] = set()

    def known(node: ast.expr) -> bool:
        call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found
        return call or false(node)

    while True:
        _Fold(known).visit(tree)
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _returns_false(node)}
        if names <= found:
            return
        found |= names


def _returns_false(node: ast.FunctionDef) -> bool:
    body = [statement for statement in node.body if not _is_text(statement)]
    return len(body) == 1 and isinstance(body[0], ast.Return) and _constant(body[0].value) is False


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _constant(node: ast.expr | None) -> bool | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, bool) else None


class _Fold(ast.NodeTransformer):
    def __init__(self, false: _Condition) -> None:
        self._false = false

    def visit(self, node: ast.AST) -> ast.AST | None:
        if isinstance(node, ast.expr) and self._false(node):
            return ast.copy_location(ast.Constant(False), node)
        result: ast.AST | None = super().visit(node)
        if isinstance(node, ast.FunctionDef | ast.If | ast.For | ast.While | ast.With):
            for name in ("body", "orelse"):
                if hasattr(node, name):
                    setattr(node, name, _reached(getattr(node, name)))
        return result

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """Where an operand decides, the others are dropped unread: conditions have no effects."""
        self.generic_visit(node)
        decides = isinstance(node.op, ast.Or)
        if any(_constant(value) is decides for value in node.values):
            return ast.copy_location(ast.Constant(decides), node)
        *first, last = node.values  # whose value may be the result
        node.values = [*(value for value in first if _constant(value) is None), last]
        return last if len(node.values) == 1 else node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        value = _constant(node.operand)
        if isinstance(node.op, ast.Not) and value is not None:
            return ast.copy_location(ast.Constant(not value), node)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        value = _constant(node.test)
        return node if value is None else node.body if value else node.orelse

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        value = _constant(node.test)
        return node if value is None else (node.body if value else node.orelse) or ast.copy_location(ast.Pass(), node)


def _reached(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements up to the first that leaves the block, none of them idle."""
    body = [statement for statement in body if not isinstance(statement, ast.Pass)] or body[:1]
    for i, statement in enumerate(body):
        if isinstance(statement, ast.Return | ast.Raise):
            return body[: i + 1]
    return body


# ---- reach -----------------------------------------------------------------------------------------------------------


class _Reach:
    """Marks nodes: statements of modules, single names of imports, methods of classes."""

    def __init__(self, trees: Mapping[str, ast.Module], by_name: str) -> None:
        self._trees = trees
        self._by_name = by_name
        self.imported: set[str] = set()
        self._kept: set[ast.AST] = set()
        self._names: set[str] = set()  # attributes and strings met so far
        self._queue: list[tuple[str, ast.AST]] = []
        self._bound: dict[tuple[str, str], list[ast.AST]] = defaultdict(list)  # (module, name) -> nodes that bind it
        self._waiting: dict[str, list[tuple[str, ast.AST]]] = defaultdict(list)  # name -> nodes it reaches once met
        for name, tree in trees.items():
            for statement in tree.body:
                for bound, node in _bindings(statement):
                    self._bound[name, bound].append(node)

    def whole(self, module: str) -> None:
        self._import(module)
        for statement in self._trees[module].body:
            self._keep(module, statement)
            for _, node in _bindings(statement):
                self._keep(module, node)

    def run(self) -> None:
        while self._queue:
            module, node = self._queue.pop()
            if isinstance(node, ast.ClassDef) and not node.bases:
                for part in (*node.decorator_list, *node.keywords, *node.body):
                    if isinstance(part, ast.FunctionDef) and not part.name.startswith("__"):
                        self._when_met(part.name, module, part)
                    else:
                        self._keep(module, part)
            else:
                self._refer(module, node)

    def source(self, module: str) -> str:
        tree = self._trees[module]
        body = [left for statement in tree.body for left in self._left(statement)]
        return ast.unparse(ast.Module(body, []))

    def _left(self, statement: ast.stmt) -> Iterator[ast.stmt]:
        if isinstance(statement, ast.Import | ast.ImportFrom) and statement not in self._kept:
            statement.names = [alias for alias in statement.names if alias in self._kept]
            if statement.names:
                yield statement
        elif statement in self._kept:
            if isinstance(statement, ast.ClassDef) and not statement.bases:
                statement.body = [part for part in statement.body if part in self._kept] or [ast.Pass()]
            yield statement

    def _keep(self, module: str, node: ast.AST) -> None:
        if node not in self._kept:
            self._kept.add(node)
            self._queue.append((module, node))

    def _need(self, module: str, name: str) -> None:
        for node in self._bound.get((module, name), ()):
            self._keep(module, node)

    def _when_met(self, name: str, module: str, node: ast.AST) -> None:
        if name in self._names:
            self._keep(module, node)
        else:
            self._waiting[name].append((module, node))

    def _import(self, module: str) -> None:
        """A module with its packages runs: what acts in it, acts."""
        if module not in self._trees or module in self.imported:
            return
        self.imported.add(module)
        if "." in module:
            self._import(module.rpartition(".")[0])
        for statement in self._trees[module].body:
            if not _is_text(statement) and not any(True for _ in _bindings(statement)):
                self._keep(module, statement)

    def _import_object(self, module: str) -> None:
        """The module is at hand as an object: any attribute may be one of its names."""
        if module in self._trees:
            self._import(module)
            for owner, name in list(self._bound):
                if owner == module:
                    for node in self._bound[owner, name]:
                        self._when_met(name, module, node)

    def _refer(self, module: str, node: ast.AST) -> None:
        for inner in _walk(node):
            if isinstance(inner, ast.Name):
                self._need(module, inner.id)
                self._meet(inner.id)  # in a class, a method's
            elif isinstance(inner, ast.Attribute):
                self._meet(inner.attr)
            elif isinstance(inner, ast.Constant) and isinstance(inner.value, str):
                self._meet(inner.value)
            elif isinstance(inner, ast.Import):
                for alias in inner.names:
                    self._import_object(alias.name)
            elif isinstance(inner, ast.ImportFrom):
                for alias in inner.names:
                    self._import_from(inner.module or "", alias.name)
            elif isinstance(inner, ast.alias):
                self._import_alias(module, inner)

    def _import_alias(self, module: str, alias: ast.alias) -> None:
        """A name of an import at the head of a module."""
        for statement in self._trees[module].body:
            if isinstance(statement, ast.Import | ast.ImportFrom) and alias in statement.names:
                if isinstance(statement, ast.Import):
                    self._import_object(alias.name)
                else:
                    self._import_from(statement.module or "", alias.name)

    def _import_from(self, module: str, name: str) -> None:
        self._import(module)
        if (module, name) in self._bound:
            self._need(module, name)
        else:
            self._import_object(f"{module}.{name}")

    def _meet(self, name: str) -> None:
        if name in self._names:
            return
        self._names.add(name)
        for module, node in self._waiting.pop(name, ()):
            self._keep(module, node)
        if self._by_name:
            for module in self._trees:
                if module.endswith(f"._{name}{self._by_name}"):
                    self._import_object(module)


def _bindings(statement: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of each name that a statement of a module only binds; none of one that acts."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        if not (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
            for alias in statement.names:
                yield alias.asname or alias.name.partition(".")[0], alias
    elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name, statement
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        targets = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if len(names) == len(targets):
            for name in names:
                yield name, statement


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of what a statement says, without strings that stand alone."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.stmt) and _is_text(child)):
            yield from _walk(child)

"""What is left of a program's modules."""

import ast
import textwrap

import pytest

from model.prune import prune


def pruned(root, others=None, **options):
    sources = {"root": root} | (others or {})
    return prune({name: textwrap.dedent(source) for name, source in sources.items()}, ["root"], **options)


def defined(source):
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


LIBRARY = {
    "library": """
        import os
        from typing import Any
        from library_b import far, unused

        LIMIT, OTHER = 3, 4
        TABLE = {"key": LIMIT}
        print("acts")

        def used(x: Any) -> int:
            return far(x)

        def alone():
            return os.sep, unused()

        class Kept:
            field: Any = 1

            def __len__(self):
                return self._helper()

            def _helper(self):
                return LIMIT

            def idle(self):
                return TABLE

            def by_string(self):
                return 0

        class Derived(Base):
            def hook(self):
                return 0
        """,
    "library_b": "def far(x): return x\ndef unused(): return used_nowhere",
    "library_c": "print('never imported')",
}


def test_what_nothing_refers_to_goes() -> None:
    out = pruned("from library import used", LIBRARY)
    assert set(out) == {"root", "library", "library_b"}
    assert defined(out["library"]) == {"used", "far"} and defined(out["library_b"]) == {"far"}
    assert "print" in out["library"] and "Any" not in out["library"]


def test_methods_stay_by_attribute_string_or_base() -> None:
    out = pruned("from library import Kept\ngetattr(Kept(), 'by_string')", LIBRARY)
    assert {"Kept", "__len__", "_helper", "by_string", "LIMIT"} <= defined(out["library"]) | {"LIMIT"}
    assert not {"idle", "TABLE", "Derived", "far"} & defined(out["library"])
    assert "field: 0 = 1" in out["library"] and "LIMIT, OTHER" in out["library"]
    out = pruned("class Base: pass\nfrom library import Derived", LIBRARY)
    assert "hook" in defined(out["library"])


def test_modules_as_objects_and_modules_by_name() -> None:
    others = {
        "package": "",
        "package.tools": "def one(): return 1\ndef two(): return 2",
        "package._x_kernels": "def launch(): return _own()\ndef _own(): return 1\ndef rest(): return 2",
        "package._y_kernels": "def launch(): return 1",
    }
    out = pruned("from package import tools\ntools.one()\nload('x').launch()", others, by_name="_kernels")
    assert set(out) == {"root", "package", "package.tools", "package._x_kernels"}
    assert defined(out["package.tools"]) == {"one"} and defined(out["package._x_kernels"]) == {"launch", "_own"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if compiled(x): a()\nelse: b()", "b()"),
        ("if not compiled(x):\n    return b()\na()", "return b()"),
        ("if y or not compiled(x):\n    return b()\na()", "return b()"),
        ("if y and compiled(x): a()\nelif z: b()", "if z:\n    b()"),
        ("if compiled(x) or y: a()", "if y:\n    a()"),
        ("if not compiled(x) and y: a()", "if y:\n    a()"),
        ("if wraps(x): a()\nb()", "b()"),
        ("if compiled(x): a()", "pass"),
        ("return a() if compiled(x) else b()", "return b()"),
        ("return y or compiled(x)", "return y or False"),
        ("for y in x:\n    if compiled(x):\n        continue\n    a()", "for y in x:\n    a()"),
    ],
)
def test_conditions(before: str, after: str) -> None:
    head = "def wraps(x):\n    return x.fits and compiled(x)\n"

    def false(node: ast.expr) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) == "compiled"

    source = pruned(f"{head}def f(x, y, z):\n{textwrap.indent(before, '    ')}", false=false)["root"]
    body = ast.parse(source).body[1].body
    assert "\n".join(map(ast.unparse, body)) == after


def test_annotations_stay_where_they_are_read() -> None:
    reads = "import typing\nclass C:\n    x: int = 1\ntyping.get_type_hints(C)"
    assert "x: int" in pruned(reads)["root"]
    kernel = "@triton.jit\ndef k(x, N: tl.constexpr):\n    M: tl.constexpr = N\n"
    out = pruned(kernel + "def f(x: int, *y: int, **z: int) -> int: pass")["root"]
    assert "k(x, N: tl.constexpr)" in out and "M: tl.constexpr" in out and "f(x, *y, **z):" in out


def test_checks_of_arguments_go_where_asked():
    source = """
        def call(x, y):
            if x < 0:
                raise ValueError(f"x: got {x}, wanted at least 0")
            if not y:
                raise RuntimeError("y: got none")
            if x > 9:
                raise TypeError("x: got too many digits")
            else:
                y += 1
            if (n := x + y) > 99:
                raise TypeError(f"x, y: got {n} in all")
            return n

        print(call(1, 2))
    """
    assert "ValueError" in pruned(source)["root"]
    left = pruned(source, unchecked=["root"])["root"]
    assert "ValueError" not in left and "RuntimeError" in left and "too many" in left and "in all" in left
    with pytest.raises(ValueError, match="'elsewhere'"):
        pruned(source, unchecked=["elsewhere"])


def test_checks_that_have_nothing_left_to_do_are_not_called():
    modules = {
        "a": """
            from b import check_size, check_dtype
            from c import check_magic

            def run(x):
                check_size(x)
                check_magic(x)
                _check_all(x)
                _check_state(x)
                check_elsewhere(x)
                record(x)
                return check_dtype(x)

            def _check_all(x):
                for name in "x":
                    check_size(x)

            def check_elsewhere(x):
                check_magic(x)

            def _check_state(x):
                if x > 1:
                    raise RuntimeError("x: used already")

            def record(x):
                if x > 1:
                    raise ValueError("x: too large")
        """,
        "b": """
            def check_size(x):
                if x > 3:
                    raise ValueError(f"x: got {x}, wanted 3")

            def check_dtype(x):
                if x > 3:
                    raise TypeError(f"x: got {x}")
                return x
        """,
        "c": """
            def check_magic(x):
                if x > 3:
                    raise ValueError(f"x: got {x}, wanted at most 3")
        """,
    }
    left = pruned("from a import run\nrun(1)", modules, unchecked=["a", "b"])
    run = left["a"].partition("def run")[2].partition("def ")[0]
    assert "check_size" not in left["a"] + left["b"] and "_check_all" not in left["a"]
    assert all(call in run for call in ("check_magic(x)", "_check_state(x)", "check_elsewhere(x)", "record(x)"))
    assert "return check_dtype(x)" in run and "wanted at most 3" in left["c"]

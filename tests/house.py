"""Lines a module, and circles of imports; and the page of every public name.

python tests/house.py
python tests/house.py --api > docs/api.md
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
LONGEST = 210  # lines of a class, about


def modules() -> dict[str, Path]:
    """The modules of the package, by name."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports() -> dict[str, set[str]]:
    """The modules of the package that each one imports, in functions too; not what only type checkers read."""
    known = modules()
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, file in known.items():
        tree = ast.parse(file.read_text())
        skipped = {node for branch in ast.walk(tree) if _for_types(branch) for node in ast.walk(branch)}
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(tree):
            if node in skipped:
                continue
            wanted: list[str] = []
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.rsplit(".", node.level - 1)[0] if node.level else ""
                base = ".".join(part for part in (above, node.module) if part)
                wanted = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            graph[name] |= {w for w in wanted if w in known and w != name}
    # a module is not said to import the package that it lies in
    return {name: {w for w in wanted if not name.startswith(f"{w}.")} for name, wanted in graph.items()}


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle of imports, or none."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := follow(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := follow(name, []))), [])


def longest() -> tuple[int, str]:
    """The class of the most lines."""
    classes = []
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                classes.append((node.end_lineno - node.lineno + 1, f"{name}.{node.name}"))
    return max(classes)


def api() -> str:
    """docs/api.md: every public name with the first sentence of its docstring."""
    import diffem

    def sentence(thing: object) -> str:
        text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
        return text.replace("|", "\\|").replace(":class:", "").replace(":meth:", "").replace(":func:", "")

    lines = ["# The public names", "", "Made by `python tests/house.py --api`. `help(diffem.NAME)` says more.", ""]
    lines += ["| name | what it is |", "|---|---|"]
    for name in diffem.__all__:
        thing = getattr(diffem, name)
        lines.append(f"| `{name}` | {sentence(thing)} |")
        if inspect.isclass(thing) and name in ("DiffEM", "Observations", "Posterior", "Corruption"):
            for method, function in vars(thing).items():
                function = getattr(function, "__func__", function)
                if not method.startswith("_") and (inspect.isfunction(function) or isinstance(function, property)):
                    lines.append(f"| `{name}.{method}` | {sentence(function)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if "--api" in sys.argv:
        print(api(), end="")
        return
    sizes = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    for name, lines in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{lines:6d}  {name}")
    print(f"{sum(sizes.values()):6d}  in all")
    print("longest class: {1}, {0} lines".format(*longest()))
    found = circle(imports())
    print("circle of imports: " + " -> ".join(found) if found else "no circle of imports")


if __name__ == "__main__":
    main()

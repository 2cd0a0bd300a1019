"""Small enough to hold in one's head: lines, width, density, comprehensions and imports."""
import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = {"prism.py": 371, "train.py": 375, "attribute.py": 400, "suppress.py": 540,
          "sample.py": 150, "report.py": 300, "common.py": 291, "data/prepare.py": 350,
          "experiments": 3905, "course": 2143, "README.md": 150}
PRODUCT = sorted([*ROOT.glob("*.py"), ROOT / "data/prepare.py"])
EXPERIMENTS = sorted([*ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/*/*.py")])
COURSE = sorted([*ROOT.glob("course/*.py"), *ROOT.glob("course/*/*.py")])
PACK = COURSE + [p for p in ROOT.glob("course/**/*") if p.suffix in (".txt", ".mk", ".sh", "")]
OURS = {p.stem for p in PRODUCT + EXPERIMENTS} | {"experiments"}
MAY_IMPORT = {"prism.py": set(), "common.py": {"prism"},
              "report.py": {"prism", "common", "attribute", "sample"}}
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}
SCOPES = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def density(source):
    """Tokens per line of code, without comments and docstrings; an f-string is one token."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, SCOPES) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    count, depth, lines = 0, 0, set()
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type in SILENT or t.start[0] in docstrings:
            continue
        name = tokenize.tok_name[t.type]                          # FSTRING_* from Python 3.12 on
        depth -= name == "FSTRING_END"
        count += depth == 0 and name != "FSTRING_END"
        depth += name == "FSTRING_START"
        lines |= set(range(t.start[0], t.end[0] + 1))
    return count / max(1, len(lines))


def comprehensions(node, level=0):
    """(node, nesting level) of each comprehension."""
    if isinstance(node, COMPREHENSIONS):
        level += 1
        yield node, level
    for child in ast.iter_child_nodes(node):
        yield from comprehensions(child, level)


def imports(nodes):
    """The first word of each module that is imported."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def faults_of(path):
    name, source = str(path.relative_to(ROOT)), path.read_text("utf-8")
    tree = ast.parse(source)
    for n, line in enumerate(source.splitlines(), 1):
        if len(line) > 100:
            yield f"{name}:{n} has {len(line)} characters, at most 100"
    if density(source) > 12.0:
        yield f"{name} has {density(source):.2f} tokens per code line, at most 12"
    for node, level in comprehensions(tree):
        lines = node.end_lineno - node.lineno + 1
        if level > 2 or lines > 3:
            yield f"{name}:{node.lineno} a comprehension of {level} levels on {lines} lines"
    if path in PRODUCT:
        own = set(imports(ast.walk(tree))) & OURS - MAY_IMPORT.get(name, {"prism", "common"})
        if own:
            yield f"{name} imports {', '.join(sorted(own))}"
    if name == "prism.py":                                        # optional ones stand in functions
        foreign = set(imports(tree.body)) - sys.stdlib_module_names - {"torch"}
        if foreign:
            yield f"{name} imports {', '.join(sorted(foreign))}"


def test_the_house_rules():
    faults = []
    for name, most in BUDGET.items():
        files = {"experiments": EXPERIMENTS, "course": PACK}.get(name, [ROOT / name])
        lines = sum(len(p.read_text("utf-8").splitlines()) for p in files if p.is_file())
        if lines > most:
            faults.append(f"{name} has {lines} lines, at most {most}")
    for n, line in enumerate((ROOT / "README.md").read_text("utf-8").splitlines(), 1):
        if len(line) > 100:
            faults.append(f"README.md:{n} has {len(line)} characters, at most 100")
    for path in PRODUCT + EXPERIMENTS + COURSE:
        faults += faults_of(path)
    assert not faults, "\n" + "\n".join(faults)


def test_the_measures_see_what_they_should():
    source = '"""Doc."""\nx = f"{a!r} {f\'{b}\'}" + 1  # note\n\ny = (1,\n     2)\n'
    assert density(source) == 12 / 3
    tree = ast.parse("[[c for c in b] for b in a if any({d for d in e} for e in b)]")
    assert sorted(level for _, level in comprehensions(tree)) == [1, 2, 2, 3]
    tree = ast.parse("import a.b, c\nfrom d.e import f\ndef g():\n    from h import i")
    assert list(imports(ast.walk(tree))) == ["a", "c", "d", "h"]

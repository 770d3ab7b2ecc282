import ast, io, re, sys, tokenize
from pathlib import Path

for d in sys.argv[1:]:
    for p in sorted(Path(d).rglob("*.py")):
        src = p.read_text()
        tree = ast.parse(src)
        for n in ast.walk(tree):
            if isinstance(n, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                t = ast.get_docstring(n)
                if not t:
                    continue
                name = getattr(n, "name", "module")
                line = getattr(n, "lineno", 1)
                first = t.split("\n")[0]
                if len(first.split()) > 25 or not first.endswith("."):
                    print(p, line, name, "first line", len(first.split()), first)
                for s in re.split(r"(?<=[.;:])\s+", t.replace("\n", " ")):
                    if len(s.split()) > 26:
                        print(p, line, name, "long:", len(s.split()), s)
                if "Args:" in t and not isinstance(n, (ast.Module, ast.ClassDef)):
                    body = t.split("Args:")[1]
                    a = n.args
                    names = [x.arg for x in a.posonlyargs + a.args + a.kwonlyargs if x.arg not in ("self", "cls")]
                    for x in names:
                        if not re.search(rf"^ +{x}:", body, re.M):
                            print(p, line, name, "Args lacks", x)
                elif not isinstance(n, (ast.Module, ast.ClassDef)) and len(n.args.args) > 3:
                    print(p, line, name, "no Args; has", len(n.args.args))
        for tok in tokenize.generate_tokens(io.StringIO(src).readline):
            if tok.type == tokenize.COMMENT and not tok.string.startswith(("# fmt", "# type", "# noqa")):
                c = tok.string
                if not (c[2:3].isupper()):
                    print(p, tok.start[0], "comment:", c)

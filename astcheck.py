import ast, subprocess, sys

BASE = "658a93a"


class N(ast.NodeTransformer):
    def strip(self, node):
        self.generic_visit(node)
        if (
            node.body
            and isinstance(node.body[0], ast.Expr)
            and isinstance(node.body[0].value, ast.Constant)
            and isinstance(node.body[0].value.value, str)
        ):
            node.body = node.body[1:]
        return node

    visit_Module = visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = strip

    def visit_Constant(self, node):
        if isinstance(node.value, str) and " " in node.value:
            node.value = "S"
        return node


def norm(s):
    return ast.dump(N().visit(ast.parse(s)))


files = subprocess.run(["git", "diff", "--name-only", BASE], capture_output=True, text=True).stdout.split()
bad = 0
for f in files:
    if not f.endswith(".py"):
        print("non-py", f)
        continue
    old = subprocess.run(["git", "show", f"{BASE}:{f}"], capture_output=True, text=True).stdout
    a, b = norm(old), norm(open(f).read())
    if a != b:
        bad = 1
        i = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), 0)
        print("DIFF", f, "\n ", a[max(0, i - 150) : i + 100], "\n ", b[max(0, i - 150) : i + 100])
print("files", len(files), "bad" if bad else "equal")

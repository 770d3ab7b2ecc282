"""Apply replace pairs: file given as argv[1], pairs from stdin separated by lines '<<<<', '====', '>>>>'."""

import sys, re

p = sys.argv[1]
s = open(p).read()
ok = True
for old, new in re.findall(r"^<<<<\n(.*?)\n====\n(.*?)\n?^>>>>$", sys.stdin.read(), re.S | re.M):
    if s.count(old) != 1:
        print("COUNT", s.count(old), repr(old))
        ok = False
        continue
    s = s.replace(old, new)
open(p, "w").write(s)
print(p, "ok" if ok else "FAILED")

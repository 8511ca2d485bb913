"""An SGLang program over one long prompt whose first call is sparse and whose second is dense.

fasa serve MODEL &
python examples/program.py --base-url http://127.0.0.1:30000 README.md
"""

import argparse
from pathlib import Path

import sglang as sgl

import fasa_sglang  # noqa: F401 - teaches sgl.gen the fasa= parameter


@sgl.function
def read_twice(s, text: str):
    s += text
    s += "\n\nA title for the text above: "
    s += sgl.gen("title", max_tokens=16, stop="\n", temperature=0, fasa={"budget": 1024})
    s += "\nIts first word: "
    s += sgl.gen("word", max_tokens=4, stop="\n", temperature=0, fasa=False)


parser = argparse.ArgumentParser()
parser.add_argument("--base-url", default="http://127.0.0.1:30000")
parser.add_argument("file", type=Path)
args = parser.parse_args()
sgl.set_default_backend(sgl.RuntimeEndpoint(args.base_url))
state = read_twice.run(text=args.file.read_text())
for name in ("title", "word"):
    print(name, repr(state[name]), state.get_meta_info(name)["fasa"])

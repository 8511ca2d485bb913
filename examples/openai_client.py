"""Stream an answer through the OpenAI client with FASA, then print what FASA saved.

fasa serve MODEL &
python examples/openai_client.py --base-url http://127.0.0.1:30000 README.md "What is this?"
"""

import argparse
from pathlib import Path

from openai import OpenAI

parser = argparse.ArgumentParser()
parser.add_argument("--base-url", default="http://127.0.0.1:30000")
parser.add_argument("file", type=Path)
parser.add_argument("question")
args = parser.parse_args()
client = OpenAI(base_url=f"{args.base_url}/v1", api_key="none")
stream = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": f"{args.file.read_text()}\n\n{args.question}"}],
    max_tokens=64,
    temperature=0,
    stream=True,
    # The last chunk carries the usage, and with it FASA's report.
    stream_options={"include_usage": True},
    extra_body={"fasa": {"budget": 1024, "prefix": "select"}},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print("\n", chunk.usage.prompt_tokens, "prompt tokens", chunk.metadata["fasa"])

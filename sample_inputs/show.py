"""Print the answers of an output file: python sample_inputs/show.py demo.out.jsonl."""

import json
import sys
import textwrap
from pathlib import Path

for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    if "error" in row:
        print(f"\n{row['id']}: {row['error']['code']}: {row['error']['message']}")
        continue
    usage, kv = row["usage"], row["kv"]
    print(f"\n{row['id']}: {usage['prompt_tokens']:,} prompt tokens, {kv['kept']:,} KV pairs kept per layer and head")
    print(textwrap.fill(" ".join(row["text"].split()), 100, initial_indent="  ", subsequent_indent="  "))

"""Print answers as they arrive: bmx run prompts.jsonl -o - | python sample_inputs/show.py, or show.py FILE."""

import fileinput
import json
import textwrap

with fileinput.input(encoding="utf-8") as lines:
    for line in lines:
        row = json.loads(line)
        if "error" in row:
            print(f"\n{row['id']}: {row['error']['code']}: {row['error']['message']}", flush=True)
            continue
        usage, kept = row["usage"], row["kv"]["kept"]
        print(f"\n{row['id']}: {usage['prompt_tokens']:,} prompt tokens, {kept:,} KV pairs kept per layer and head")
        print(
            textwrap.fill(" ".join(row["text"].split()), 100, initial_indent="  ", subsequent_indent="  "), flush=True
        )

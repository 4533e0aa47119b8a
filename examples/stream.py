"""Print text as it is decoded, of several prompts at once, up to a stop string.

python examples/stream.py [FOLDER]      an artifact, such as convert_and_generate.py writes
"""

import sys

import retrofit

folder = sys.argv[1] if len(sys.argv) > 1 else "tiny-retrofit"
prompts = ["import os\n", "class Stack:\n"]

with retrofit.Engine.load(folder, offline=True) as engine:
    for event in engine.stream(prompts, temperature=0.8, max_new_tokens=24, stop="\n\n\n"):
        if event.text:
            print(f"{event.index}: {event.text!r}", flush=True)
        if event.result is not None:
            print(f"{event.index}: ends by {event.result.finish_reason}", file=sys.stderr)

"""Several samples of one prompt, reproducible one by one: a text depends on its seed, not on what runs beside it.

python examples/batch_of_seeds.py [FOLDER]      an artifact, such as convert_and_generate.py writes
"""

import sys

import retrofit

folder = sys.argv[1] if len(sys.argv) > 1 else "tiny-retrofit"
seeds = [3, 14, 15, 92]
options = {"temperature": 1.0, "top_p": 0.95, "max_new_tokens": 16}

with retrofit.Engine.load(folder, offline=True) as engine:
    together = engine.generate(["import os\n"] * len(seeds), seed=seeds, **options)
    [alone] = engine.generate(["import os\n"], seed=seeds[2], **options)

for seed, result in zip(seeds, together, strict=True):
    print(f"{seed}: {result.text!r}")
assert alone.tokens == together[2].tokens

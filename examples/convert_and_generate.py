"""Convert the model that ships inside, then continue a prompt with the artifact.  Minutes on a CPU, offline.

    python examples/convert_and_generate.py [FOLDER] [KEY=VALUE]...

KEY=VALUE sets a key of the recipe: train.steps=20 takes seconds, and drafts badly.
"""

import sys

import retrofit

keys = [argument for argument in sys.argv[1:] if "=" in argument]
folder = next((argument for argument in sys.argv[1:] if "=" not in argument), "tiny-retrofit")

retrofit.convert(out=folder, overrides=keys, overwrite=True, offline=True)

with retrofit.Engine.load(folder, offline=True) as engine:
    [result] = engine.generate(["def area(radius):"], temperature=0.8, seed=7, max_new_tokens=32)
print(result.text)
print(f"{len(result.tokens)} tokens, {result.stats.tpf:.2f} per forward", file=sys.stderr)

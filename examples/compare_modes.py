"""The same prompts in every mode and strategy: equal texts, but for diffusion, which may differ; in fewer forwards.

python examples/compare_modes.py [FOLDER]      an artifact, such as convert_and_generate.py writes
"""

import sys

import retrofit

WAYS = {
    "ar": {"mode": "ar"},
    "two_forward": {"strategy": "two_forward"},
    "fused": {"strategy": "fused"},
    "prompt_lookup": {"strategy": "prompt_lookup"},
    "hybrid": {"strategy": "hybrid"},
    "auto": {"strategy": "auto"},
    "diffusion": {"mode": "diffusion"},
}
folder = sys.argv[1] if len(sys.argv) > 1 else "tiny-retrofit"
prompts = ["def area(radius):", "class Stack:"]
texts = {}

with retrofit.Engine.load(folder, offline=True) as engine:
    for name, way in WAYS.items():
        results = engine.generate(prompts, **way, temperature=0.8, seed=[1, 2], max_new_tokens=24)
        texts[name] = [result.text for result in results]
        forwards = sum(result.stats.decode_forwards for result in results)
        tokens = sum(result.stats.tokens for result in results)
        same = "equal to ar" if texts[name] == texts["ar"] else "its own text"
        print(f"{name:<14} {tokens / forwards:.2f} tokens per forward, {same}")

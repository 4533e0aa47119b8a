"""Give a model that is already loaded the faster way of decoding, and take it off again.

python examples/live_model.py [FOLDER]      an artifact, such as convert_and_generate.py writes
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import retrofit
from retrofit.named_bases import embedded_folder

folder = sys.argv[1] if len(sys.argv) > 1 else "tiny-retrofit"
base = embedded_folder()  # the model that ships inside; with a model of your own, its folder or Hub id
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # in 16 bits two programs round differently
tokenizer = AutoTokenizer.from_pretrained(base)
prompt = tokenizer("def area(radius):", return_tensors="pt")


def original() -> list[int]:
    """What transformers itself decodes, greedily."""
    with torch.no_grad():
        out = model.generate(**prompt, do_sample=False, max_new_tokens=24)
    return out[0, prompt["input_ids"].shape[1] :].tolist()


before = original()
with retrofit.Engine.from_model(model, tokenizer, adapter=folder) as engine:
    [result] = engine.generate(prompt, max_new_tokens=24)
    beside = original()  # the model's own generate works meanwhile

assert result.tokens == before == beside == original()
print(result.text)

"""Artifacts in an unmodified vLLM: its own server, scheduler, cache and sampler, with our drafts.

    command.py     `vllm serve` with everything set                     no vLLM
    versions.py    which vLLM is here, and whether it is one we know    no vLLM
    rows.py        where the rows of a draft forward stand              torch
    updates.py     the adapter on draft rows, during a draft forward    torch
    drafts.py      draft tokens, and what they were drawn from          torch
    plugin.py      what vLLM loads in each of its processes
    start.py       vLLM's own command
    sampler.py     the fault of CPU builds at T > 0, found and mended
    proposer.py    one draft forward for all requests of a step
    worker.py      brings the two together

A cycle is our strategy `two_forward`: [seed | M_1..M_K] drafts a root and K tokens, vLLM verifies [root, d_1..d_K].
Each request is two in the draft forward, on one block table: its seed, which sees what a base row sees, and its K draft
rows.  Their K/V lies in slots that vLLM reserves ahead and its verification writes over.
Nothing here imports vLLM until vLLM itself, or `start.py`, asks for it.
"""

"""A real `vllm serve` with drafts and one without, side by side: the same tokens, and what it costs.

__main__.py    `python -m benchmarks.vllm`, what `make vllm` runs
subjects.py    the artifacts that are served, and what they are asked
server.py      a server on loopback, and the client that asks it
parity.py      the same requests to both servers; drafts against `two_forward` here
samples.py     what is sampled against the target's distribution
speed.py       tokens by second, the servers in turn
offline.py     vLLM's own `LLM`, without a server
inside.py      what a worker is told to do otherwise, for controls and planted faults
"""

"""A worker whose proposer hands the sampler other distributions than its drafts were drawn from: a planted fault."""

from retrofit.serving.vllm import proposer
from retrofit.serving.vllm.drafts import draft
from retrofit.serving.vllm.worker import Worker


def misreported(*arguments):
    """The likeliest token of each slot, passed off as drawn."""
    tokens, drawn_from = draft(*arguments)
    return (tokens if drawn_from is None else drawn_from.argmax(-1)), drawn_from


class Misreporting(Worker):
    def load_model(self, **options):
        proposer.draft = misreported
        super().load_model(**options)

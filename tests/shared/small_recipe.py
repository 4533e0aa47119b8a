"""The keys of a recipe that make a conversion small: what the tests of the dry run share."""

SMALL = (
    *("train.precision=float32", "train.batch_size=2", "train.anchors=4", "train.steps=2", "train.warmup=0"),
    "train.save_every=0",  # else the 16 MiB through which a checkpoint is written are the peak of so small a model
    *("adapter.rank=4", "adapter.markov_rank=8", "data.max_length=48", "data.held_out=2", "draft.block=4"),
)

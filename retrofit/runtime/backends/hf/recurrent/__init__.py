"""Recurrent layers: a second kind of state beside K/V.

A recurrent layer's own `forward` runs over all rows of a plan at once, as an attention layer's does; only its functions
that look from one row to another are ours (`mixers.py`): the causal convolution (`convolution.py`) and the recurrence
(`rules.py`).  They see rows through one interface:

    fork for a block    a row follows the one before it on its path; a block forks the path of its anchor (`forest.py`)
    advance by rows     level by level over all paths at once, each row by the same operations as alone (`advance.py`)
    commit a path       what base rows wrote is replayed on the state once it is known which were accepted (`states.py`)
    state at an anchor  of a text that was run whole, for training (`anchors.py`)

A block runs causally through these layers, also where it is bidirectional in the attention layers.
"""

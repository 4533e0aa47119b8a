"""Linear layers and routed experts in forwards of ours: cut, packed, or as they are."""

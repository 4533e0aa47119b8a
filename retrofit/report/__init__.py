"""How a converted model does beside its original: measured, judged, written down."""

"""Models: which one is wanted (identity), where it is (sources, store), whether it is whole (validate, manifest).

The daemon never does this work itself: it starts the child `python -m vllmd.models.fetch` and reads its events (wire).
"""
